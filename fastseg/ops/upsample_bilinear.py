"""Bilinear interpolation with torch's values and a deterministic backward."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.kernels.runtime.sizes import memoized_as_given
from fastseg.ops.core.autograd import run
from fastseg.ops.core.dispatch import HAS_TRITON, is_torchs, known, runs_kernel
from fastseg.ops.core.layout import memory_format_of, new_map, settle
from fastseg.ops.core.override import overridable
from fastseg.ops.core.register import of_sizes, one_kernel, qualified, register
from fastseg.ops.core.sizes import is_size, scaled, whole

if HAS_TRITON:
    from fastseg.kernels.upsample.bilinear import bilinear_fwd, held_channels, interpolation
    from fastseg.kernels.upsample.bilinear import unsupported as kernels_unsupported
    from fastseg.kernels.upsample.bilinear_bwd import bilinear_bwd


@overridable
def upsample_bilinear(
    x: Tensor,
    size: int | tuple[int, int] | None = None,
    scale_factor: float | tuple[float, float] | None = None,
    align_corners: bool = False,
    recompute_scale_factor: bool | None = None,
) -> Tensor:
    """As ``torch.nn.functional.interpolate(x, ..., mode="bilinear")``; differences: the backward is deterministic.

    Each input pixel gathers the gradient of its outputs, summed in fp32 in a fixed order; torch's CUDA kernel adds them
    atomically in the dtype of ``x``. A pixel of weight 0 gets no gradient, where torch gives it 0 times the gradient:
    this differs if the gradient is not finite. The map is linear, so second and forward-mode derivatives work.

    Args:
        x: (N, C, H, W), contiguous or channels_last; neither is copied.
        size: output height and width in pixels, or one number for both.
        scale_factor: output pixels per input pixel, one number or (height, width); instead of ``size``. Positions
            follow it as given, except that an axis which keeps its size is copied, as torch does on a CPU.
        align_corners: True aligns the centres of the corner pixels, False the corners of the images.
        recompute_scale_factor: True takes positions from the rounded sizes, not from ``scale_factor`` as given.

    Returns:
        (N, C, OH, OW), in the dtype and memory format of ``x``; float32 under autocast on CUDA, as in torch.

    Raises:
        ValueError, RuntimeError, NotImplementedError: torch's own, for arguments that ``interpolate`` refuses.

    Reference: ``torch.nn.functional.interpolate``.
    """
    if is_torchs(x) and scale_factor is None and not recompute_scale_factor and _is_exact(size):
        return F.interpolate(x, size, None, "bilinear", align_corners)
    target = target_of(x.shape, size, scale_factor, recompute_scale_factor) if x.is_floating_point() else None
    if target is None:  # torch takes it or raises
        return upsample_bilinear_ref(x, size, scale_factor, align_corners, recompute_scale_factor)
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled("cuda"):
        x = x.float()
    out, factors = target
    if not runs_kernel(FORMS, x, (x.shape[1], x.shape[2:], out)):
        size = out if size is not None else None
        return upsample_bilinear_ref(x, size, scale_factor, align_corners, recompute_scale_factor)
    args = (x, out, bool(align_corners), *factors)
    return run(_UpsampleBilinear, fwd_op, *args)


def _is_exact(size) -> bool:
    """Whether torch takes or refuses ``size`` as it is; numpy's whole numbers need a change."""
    return type(size) is int or (type(size) is tuple and len(size) == 2 and type(size[0]) is type(size[1]) is int)


def upsample_bilinear_ref(
    x: Tensor,
    size: int | tuple[int, int] | None = None,
    scale_factor: float | tuple[float, float] | None = None,
    align_corners: bool = False,
    recompute_scale_factor: bool | None = None,
) -> Tensor:
    """``upsample_bilinear`` in plain PyTorch."""
    return F.interpolate(x, size, scale_factor, "bilinear", align_corners, recompute_scale_factor)


@memoized_as_given
def target_of(shape: torch.Size, size, scale_factor, recompute_scale_factor):
    """Return the output's (height, width) and the scale factors, or None if torch must check the arguments."""
    if len(shape) != 4 or (size is None) == (scale_factor is None):
        return None
    given = size if scale_factor is None else scale_factor
    pair = tuple(map(whole, given)) if isinstance(given, (tuple, list, torch.Size)) else (whole(given),) * 2
    if len(pair) != 2 or (size is not None and recompute_scale_factor):
        return None
    if scale_factor is None:
        out, factors = pair, (None, None)
        if not all(map(is_size, out)):
            return None
    else:
        factors = tuple(float(f) for f in pair)
        if not all(f < float("inf") for f in factors):
            raise ValueError(f"upsample_bilinear: scale_factor is {scale_factor}; it must be finite")
        if not all(f > 0 for f in factors):
            return None
        if any(isinstance(n, int) and n * f >= 2**31 for n, f in known(*zip(shape[2:], factors, strict=True))):
            raise ValueError(
                f"upsample_bilinear: scale_factor is {scale_factor}; the output has a side of 2^31 or more"
            )
        out = tuple(scaled(n, f) for n, f in zip(shape[2:], factors, strict=True))
        if recompute_scale_factor:
            factors = (None, None)
    if any(n < 1 for n in (*shape[1:], *out)):  # one by one: a minimum would order the sizes of an exported graph
        return None
    return out, factors


