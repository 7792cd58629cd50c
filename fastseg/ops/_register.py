"""Registering ops with ``torch.library``, and the layout rules that launcher, plain implementation and fake share."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastseg.ops._dispatch import HAS_TRITON, INTERPRETED

NAMESPACE = "fastseg"
DECOMPOSITIONS: dict = {}  # registered op -> the same result in plain PyTorch; for export (`run_decompositions`)


def qualified(name: str) -> str:
    """``fastseg::name``; the one place that spells the namespace."""
    return f"{NAMESPACE}::{name}"


def register(schema: str, launch: Callable, plain: Callable, fake: Callable):
    """Define one op.

    Args:
        schema: ``name(Tensor x, ...) -> Tensor``.
        launch: settles the layout and launches; runs for CUDA and ROCm tensors, and for CPU tensors when interpreted.
        plain: the same in plain PyTorch; runs for CPU tensors, and where an exported program must hold no custom op.
        fake: shapes, dtypes and strides only.

    Returns:
        The op's default overload.
    """
    name = schema.partition("(")[0]
    torch.library.define(qualified(name), schema.removeprefix(name))
    torch.library.impl(qualified(name), "CUDA", launch if HAS_TRITON else plain)
    torch.library.impl(qualified(name), "CPU", launch if INTERPRETED else plain)
    torch.library.register_fake(qualified(name), fake)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    DECOMPOSITIONS[op] = plain
    return op


class _FirstOrder(torch.autograd.Function):
    """The identity, whose backward raises; ``anchor`` requires grad, so that the result does."""

    @staticmethod
    def forward(ctx, anchor: Tensor, name: str, *grads: Tensor | None):
        ctx.name = name
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.name}: its gradients are first order; a second derivative was asked for")


def first_order(name: str) -> Callable:
    """Decorate a Function's backward: a second derivative raises, where ``once_differentiable`` alone would drop it."""

    def decorate(backward: Callable) -> Callable:
        def wrapped(ctx, *grad_outputs):
            with torch.no_grad():
                grads = backward(ctx, *grad_outputs)
            if not torch.is_grad_enabled():  # it is under create_graph=True
                return grads
            return _FirstOrder.apply(torch.empty(0, requires_grad=True), name, *grads)

        return wrapped

    return decorate


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The format that torch's own kernels answer ``x`` with: channels_last(_3d) where the strides say so, dense or not.

    Strides tell the two apart at one pixel and at one channel, where a map is dense in both: it stays what it was.
    Contiguous for what is neither 4-D nor 5-D.
    """
    last = _CHANNELS_LAST.get(x.dim())
    if last is None:
        return torch.contiguous_format
    least = 0  # strides ascend from the channels outwards, in a slice of a channels_last map too
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        size, stride = x.shape[d], x.stride(d)
        if size == 0 or stride < least or (d == 1 and stride == 0) or (d == 0 and least == x.stride(1)):
            return torch.contiguous_format
        least = stride * max(size, 1)
    return last


def channels_last(t: Tensor) -> Tensor:
    """(N, C, H, W), dense with the channels innermost: the only copy a kernel's input goes through, if any."""
    return t.contiguous(memory_format=torch.channels_last)


def like(x: Tensor, y: Tensor) -> Tensor:
    """``y`` in the memory format of ``x``: what comes out is laid out as what went in."""
    return y.contiguous(memory_format=memory_format_of(x))


def settle(x: Tensor) -> tuple[Tensor, bool]:
    """``x`` dense in its memory format, copied only where it is not, and whether that is channels_last."""
    layout = memory_format_of(x)
    return x.contiguous(memory_format=layout), layout == torch.channels_last


def new_map(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised (N, C, H, W) tensor in the dtype and memory format of ``x``."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
