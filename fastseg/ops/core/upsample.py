"""Shared by the ops on bilinearly upsampled maps: output sizes, scales, and what the kernels cannot take."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.kernels.runtime.sizes import memoized, memoized_as_given, source_scale
from fastseg.ops.core.constants import constant
from fastseg.ops.core.dispatch import HAS_TRITON
from fastseg.ops.core.layout import channels_last
from fastseg.ops.core.sizes import is_open, is_size, scaled, whole

if HAS_TRITON:
    from fastseg.kernels.upsample.sizes import Axis, Upsampling

Factors = tuple[float, float]  # of height and width; 0 if the output's size was given instead
_RANGE = 1e30  # of logits whose differences can be interpolated and summed in fp32


def output_size(
    name: str, x: Tensor, size: int | tuple[int, ...] | None, scale_factor: float | tuple[float, ...] | None
) -> tuple[int, int, Factors]:
    """Return the output's height and width, as ``torch.nn.functional.interpolate``, and the given factors."""
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{name}: logits are {tuple(x.shape)}; there is no pixel to interpolate")
    if isinstance(size, Tensor) or isinstance(scale_factor, Tensor):  # its value may change
        return _output_size.__wrapped__(name, x.shape[2:], size, scale_factor)
    return _output_size(name, x.shape[2:], size, scale_factor)


@memoized_as_given
def _output_size(name: str, lows: torch.Size, size, scale_factor) -> tuple[int, int, Factors]:
    if (size is None) == (scale_factor is None):
        raise ValueError(f"{name}: size={size}, scale_factor={scale_factor}; give exactly one of them")
    factors: Factors = (0.0, 0.0)
    if size is not None:
        H, W = map(whole, _pair(name, "size", size))
        if not all(map(is_size, (H, W))):
            raise TypeError(f"{name}: size is {size}; give whole numbers of pixels")
    else:
        factors = tuple(float(f) for f in _pair(name, "scale_factor", scale_factor))
        if not all(0 < f < math.inf for f in factors):
            raise ValueError(f"{name}: scale_factor is {scale_factor}; it must be positive and finite")
        H, W = (scaled(low, f) for low, f in zip(lows, factors, strict=True))
    known = [n for n in (H, W) if isinstance(n, int)]
    if not all(0 < n < 2**31 for n in known):
        raise ValueError(f"{name}: the output would be {H} x {W} pixels; both must be at least 1 and below 2^31")
    return H, W, factors


def _pair(name: str, label: str, value) -> tuple:
    if isinstance(value, (tuple, list, torch.Size)):
        if len(value) != 2:
            raise ValueError(f"{name}: {label} is {tuple(value)}; give one number, or (height, width)")
        return tuple(value)
    plain = isinstance(value, (int, float, torch.SymInt, torch.SymFloat, tuple, list))
    if not plain and hasattr(value, "__array__") and getattr(value, "ndim", 0) == 1:
        return _pair(name, label, value.tolist())
    return value, value


def upsampling(x: Tensor, H: int, W: int, factors: Factors, align_corners: bool) -> "Upsampling":
    """The argument of the launchers that describes the upsampling of a map x."""
    return upsampling_of(tuple(x.shape[2:]), H, W, factors, align_corners)


@memoized
def upsampling_of(lows: tuple[int, int], H: int, W: int, factors: Factors, align_corners: bool) -> "Upsampling":
    """``upsampling`` of a map of these sizes."""
    axes = [
        Axis(low, full, source_scale(low, full, align_corners, factor))
        for low, full, factor in zip(lows, (H, W), factors, strict=True)
    ]
    return Upsampling(*axes, align_corners)


def unsupported(x: Tensor, H: int, W: int) -> str:
    """Why no kernel takes these sizes, or "". Offsets inside one image are 32 bits wide.

    A graph is taken at any size, because a guard would bound its sizes; its ops check each size again.
    """
    for n in (*x.shape, H, W):
        if is_open(n):
            return ""
    return too_large(tuple(x.shape), x.stride(), H, W)


