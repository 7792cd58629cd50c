"""The registered op of ``fastseg.ops.upsample_sum``."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg.ops.core.dispatch import HAS_TRITON, needs_grad
from fastseg.ops.core.forms import Forms, KernelForm, OneKernel, Reference, Verdict
from fastseg.ops.core.layout import memory_format_of, new_map, settle
from fastseg.ops.core.norm import ACTIVATIONS
from fastseg.ops.core.register import of_sizes, qualified, register
from fastseg.ops.upsample_bilinear import transposed

if HAS_TRITON:
    from fastseg.kernels.runtime.ceilings import chip_of
    from fastseg.kernels.upsample.bilinear import unsupported as unsupported_size
    from fastseg.kernels.upsample.sum import MOST_MAPS, plan, upsample_sum_fwd

NAME = "upsample_sum"


def sizes_of(base: Tensor, maps: Sequence[Tensor], *_: object) -> tuple:
    """What decides whether the kernel takes a call, and what it costs."""
    return tuple(base.shape), tuple(tuple(m.shape) for m in maps), base.dtype, base.device


def _unsupported(shape: tuple[int, ...], maps: tuple[tuple[int, ...], ...], *_: object) -> str:
    """Why the kernel cannot take these sizes, or ""."""
    if not maps:
        return "there is no map to upsample"
    return next(filter(None, (unsupported_size(shape[1], small[2:], shape[2:]) for small in maps)), "")


class OnePass(KernelForm):
    """Our kernel: each map is read once, and nothing is written but the result. A graph asks for sizes when it runs."""

    def refuses(self, r: OneKernel) -> str:
        return super().refuses(r) if r.sizes else r.no_kernel

    def cost(self, r: OneKernel) -> Verdict | None:
        if not r.sizes:
            return None
        shape, maps, dtype, device = r.sizes
        return plan(math.prod(shape), [math.prod(small) for small in maps], dtype, chip_of(device))


def _launch(base: Tensor, maps: list[Tensor], scale, bias, act: str, align_corners: bool) -> Tensor:
    y, channels_last = settle(base)
    layout = memory_format_of(base)
    maps = [m.contiguous(memory_format=layout) for m in maps]
    scale, bias = (None if t is None else t.contiguous() for t in (scale, bias))
    while len(maps) > MOST_MAPS:
        y = upsample_sum_fwd(y, maps[:MOST_MAPS], None, None, "none", align_corners, channels_last)
        maps = maps[MOST_MAPS:]
    return upsample_sum_fwd(y, maps, scale, bias, act, align_corners, channels_last)


def _plain(base: Tensor, maps: list[Tensor], scale, bias, act: str, align_corners: bool) -> Tensor:
    y, size = base, list(base.shape[2:])
    for m in maps:
        y = y + torch.ops.aten.upsample_bilinear2d.default(m, size, align_corners, None, None)
    column = lambda t: t.to(base.dtype)[:, None, None]
    y = y if scale is None else y * column(scale)
    y = y if bias is None else y + column(bias)
    y = ACTIVATIONS[act](y)
    return (y.clone() if y is base else y).contiguous(memory_format=memory_format_of(base))


def _fake(base: Tensor, maps: list[Tensor], scale, bias, act: str, align_corners: bool) -> Tensor:
    return new_map(base, tuple(base.shape))


FORMS = Forms(NAME, [OnePass(_launch, _unsupported), Reference(_plain)])
_fwd = register(
    f"{NAME}(Tensor base, Tensor[] maps, Tensor? scale, Tensor? bias, str act, bool align_corners) -> Tensor",
    _launch, _plain, _fake, forms=FORMS, request=of_sizes(sizes_of), asked=True,
)  # fmt: skip


def upsample_sum_op(base: Tensor, maps: Sequence[Tensor], scale, bias, act: str, align_corners: bool) -> Tensor:
    """One kernel; with gradients only without scale, bias and activation, which follow as ops of their own."""
    if needs_grad(base, *maps):
        assert scale is None and bias is None and act == "none"
        return _UpsampleSum.apply(align_corners, base, *maps)
    return _fwd(base, list(maps), scale, bias, act, align_corners)


def _save(ctx, inputs, output) -> None:
    _, maps, scale, bias, act, ctx.align_corners = inputs
    ctx.sizes, ctx.linear = [tuple(m.shape[2:]) for m in maps], scale is None and bias is None and act == "none"
    ctx.wanted = [m.requires_grad for m in maps]


def _gradients(ctx, dy: Tensor) -> list[Tensor | None]:
    pairs = zip(ctx.sizes, ctx.wanted, strict=True)
    return [transposed(dy, size, ctx.align_corners, None, None) if want else None for size, want in pairs]


def _registered_backward(ctx, dy: Tensor):
    if not ctx.linear:
        raise RuntimeError("upsample_sum: with a scale, a bias or an activation it has no gradient; apply them to it")
    return dy, _gradients(ctx, dy), None, None, None, None


torch.library.register_autograd(qualified("upsample_sum"), _registered_backward, setup_context=_save)


class _UpsampleSum(torch.autograd.Function):
    """The registered op with its tensors as separate arguments: the Function for eager calls."""

    @staticmethod
    def forward(ctx, align_corners: bool, base: Tensor, *maps: Tensor):
        _save(ctx, (base, maps, None, None, "none", align_corners), None)
        return _fwd(base, list(maps), None, None, "none", align_corners)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return None, dy, *_gradients(ctx, dy)
