"""Register ops with ``torch.library``; launcher, plain implementation and fake share one set of layout rules."""

import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastseg.ops.core.dispatch import HAS_TRITON, INTERPRETED, has_tangent, no_kernel
from fastseg.ops.core.forms import Forms, KernelForm, OneKernel, Reference
from fastseg.ops.core.torch_private import forward_ad_level, inside_jvp, is_bare

NAMESPACE = "fastseg"
DECOMPOSITIONS: dict = {}  # registered op -> the same result in plain PyTorch; for export (`run_decompositions`)
KERNELS: dict = {}  # registered op -> what it does on a GPU; for export with kernels


def qualified(name: str) -> str:
    """``fastseg::name``; the only place that spells the namespace."""
    return f"{NAMESPACE}::{name}"


def one_kernel(
    op: str, launch: Callable, plain: Callable, unsupported: Callable[..., str], *, aliases: Sequence[str] = (),
    backward: bool = False,
) -> Forms:  # fmt: skip
    """The list of an op that is one kernel or torch's own ops.

    Args:
        op: name of the op in ``force`` and ``explain``.
        launch: computes the registered op with the kernel.
        plain: the same in plain PyTorch.
        unsupported: ``(*sizes) -> why``, as of ``KernelForm``.
        aliases, backward: as of ``Forms``.
    """
    return Forms(op, [KernelForm(launch, unsupported), Reference(plain)], aliases=aliases, backward=backward)


def register(
    schema: str,
    launch: Callable,
    plain: Callable,
    fake: Callable,
    *,
    forms: Forms | None = None,
    request: Callable[..., Hashable] | None = None,
    asked: bool = False,
):
    """Define and register one op.

    Args:
        schema: ``name(Tensor x, ...) -> Tensor``.
        launch: settles the layout and launches, or asks the op's ``Forms``; runs on CUDA and ROCm tensors, and on CPU
            tensors when interpreted.
        plain: the same in plain PyTorch; runs on CPU tensors, and in exported programs that must hold no custom op.
        fake: output shapes, dtypes and strides.
        forms: the op's list; it is asked at each call, and ``launch`` is what its kernel runs.
        request: the list's request, of the op's arguments.
        asked: True if eager callers have asked the list before: a call that skips the dispatcher asks no second time.

    Returns:
        A callable. ``.op`` is its default overload, ``.direct`` maps a device type to its implementation.
    """
    name = schema.partition("(")[0]
    torch.library.define(qualified(name), schema.removeprefix(name))
    asks = launch
    if forms is not None and request is not None:
        asks = _asking(forms, request)
    kernels = {"cuda": HAS_TRITON, "cpu": INTERPRETED}
    direct = {device: (launch if asked else asks) if runs else plain for device, runs in kernels.items()}
    for device, runs in kernels.items():
        implementation = _refusing_tangents(name, asks if runs else plain)
        torch.library.impl(qualified(name), device.upper(), implementation)
    torch.library.register_fake(qualified(name), fake)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    DECOMPOSITIONS[op] = plain
    if HAS_TRITON:
        KERNELS[op] = asks

    @functools.wraps(launch)
    def call(*args):
        if torch.compiler.is_dynamo_compiling() or not is_bare(args):
            return plain(*args) if _have_tangents(args) else op(*args)
        return direct[args[0].device.type](*args)

    call.op, call.direct = op, direct
    return call


def _asking(forms: Forms, request: Callable[..., Hashable]) -> Callable:
    def call(*args):
        return forms(request(*args), *args)

    return call


def of_sizes(sizes: Callable[..., tuple]) -> Callable[..., OneKernel]:
    """The request of an op with one kernel: ``sizes`` are what ``unsupported`` takes, of the op's arguments."""
    return lambda *args: OneKernel(no_kernel(args[0]), sizes(*args))


def one_launch(op: str, launch: Callable, plain: Callable, refuses: Callable[..., str]) -> dict[str, Any]:
    """The list and the request, for ``register``, of a kernel whose public function has a longer list.

    Args:
        op: name of the public function's list.
        launch, plain: as of ``register``.
        refuses: why the kernel cannot take these arguments of the registered op, or "".
    """
    forms = one_kernel(op, launch, plain, str, backward=True)  # str() is "": the request has said it all
    return {"forms": forms, "request": lambda *args: OneKernel(refuses(*args), ())}


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
