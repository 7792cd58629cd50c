"""Register ops with ``torch.library``; launcher, plain implementation and fake share one set of layout rules."""

import functools
import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastseg.ops.core.dispatch import HAS_TRITON, INTERPRETED, has_tangent
from fastseg.ops.core.torch_private import forward_ad_level, inside_jvp, is_bare

NAMESPACE = "fastseg"
DECOMPOSITIONS: dict = {}  # registered op -> the same result in plain PyTorch; for export (`run_decompositions`)


def qualified(name: str) -> str:
    """``fastseg::name``; the only place that spells the namespace."""
    return f"{NAMESPACE}::{name}"


def register(
    schema: str, launch: Callable, plain: Callable, fake: Callable, *, refuses: Callable[..., str] | None = None
):
    """Define and register one op.

    Args:
        schema: ``name(Tensor x, ...) -> Tensor``.
        launch: settles the layout and launches, or asks the op's ``Forms``; runs on CUDA and ROCm tensors, and on CPU
            tensors when interpreted.
        plain: the same in plain PyTorch; runs on CPU tensors, and in exported programs that must hold no custom op.
        fake: output shapes, dtypes and strides.
        refuses: of an op with two forms, one kernel and ``plain``: why the kernel cannot take these arguments, or "".

    Returns:
        A callable. ``.op`` is its default overload, ``.direct`` maps a device type to its implementation.
    """
    name = schema.partition("(")[0]
    if refuses is not None:
        launch = _kernel_or_plain(launch, plain, refuses)
    torch.library.define(qualified(name), schema.removeprefix(name))
    direct = {"cuda": launch if HAS_TRITON else plain, "cpu": launch if INTERPRETED else plain}
    for device, implementation in direct.items():
        torch.library.impl(qualified(name), device.upper(), _refusing_tangents(name, implementation))
    torch.library.register_fake(qualified(name), fake)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    DECOMPOSITIONS[op] = plain

    @functools.wraps(launch)
    def call(*args):
        if torch.compiler.is_dynamo_compiling() or not is_bare(args):
            return plain(*args) if _have_tangents(args) else op(*args)
        return direct[args[0].device.type](*args)

    call.op, call.direct = op, direct
    return call


def _kernel_or_plain(launch: Callable, plain: Callable, refuses: Callable[..., str]) -> Callable:
    @functools.wraps(launch)
    def call(*args):
        return plain(*args) if refuses(*args) else launch(*args)

    return call


def _have_tangents(args: Iterable) -> bool:
    flat = itertools.chain.from_iterable(a if isinstance(a, (list, tuple)) else (a,) for a in args)
    return has_tangent(*(a for a in flat if isinstance(a, Tensor)))


def _refusing_tangents(name: str, implementation: Callable) -> Callable:
    """What the dispatcher calls, as an exported program does: it drops tangents without a word.

    fastseg's functions never come here under a transform.
    """

    @functools.wraps(implementation)
    def call(*args):
        if forward_ad_level() >= 0 and (inside_jvp() or _have_tangents(args)):
            raise NotImplementedError(f"{qualified(name)} has no forward-mode derivative; fastseg's functions have one")
        return implementation(*args)

    return call
