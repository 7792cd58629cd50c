"""What the ops on bilinearly upsampled maps share: output sizes, scales, and what their kernels cannot take."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops._dispatch import HAS_TRITON

if HAS_TRITON:
    from fastseg.kernels.upsample_plan import Axis, Upsampling

Factors = tuple[float, float]  # of height and width; 0 where the output's size was given instead


def output_size(
    name: str, x: Tensor, size: int | tuple[int, int] | None, scale_factor: float | tuple[float, float] | None
) -> tuple[int, int, Factors]:
    """-> output height and width as ``torch.nn.functional.interpolate`` has them, and the factors given."""
    if (size is None) == (scale_factor is None):
        raise ValueError(f"{name}: size={size}, scale_factor={scale_factor}; give exactly one of them")
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{name}: logits are {tuple(x.shape)}; there is no pixel to interpolate")
    factors: Factors = (0.0, 0.0)
    if size is not None:
        H, W = _pair(name, "size", size)
    else:
        factors = tuple(float(f) for f in _pair(name, "scale_factor", scale_factor))
        if not all(math.isfinite(f) and f > 0 for f in factors):
            raise ValueError(f"{name}: scale_factor is {scale_factor}; it must be positive and finite")
        H, W = (math.floor(low * f) for low, f in zip(x.shape[2:], factors, strict=True))
    if not (0 < H < 2**31 and 0 < W < 2**31):
        raise ValueError(f"{name}: the output would be {H} x {W} pixels; both must be at least 1 and below 2^31")
    return H, W, factors


def _pair(name: str, label: str, value) -> tuple:
    if isinstance(value, (tuple, list, torch.Size)):
        if len(value) != 2:
            raise ValueError(f"{name}: {label} is {tuple(value)}; give one number, or (height, width)")
        return tuple(value)
    return value, value


def source_scale(low: int, full: int, factor: float, align_corners: bool) -> float:
    """Input elements per output element of one axis. A given factor counts, not the quotient of the sizes."""
    if align_corners:
        return (low - 1) / (full - 1) if full > 1 else 0.0
    return 1 / factor if factor > 0 else low / full


def upsampling(x: Tensor, H: int, W: int, factors: Factors, align_corners: bool) -> "Upsampling":
    """What the launchers take, for a map x."""
    axes = [
        Axis(low, full, source_scale(low, full, factor, align_corners))
        for low, full, factor in zip(x.shape[2:], (H, W), factors, strict=True)
    ]
    return Upsampling(*axes, align_corners)


def unsupported(x: Tensor, H: int, W: int) -> str:
    """Why no kernel takes these sizes, or "": offsets inside one image are 32 bits wide."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    too_large = last >= 2**31 or x[:1].numel() >= 2**31 or H * W >= 2**31
    return "an image of 2^31 elements or more" if too_large else ""


def interpolate(x: Tensor, H: int, W: int, factors: Factors, align_corners: bool) -> Tensor:
    """torch's own upsampling, to (N, C, H, W)."""
    target = {"size": (H, W)} if factors[0] == 0 else {"scale_factor": factors}
    return F.interpolate(x, **target, mode="bilinear", align_corners=align_corners)
