"""Class map of bilinearly upsampled logits, and how sure each pixel is; the upsampled logits exist in registers only.

    y       = the first class whose v_c is NaN, else the first with the largest v_c, as in ``argmax.py``
    m, s, d = max_c v_c, sum_c exp(v_c - m), sum_c (v_c - m) exp(v_c - m), kept up to date class by class
    value   = 1 / s (probability), (1 - exp(second - m)) / s (margin to the second), or log s - d / s (entropy)

Traffic in elements: reads N C h w, writes N H W class indices and N H W values. A program owns rows of one cell row and
BLOCK_W columns. No class can be pruned: each adds to s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.common.bilinear import mix, nan_blind_maximum, source_coordinate, to_second, upsample_tile
from fastseg.kernels.runtime.config import candidates, heuristic, select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv
from fastseg.kernels.runtime.tensors import acc_dtype, stats_dtype
from fastseg.kernels.upsample.cross_entropy_fwd import _LN2, _LOG2E, _along_x
from fastseg.kernels.upsample.sizes import Upsampling, row_block, row_splits

MEASURES = {"probability": 0, "margin": 1, "entropy": 2}


@triton.jit(
    do_not_specialize=["h", "w", "H", "splits", "stride_n", "stride_y"],
    do_not_specialize_on_alignment=["stride_c", "stride_x"],
)
def _upsample_confidence_kernel(
    x_ptr, y_ptr, value_ptr,
    h, w, H, W, scale_h, scale_w, inverse_h, splits, stride_n, stride_c, stride_y, stride_x,
    C: tl.constexpr, MEASURE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    n, y0, row_first, row_end, column = upsample_tile(tl.program_id(0), h, H, W, scale_h, inverse_h, splits,
                                                      ALIGN_CORNERS, ACC, BLOCK_H, BLOCK_W)  # fmt: skip
    offs_w = column + tl.arange(0, BLOCK_W)
    x0, x1, w1 = source_coordinate(offs_w, w, scale_w, ALIGN_CORNERS, ACC)  # (BLOCK_W,)
    w0 = 1 - w1
    left, right = x0 * stride_x, x1 * stride_x
    here = offs_w < W
    top_ptr = x_ptr + n * stride_n + y0 * stride_y
    bottom_ptr = top_ptr + (tl.minimum(y0 + to_second(scale_h, 0.0), h - 1) - y0) * stride_y
    for row in range(row_first, row_end, BLOCK_H * splits):
        offs_h = row + tl.arange(0, BLOCK_H)
        h1 = source_coordinate(offs_h, h, scale_h, ALIGN_CORNERS, ACC)[2][:, None]
        best = tl.full((BLOCK_H, BLOCK_W), float("-inf"), ACC)
        y = tl.zeros((BLOCK_H, BLOCK_W), tl.int32)
        m = tl.full((BLOCK_H, BLOCK_W), -3.0e38, ACC)  # finite, so that -inf - m is no NaN
        second = tl.full((BLOCK_H, BLOCK_W), -3.0e38, ACC)
        s = tl.zeros((BLOCK_H, BLOCK_W), ACC)
        d = tl.zeros((BLOCK_H, BLOCK_W), ACC)
        for c in tl.range(0, C, num_stages=1):
            plane = c * stride_c
            top = _along_x(top_ptr + plane, left, right, here, w0, w1)
            bottom = _along_x(bottom_ptr + plane, left, right, here, w0, w1)
            v = mix(1 - h1, top[None, :], h1, bottom[None, :])
            wins = (v > best) | ((v != v) & (best == best))
            best, y = tl.where(wins, v, best), tl.where(wins, c, y)
            largest = nan_blind_maximum(m, v)
            second = tl.where(v > m, m, nan_blind_maximum(second, v))
            scale, e = tl.exp2((m - largest) * _LOG2E), tl.exp2((v - largest) * _LOG2E)
            if MEASURE == 2:
                moved = tl.where(scale == 0, 0.0, (d + s * (m - largest)) * scale)
                d = moved + tl.where(e == 0, 0.0, (v - largest) * e)
            s = s * scale + e
            m = largest
        value = 1 / s
        if MEASURE == 1:
            value = (1 - tl.exp2((second - m) * _LOG2E)) / s
        elif MEASURE == 2:
            value = tl.log2(s) * _LN2 - d / s
        offs = n * H * W + offs_h[:, None] * W + offs_w[None, :]
        mask = (offs_h < row_end)[:, None] & here[None, :]
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(value_ptr + offs, value.to(value_ptr.dtype.element_ty), mask=mask)


def upsample_confidence_fwd(x: Tensor, up: Upsampling, dtype: torch.dtype, measure: str) -> tuple[Tensor, Tensor]:
    """x (N, C, h, w), any strides -> class indices and values (N, H, W)."""
    N, C, h, _ = x.shape
    y = torch.empty(N, up.y.full, up.x.full, dtype=dtype, device=x.device)
    values = torch.empty(y.shape, dtype=stats_dtype(x), device=x.device)
    if y.numel() == 0:
        return y, values
    cfg = select("upsample_confidence", size=y.numel(), device=x.device, C=C, dtype=x.dtype, factor=up.factor)
    splits = row_splits(up)
    *sizes, _ = up.arguments()
    launch(
        _upsample_confidence_kernel, (N * h * splits * cdiv(up.x.full, cfg.BLOCK_W),),
        x, y, values, *sizes, splits, *x.stride(),
        C=C, MEASURE=MEASURES[measure], ALIGN_CORNERS=up.align_corners, ACC=acc_dtype(x), **cfg.launch,
    )  # fmt: skip
    return y, values


@heuristic("upsample_confidence")
def _confidence_config(size: int, C: int, dtype: torch.dtype, factor: int) -> dict[str, int]:
    """One column a thread, the rows of a cell in its registers, up to 4: six numbers for each."""
    return {"BLOCK_H": min(4, row_block(factor)), "BLOCK_W": 128, "num_warps": 4}


@candidates("upsample_confidence")
def _confidence_candidates(size: int, C: int, dtype: torch.dtype, factor: int) -> list[dict[str, int]]:
    return [
        {"BLOCK_H": rows, "BLOCK_W": columns, "num_warps": warps}
        for rows in dict.fromkeys((1, 2, min(4, row_block(factor)), row_block(factor)))
        for columns, warps in ((64, 2), (128, 4), (256, 8))
    ]