def too_large(shape: tuple[int, ...], strides: tuple[int, ...], H: int, W: int, *_) -> str:
    """``unsupported`` of sizes that are known; a list takes further arguments for what ``explain`` says."""
    last = 0
    for size, stride in zip(shape[1:], strides[1:], strict=True):
        last += (size - 1) * stride
    large = last >= 2**31 or math.prod(shape[1:]) >= 2**31 or H * W >= 2**31
    return "an image of 2^31 elements or more" if large else ""


def interpolate(x: Tensor, H: int, W: int, factors: Factors, align_corners: bool) -> Tensor:
    """Upsample to (N, C, H, W) with torch's own function."""
    target = {"size": (H, W)} if factors[0] == 0 else {"scale_factor": factors}
    return F.interpolate(x, **target, mode="bilinear", align_corners=align_corners)


def cross_entropy(logits, target, weight, ignore_index, reduction, label_smoothing, align_corners) -> Tensor:
    """Cross entropy of upsampled logits in torch's two steps."""
    logits = channels_last(logits)
    full = interpolate(logits, *target.shape[1:], (0.0, 0.0), align_corners)
    # One row of classes per pixel: the softmax runs along memory, in 0.8 of the 4-D form's time on a CPU.
    rows = full.permute(0, 2, 3, 1).flatten(0, 2)
    loss = F.cross_entropy(
        rows,
        target.flatten().long(),
        None if weight is None else weight.to(rows.dtype),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss.view(target.shape) if reduction == "none" else loss


# --- on a CPU, a few output rows at a time: interpolate the input rows along x once, then blend pairs of them along y


def is_finite(logits: Tensor) -> bool:
    """True if there are logits and all are finite; blocks of rows would spread NaN and infinity."""
    if logits.numel() == 0:
        return False
    logits = logits.detach()  # a sum in their own dtype takes a fiftieth of the time, but may overflow
    return bool(logits.sum().isfinite()) or bool(logits.sum(dtype=torch.float64).isfinite())


def is_moderate(logits: Tensor) -> bool:
    """True if there are logits, all are finite, and none is so large that differences of them are not."""
    if logits.numel() == 0:
        return False
    least, most = (value.item() for value in logits.detach().aminmax())
    return least > -_RANGE and most < _RANGE


def along_x(x: Tensor, W: int, align_corners: bool, factor: float = 0.0) -> Tensor:
    """Interpolate (C, rows, w) to (rows, C * W); torch is fastest with all lines as channels, innermost."""
    C, rows, w = x.shape
    lines = x.permute(2, 1, 0).reshape(1, 1, w, rows * C).permute(0, 3, 1, 2)
    wide = torch.ops.aten.upsample_bilinear2d(lines, [1, W], align_corners, None, factor or None)
    return wide[0, :, 0].contiguous().view(rows, C * W)


def neighbours(
    low: int, full: int, align_corners: bool, dtype: torch.dtype, factor: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """For each output along one axis: first neighbour, second neighbour, and the weight of the second."""
    scale = source_scale(low, full, align_corners, factor)
    source = torch.arange(full, dtype=dtype, device="cpu")
    source = source * scale if align_corners else ((source + 0.5) * scale - 0.5).clamp_(min=0)
    first = source.long().clamp_(max=low - 1)
    return first, (first + 1).clamp_(max=low - 1), (source - first).clamp_(max=1)


@constant(maxsize=64)
def matrix_along(low: int, full: int, align_corners: bool, dtype: torch.dtype, factor: float = 0.0) -> Tensor:
    """(full, low), the interpolation along one axis, on a CPU."""
    first, second, weight = neighbours(low, full, align_corners, dtype, factor)
    matrix = torch.zeros(full, low, dtype=dtype, device="cpu").scatter_(1, first[:, None], (1 - weight)[:, None])
    return matrix.scatter_add_(1, second[:, None], weight[:, None])
