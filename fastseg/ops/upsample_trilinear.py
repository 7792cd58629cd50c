"""Trilinear interpolation with torch's values and a deterministic backward."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.dispatch import is_torchs, runs_kernel
from fastseg.ops.core.forms import Forms, KernelForm, Reference
from fastseg.ops.core.override import overridable
from fastseg.ops.core.sizes import is_size, scaled, whole
from fastseg.ops.upsample_bilinear import interpolated, unsupported


@overridable
def upsample_trilinear(
    x: Tensor,
    size: int | tuple[int, int, int] | None = None,
    scale_factor: float | tuple[float, float, float] | None = None,
    align_corners: bool = False,
    recompute_scale_factor: bool | None = None,
) -> Tensor:
    """As ``torch.nn.functional.interpolate(x, ..., mode="trilinear")``; differences: the backward is deterministic.

    Where kernels run, it is two calls of that of ``upsample_bilinear``: planes are interpolated along the depth, then
    each plane. So each voxel gathers the gradient of its outputs, summed in fp32 in a fixed order; torch's CUDA kernel
    adds them atomically. 16-bit volumes are interpolated in fp32 in between. Elsewhere it is torch's own op, whose
    backward is deterministic on a CPU. The map is linear, so second and forward-mode derivatives work.

    Args:
        x: (N, C, D, H, W), contiguous or channels_last_3d.
        size: output depth, height and width in voxels, or one number for all.
        scale_factor: output voxels per input voxel, one number or three; instead of ``size``. Positions follow it as
            given, except that an axis which keeps its size is copied, as torch does on a CPU.
        align_corners: True aligns the centres of the corner voxels, False the corners of the volumes.
        recompute_scale_factor: True takes positions from the rounded sizes, not from ``scale_factor`` as given.

    Returns:
        (N, C, OD, OH, OW), in the dtype of ``x``; float32 under autocast on CUDA, as in torch.

    Raises:
        ValueError, RuntimeError, NotImplementedError: torch's own, for arguments that ``interpolate`` refuses.

    Reference: ``torch.nn.functional.interpolate``.
    """
    align_corners = bool(align_corners)
    target = None if is_torchs(x) else _target(x, size, scale_factor, recompute_scale_factor)
    if target is None or not runs_kernel(FORMS, x, (x.shape, target[0])):
        return upsample_trilinear_ref(x, size, scale_factor, align_corners, recompute_scale_factor)
    return _in_two(x, target[0], target[1], align_corners)


def _in_two(x: Tensor, size: tuple[int, int, int], factors: tuple[float | None, ...], align_corners: bool) -> Tensor:
    """Planes along the depth, then each plane."""
    (D, H, W), (depth, height, width) = size, factors
    kind = x.dtype
    if kind in (torch.float16, torch.bfloat16):
        autocast = x.is_cuda and torch.is_autocast_enabled("cuda")
        x, kind = x.float(), torch.float32 if autocast else kind
    N, C, d, h, w = x.shape
    if d != D:
        x = interpolated(x.reshape(N, C, d, h * w), (D, h * w), align_corners, depth, None).view(N, C, D, h, w)
    if (h, w) != (H, W):
        last = x.stride(1) == 1 and C > 1
        planes = x.transpose(1, 2).reshape(N * D, C, h, w) if last else x.reshape(N, C * D, h, w)
        y = interpolated(planes, (H, W), align_corners, height, width)
        x = y.view(N, D, C, H, W).transpose(1, 2) if last else y.view(N, C, D, H, W)
    return x.to(kind)


def upsample_trilinear_ref(
    x: Tensor,
    size: int | tuple[int, int, int] | None = None,
    scale_factor: float | tuple[float, float, float] | None = None,
    align_corners: bool = False,
    recompute_scale_factor: bool | None = None,
) -> Tensor:
    """``upsample_trilinear`` in plain PyTorch."""
    given: dict = {"size": size, "scale_factor": scale_factor, "recompute_scale_factor": recompute_scale_factor}
    return F.interpolate(x, **given, mode="trilinear", align_corners=align_corners)


def _target(x: Tensor, size, scale_factor, recompute_scale_factor):
    """The output's sizes and the factors that place it, or None if torch must check the arguments."""
    if x.dim() != 5 or not x.is_floating_point() or (size is None) == (scale_factor is None):
        return None
    given = size if scale_factor is None else scale_factor
    three = tuple(map(whole, given)) if isinstance(given, (tuple, list, torch.Size)) else (whole(given),) * 3
    if len(three) != 3 or (size is not None and recompute_scale_factor):
        return None
    factors: tuple = (None, None, None)
    if scale_factor is None:
        out = three
        if not all(map(is_size, out)):
            return None
    else:
        if not all(0 < float(f) < math.inf for f in three):
            return None
        out = tuple(scaled(n, float(f)) for n, f in zip(x.shape[2:], three, strict=True))
        factors = factors if recompute_scale_factor else tuple(map(float, three))
    return None if any(n < 1 for n in (*x.shape[1:], *out)) else (out, factors)


def _unsupported(shape: torch.Size, out: tuple[int, int, int]) -> str:
    """Why one of the two calls cannot be taken, or ""."""
    _, C, d, h, w = shape
    D, H, W = out
    return unsupported(C, (d, h * w), (D, h * w)) or unsupported(C * D, (h, w), (H, W))


FORMS = Forms("upsample_trilinear", [KernelForm(_in_two, _unsupported), Reference(upsample_trilinear_ref)])
