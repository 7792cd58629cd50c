"""Class volume of trilinearly upsampled logits; the upsampled logits exist in registers only.

    v_c = (1 - t) p_c(z0) + t p_c(z1)        p: the bilinear value within a plane, z0 and z1: the planes of the slice
    y   = the first class whose v_c is NaN, else the first with the largest v_c

Traffic in elements: reads N C d h w, writes N D H W class indices.

A program owns BLOCK outputs of one slice, in the order of memory: the slice's two planes and their weights are scalars.
For each class it gathers the eight corners of its outputs' cells. Neighbouring outputs share corners, and the next
slices and rows read the same planes again, so caches serve all but the first of these loads. Maps have a kernel that
looks for the classes that can win in a cell; here every class is interpolated, as a cell's outputs lie in several
slices, which other programs own.

The kernel of maps on planes that were blended before takes N C D h w more elements, written and read: for twice the
depth, four times what is read here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.common.bilinear import mix, source_coordinate
from fastseg.kernels.runtime.config import candidates, heuristic, select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv
from fastseg.kernels.runtime.tensors import acc_dtype
from fastseg.kernels.upsample.sizes import Axis


@triton.jit(
    do_not_specialize=["d", "h", "w", "D", "H", "W", "stride_n"],
    do_not_specialize_on_alignment=["stride_c", "stride_z", "stride_y", "stride_x"],
)
def _upsample_argmax3d_fwd_kernel(
    x_ptr, y_ptr,
    d, h, w, D, H, W, scale_d, scale_h, scale_w, stride_n, stride_c, stride_z, stride_y, stride_x,
    C: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(H * W, BLOCK)
    tile = tl.program_id(0).to(tl.int64)
    block = (tile % blocks).to(tl.int32)
    n = tile // blocks // D
    z = (tile // blocks % D).to(tl.int32)
    z0, z1, t1 = source_coordinate(z, d, scale_d, ALIGN_CORNERS, ACC)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    mask = offs < H * W
    y0, y1, u1 = source_coordinate(offs // W, h, scale_h, ALIGN_CORNERS, ACC)
    x0, x1, v1 = source_coordinate(offs % W, w, scale_w, ALIGN_CORNERS, ACC)
    near = x_ptr + n * stride_n + z0.to(tl.int64) * stride_z
    far = x_ptr + n * stride_n + z1.to(tl.int64) * stride_z
    a, b = y0 * stride_y + x0 * stride_x, y0 * stride_y + x1 * stride_x
    c, e = y1 * stride_y + x0 * stride_x, y1 * stride_y + x1 * stride_x
    best = tl.full((BLOCK,), float("-inf"), ACC)
    y = tl.zeros((BLOCK,), tl.int32)
    for k in tl.range(0, C, num_stages=1):
        first = _within(near, a, b, c, e, u1, v1, mask)
        second = _within(far, a, b, c, e, u1, v1, mask)
        near += stride_c  # a class's plane may lie 2^31 elements and more behind the first
        far += stride_c
        v = mix(1 - t1, first, t1, second)
        wins = (v > best) | ((v != v) & (best == best))
        best = tl.where(wins, v, best)
        y = tl.where(wins, k, y)
    tl.store(y_ptr + (n * D + z) * H * W + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _within(plane_ptr, a, b, c, e, u1, v1, mask):
    """The bilinear values in a plane: a, b: offsets of the corners of the upper row, c, e: of the lower. -> (BLOCK,)"""
    upper = mix(1 - v1, tl.load(plane_ptr + a, mask=mask, other=0.0).to(v1.dtype),
                v1, tl.load(plane_ptr + b, mask=mask, other=0.0).to(v1.dtype))  # fmt: skip
    lower = mix(1 - v1, tl.load(plane_ptr + c, mask=mask, other=0.0).to(v1.dtype),
                v1, tl.load(plane_ptr + e, mask=mask, other=0.0).to(v1.dtype))  # fmt: skip
    return mix(1 - u1, upper, u1, lower)


def upsample_argmax3d_fwd(x: Tensor, axes: tuple[Axis, Axis, Axis], align_corners: bool, dtype: torch.dtype) -> Tensor:
    """x (N, C, d, h, w), any strides -> class indices (N, D, H, W)."""
    N, C = x.shape[:2]
    y = torch.empty(N, *(axis.full for axis in axes), dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    cfg = select("upsample_argmax3d_fwd", size=y.numel(), device=x.device, C=C, dtype=x.dtype)
    _, D, H, W = y.shape
    launch(
        _upsample_argmax3d_fwd_kernel, (N * D * cdiv(H * W, cfg.BLOCK),),
        x, y, *x.shape[2:], D, H, W, *(float(axis.scale) for axis in axes), *x.stride(),
        C=C, ALIGN_CORNERS=align_corners, ACC=acc_dtype(x), **cfg.launch,
    )  # fmt: skip
    return y


@heuristic("upsample_argmax3d_fwd")
def _argmax3d_config(size: int, C: int, dtype: torch.dtype) -> dict[str, int]:
    """Two outputs a thread: their corners, weights and offsets stay in its registers."""
    return {"BLOCK": 256, "num_warps": 4}


@candidates("upsample_argmax3d_fwd")
def _argmax3d_candidates(size: int, C: int, dtype: torch.dtype) -> list[dict[str, int]]:
    pairs = ((128, 2), (128, 4), (256, 4), (256, 8), (512, 4), (512, 8))
    return [{"BLOCK": block, "num_warps": warps} for block, warps in pairs]
