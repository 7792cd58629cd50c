"""Bilinear interpolation concatenated with skip maps: a U-Net's skip connection, each element written once."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.dispatch import HAS_TRITON, needs_grad, runs_kernel
from fastseg.ops.core.layout import memory_format_of, new_map, settle
from fastseg.ops.core.override import overridable
from fastseg.ops.core.register import of_sizes, one_kernel, qualified, register
from fastseg.ops.upsample_bilinear import transposed, unsupported

if HAS_TRITON:
    from fastseg.kernels.upsample.bilinear import bilinear_fwd, interpolation

NAME = "upsample_concat"


@overridable
def upsample_concat(
    x: Tensor, skips: Sequence[Tensor], *, align_corners: bool = False, up_first: bool = False
) -> Tensor:
    """``cat([*skips, interpolate(x, skips[0].shape[2:], mode="bilinear", ...)], 1)``, each element written once.

    The interpolation writes its channels of the result directly; torch writes a map, reads it and writes it again. The
    skips are copied beside it. The backward reads the gradient's channels in place. The map is linear, so second and
    forward-mode derivatives work.

    Args:
        x: (N, C, h, w), contiguous or channels_last.
        skips: maps (N, C_i, H, W), all of one size; a view into a larger map is not copied first.
        align_corners: as in ``torch.nn.functional.interpolate``.
        up_first: True for ``cat([interpolate(x, ...), *skips], 1)``.

    Returns:
        (N, C + sum of C_i, H, W), in the memory format of ``x`` and the dtype that ``x`` and the skips promote to.

    Raises:
        ValueError: there is no skip, a map is not 4-D or has no pixel, or batches or sizes differ.
        TypeError: a map is not floating point.

    Reference: Ronneberger et al., U-Net, arXiv:1505.04597; ``torch.cat``, ``torch.nn.functional.interpolate``.
    """
    skips = list(skips)
    _check(x, skips)
    dtype = x.dtype
    for skip in skips:
        dtype = torch.promote_types(dtype, skip.dtype)
    x, skips = x.to(dtype), [skip.to(dtype) for skip in skips]
    if not runs_kernel(FORMS, x, _sizes(x, skips), *skips):
        return upsample_concat_ref(x, skips, align_corners=align_corners, up_first=up_first)
    if needs_grad(x, *skips):
        return _UpsampleConcat.apply(align_corners, up_first, x, *skips)
    return _fwd(x, skips, align_corners, up_first)


def upsample_concat_ref(
    x: Tensor, skips: Sequence[Tensor], *, align_corners: bool = False, up_first: bool = False
) -> Tensor:
    """``upsample_concat`` in plain PyTorch."""
    y = F.interpolate(x, skips[0].shape[2:], mode="bilinear", align_corners=align_corners)
    return torch.cat([y, *skips] if up_first else [*skips, y], 1)


def _check(x: Tensor, skips: list[Tensor]) -> None:
    if not skips:
        raise ValueError(f"{NAME}: there is no skip; use upsample_bilinear")
    for label, t in (("x", x), *((f"skips[{i}]", skip) for i, skip in enumerate(skips))):
        if t.dim() != 4 or 0 in t.shape[1:]:
            raise ValueError(f"{NAME}: {label} is {tuple(t.shape)}; it must be (N, C, H, W), none of C, H, W being 0")
        if not t.is_floating_point():
            raise TypeError(f"{NAME}: {label} is {t.dtype}; it must be a floating-point tensor")
        if t.shape[0] != x.shape[0] or (t is not x and t.shape[2:] != skips[0].shape[2:]):
            raise ValueError(
                f"{NAME}: {label} is {tuple(t.shape)}; it must have the batch of x, {x.shape[0]}, and the size of the "
                f"first skip, {tuple(skips[0].shape[2:])}"
            )


# --- the registered op


def _places(channels: int, skips: list[int], up_first: bool) -> list[int]:
    """First channel of each skip, then of the interpolated map."""
    at, places = channels if up_first else 0, []
    for count in skips:
        places.append(at)
        at += count
    return [*places, 0 if up_first else at]


def _launch(x: Tensor, skips: list[Tensor], align_corners: bool, up_first: bool) -> Tensor:
    counts, size = [skip.shape[1] for skip in skips], tuple(skips[0].shape[2:])
    x, channels_last = settle(x)
    y = new_map(x, (x.shape[0], x.shape[1] + sum(counts), *size))
    *places, at = _places(x.shape[1], counts, up_first)
    taps = interpolation(tuple(x.shape[2:]), size, align_corners, (None, None))
    bilinear_fwd(x, size, taps, channels_last, into=y.narrow(1, at, x.shape[1]))
    for skip, at in zip(skips, places, strict=True):
        y.narrow(1, at, skip.shape[1]).copy_(skip)
    return y


def _plain(x: Tensor, skips: list[Tensor], align_corners: bool, up_first: bool) -> Tensor:
    y = upsample_concat_ref(x, skips, align_corners=align_corners, up_first=up_first)
    return y.contiguous(memory_format=memory_format_of(x))


def _fake(x: Tensor, skips: list[Tensor], align_corners: bool, up_first: bool) -> Tensor:
    return new_map(x, (x.shape[0], x.shape[1] + sum(skip.shape[1] for skip in skips), *skips[0].shape[2:]))


def _sizes(x: Tensor, skips: Sequence[Tensor], *_) -> tuple:
    return x.shape[1] + sum([skip.shape[1] for skip in skips]), x.shape[2:], skips[0].shape[2:]


FORMS = one_kernel(NAME, _launch, _plain, unsupported)
_fwd = register(
    f"{NAME}(Tensor x, Tensor[] skips, bool align_corners, bool up_first) -> Tensor", _launch, _plain, _fake,
    forms=FORMS, request=of_sizes(_sizes), asked=True,
)  # fmt: skip


def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients at x and at the skips; the latter are slices of ``dy``."""
    channels, *size = ctx.low
    *places, at = _places(channels, ctx.counts, ctx.up_first)
    dup = dy.narrow(1, at, channels)
    dx = transposed(dup, tuple(size), ctx.align_corners, None, None) if ctx.wants_x else None
    return dx, [dy.narrow(1, at, count) for at, count in zip(places, ctx.counts, strict=True)]


def _save(ctx, inputs, output) -> None:
    x, skips, ctx.align_corners, ctx.up_first = inputs
    ctx.low, ctx.size, ctx.wants_x = tuple(x.shape[1:]), tuple(skips[0].shape[2:]), x.requires_grad
    ctx.counts = [skip.shape[1] for skip in skips]


def _registered_backward(ctx, dy: Tensor):
    return *_gradients(ctx, dy), None, None


torch.library.register_autograd(qualified(NAME), _registered_backward, setup_context=_save)


class _UpsampleConcat(torch.autograd.Function):
    """The registered op with its tensors as separate arguments: the Function for eager calls."""

    @staticmethod
    def forward(ctx, align_corners: bool, up_first: bool, x: Tensor, *skips: Tensor):
        _save(ctx, (x, skips, align_corners, up_first), None)
        return _fwd(x, list(skips), align_corners, up_first)

    @staticmethod
    def backward(ctx, dy: Tensor):
        dx, dskips = _gradients(ctx, dy)
        return None, None, dx, *dskips
