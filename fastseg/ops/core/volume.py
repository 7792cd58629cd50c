"""Shared by the ops on trilinearly upsampled volumes: output sizes, torch's own steps, and slabs of output slices.

A trilinear interpolation is separable: two planes of the volume are blended along z, then the plane that this gives is
interpolated bilinearly. So a slab of output slices takes no more memory than these planes, and the ops on maps do the
rest.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.sizes import is_size, scaled, whole
from fastseg.ops.core.upsample import neighbours

Size = int | tuple[int, ...] | None
Factor = float | tuple[float, ...] | None


class Resize(NamedTuple):
    """A trilinear interpolation: output size in voxels, and the factors that were given, or zeros."""

    size: tuple[int, int, int]
    factors: tuple[float, float, float]
    align_corners: bool

    @property
    def plane(self) -> tuple[int, int, tuple[float, float], bool]:
        """What the ops on maps take: H, W, factors, align_corners."""
        return *self.size[1:], self.factors[1:], self.align_corners


def resize_of(name: str, x: Tensor, size: Size, scale_factor: Factor, align_corners: bool) -> Resize:
    """The interpolation that ``torch.nn.functional.interpolate`` does of x (N, C, d, h, w) with these arguments."""
    if (size is None) == (scale_factor is None):
        raise ValueError(f"{name}: size={size}, scale_factor={scale_factor}; give exactly one of them")
    if 0 in x.shape[2:]:
        raise ValueError(f"{name}: logits are {tuple(x.shape)}; there is no voxel to interpolate")
    if size is not None:
        full, factors = tuple(map(whole, _triple(name, "size", size))), (0.0, 0.0, 0.0)
        if not all(map(is_size, full)):
            raise TypeError(f"{name}: size is {size}; give whole numbers of voxels")
    else:
        a, b, c = (float(f) for f in _triple(name, "scale_factor", scale_factor))
        factors = (a, b, c)
        if not all(0 < f < math.inf for f in factors):
            raise ValueError(f"{name}: scale_factor is {scale_factor}; it must be positive and finite")
        full = tuple(scaled(low, f) for low, f in zip(x.shape[2:], factors, strict=True))
    if not all(0 < n < 2**31 for n in full if isinstance(n, int)):
        raise ValueError(f"{name}: the output would be {full} voxels; each must be at least 1 and below 2^31")
    D, H, W = full
    return Resize((D, H, W), factors, align_corners)


def _triple(name: str, label: str, value) -> tuple:
    if hasattr(value, "__array__") and getattr(value, "ndim", 0) == 1:
        value = value.tolist()
    if isinstance(value, (tuple, list)):
        if len(value) != 3:
            raise ValueError(f"{name}: {label} is {tuple(value)}; give one number, or (depth, height, width)")
        return tuple(value)
    return value, value, value


def interpolate(x: Tensor, to: Resize) -> Tensor:
    """Upsample to (N, C, D, H, W) with torch's own function."""
    target: dict = {"size": to.size} if to.factors[0] == 0 else {"scale_factor": to.factors}
    return F.interpolate(x, **target, mode="trilinear", align_corners=to.align_corners)


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float,
    align_corners: bool,
) -> Tensor:  # fmt: skip
    """Cross entropy of volumes in torch's two steps, for labels and weights of any dtype."""
    D, H, W = target.shape[1:]
    if logits.shape[2:] != target.shape[1:]:  # else a copy
        logits = interpolate(logits, Resize((D, H, W), (0.0, 0.0, 0.0), align_corners))
    weight = None if weight is None else weight.to(logits.dtype)
    options: dict = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return F.cross_entropy(logits, target.long(), weight, **options)


def argmax(logits: Tensor, to: Resize, dtype: torch.dtype) -> Tensor:
    """The class volume in torch's two steps."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return interpolate(wide, to).max(1).indices.to(dtype)


class Slices(NamedTuple):
    """For each output slice: its two planes of the volume, and the weight of the second."""

    first: list[int]
    second: list[int]
    weight: list[float]


def slices_of(depth: int, to: Resize, kind: torch.dtype) -> Slices:
    """The slices of a volume of ``depth`` planes, with weights rounded to ``kind``."""
    axis = neighbours(depth, to.size[0], to.align_corners, kind, to.factors[0])
    first, second, weight = (t.tolist() for t in axis)
    return Slices(first, first if depth == to.size[0] else second, weight)  # torch copies an axis that keeps its size


def distinct(slices: Slices, begin: int, end: int) -> tuple[Slices, list[int]]:
    """The different ones among the slices from ``begin`` to ``end``, and for each of these its number there."""
    found: dict[tuple[int, int, float], int] = {}
    which = []
    for z in range(begin, end):
        weight = slices.weight[z]
        key = (slices.first[z], slices.second[z], weight)
        which.append(found.setdefault(key, len(found)))
    first, second, weights = zip(*found, strict=True)
    return Slices(list(first), list(second), list(weights)), which


def blended(volume: Tensor, slices: Slices, kind: torch.dtype, finite: bool) -> Tensor:
    """Blend planes of a volume (C, d, h, w) along z -> (S, C, h, w) of dtype ``kind``.

    Sums of equal planes are equal. Where a value is not finite, torch's products with zero weights count too.
    """
    C, _, h, w = volume.shape
    slab = torch.empty(len(slices.first), C, h, w, dtype=kind, device=volume.device)
    for plane, first, second, t in zip(slab, *slices, strict=True):
        if finite and (t == 0 or first == second):
            plane.copy_(volume[:, first])
        elif finite:
            torch.lerp(volume[:, first].to(kind), volume[:, second].to(kind), t, out=plane)
        else:
            torch.mul(volume[:, first].to(kind), 1 - t, out=plane).add_(volume[:, second].to(kind) * t)
    return slab