# --- the registered ops


def _launch_fwd(x: Tensor, size: list[int], align_corners: bool, factor_h: float | None, factor_w: float | None):
    x, channels_last = settle(x)
    taps = interpolation(tuple(x.shape[2:]), tuple(size), align_corners, (factor_h, factor_w))
    return bilinear_fwd(x, tuple(size), taps, channels_last)


def _plain_fwd(x: Tensor, size: list[int], align_corners: bool, factor_h: float | None, factor_w: float | None):
    y = torch.ops.aten.upsample_bilinear2d.default(x, size, align_corners, factor_h, factor_w)
    return y.contiguous(memory_format=memory_format_of(x))


def _launch_bwd(dy: Tensor, size: list[int], align_corners: bool, factor_h: float | None, factor_w: float | None):
    channels_last = memory_format_of(dy) == torch.channels_last
    held = held_channels(dy, channels_last)  # no copy of a slice of channels, such as the gradient of a concatenation
    dy = dy if held else settle(dy)[0]
    taps = interpolation(tuple(size), tuple(dy.shape[2:]), align_corners, (factor_h, factor_w))
    return bilinear_bwd(dy, tuple(size), taps, channels_last)


def _plain_bwd(dy: Tensor, size: list[int], align_corners: bool, factor_h: float | None, factor_w: float | None):
    bwd = torch.ops.aten.upsample_bilinear2d_backward.default
    dx = bwd(dy, dy.shape[2:], [*dy.shape[:2], *size], align_corners, factor_h, factor_w)
    return dx.contiguous(memory_format=memory_format_of(dy))


def _sizes_bwd(dy: Tensor, size: list[int], *_) -> tuple:
    held = held_channels(dy, memory_format_of(dy) == torch.channels_last)
    return held or dy.shape[1], tuple(size), tuple(dy.shape[2:])


def unsupported(channels: int, low: Sequence[int], full: Sequence[int]) -> str:
    """Why the kernels cannot interpolate between such maps, or ""."""
    return kernels_unsupported(channels, tuple(low), tuple(full))


FORMS = one_kernel("upsample_bilinear", _launch_fwd, _plain_fwd, unsupported)
BACKWARD_FORMS = one_kernel("upsample_bilinear", _launch_bwd, _plain_bwd, unsupported, backward=True)

_ARGS = "SymInt[] size, bool align_corners, float? factor_h, float? factor_w"
_fake = lambda x, size, align_corners, factor_h, factor_w: new_map(x, (*x.shape[:2], *size))
fwd_op = register(
    f"upsample_bilinear(Tensor x, {_ARGS}) -> Tensor", _launch_fwd, _plain_fwd, _fake,
    forms=FORMS, request=of_sizes(lambda x, size, *_: (x.shape[1], x.shape[2:], tuple(size))), asked=True,
)  # fmt: skip
_bwd = register(
    f"upsample_bilinear_bwd(Tensor dy, {_ARGS}) -> Tensor", _launch_bwd, _plain_bwd, _fake,
    forms=BACKWARD_FORMS, request=of_sizes(_sizes_bwd),
)  # fmt: skip


def interpolated(x: Tensor, size: tuple[int, int], align_corners: bool, *factors: float | None) -> Tensor:
    """The registered op: x interpolated to ``size``, placed by the factors where they are given; differentiable."""
    args = (x, size, align_corners, *factors)
    return run(_UpsampleBilinear, fwd_op, *args)


def transposed(dy: Tensor, size: tuple[int, int], align_corners: bool, *factors: float | None) -> Tensor:
    """The gradient at a map of ``size``, given that of its interpolation; differentiable."""
    args = (dy, size, align_corners, *factors)
    return run(_UpsampleBilinearBwd, _bwd, *args)


class _UpsampleBilinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *args):
        _UpsampleBilinear.save(ctx, (x, *args), None)
        return fwd_op(x, *args)

    @staticmethod
    def save(ctx, inputs, output) -> None:
        x, _, *ctx.options = inputs
        ctx.size = tuple(x.shape[2:])

    @staticmethod
    def backward(ctx, dy: Tensor):
        return transposed(dy, ctx.size, *ctx.options), None, None, None, None


class _UpsampleBilinearBwd(torch.autograd.Function):
    """The transposed map; its own backward is the forward map."""

    @staticmethod
    def forward(ctx, dy: Tensor, *args):
        _UpsampleBilinear.save(ctx, (dy, *args), None)
        return _bwd(dy, *args)

    @staticmethod
    def backward(ctx, ddx: Tensor):
        args = (ddx, ctx.size, *ctx.options)
        return run(_UpsampleBilinear, fwd_op, *args), None, None, None, None


for _name, _function in (("upsample_bilinear", _UpsampleBilinear), ("upsample_bilinear_bwd", _UpsampleBilinearBwd)):
    torch.library.register_autograd(qualified(_name), _function.backward, setup_context=_UpsampleBilinear.save)
