"""Class map of bilinearly upsampled logits; the upsampled logits exist in registers only.

    v_c = (1 - u) ((1 - t) a_c + t b_c) + u ((1 - t) c_c + t d_c)        a, b, c, d: the corners of the pixel's cell
    y   = the first class whose v_c is NaN, else the first with the largest v_c

Traffic in elements: reads N C h w, writes N H W class indices.

A program owns rows of one cell row and BLOCK_W columns. The two lerps along x are shared by its rows, so that a value
costs two multiply-adds and the comparison.

Pruning. The weights are at least 0 and add up to 1, and a rounded multiply or add is monotone in each operand: a class
lies between its smallest and its largest corner, up to the rounding of v. With L = the largest over classes of the
smallest corner, a class whose largest corner is below L cannot win. Only the classes that can win somewhere in the
tile are interpolated, in ascending order. Exact, ties included: v of four equal corners m is m up to 6 roundings of
2^-24, and pruned classes lie 16 of them below L (in fp16 and bf16 two different values differ by more than that
anyway). A corner that is not finite may make NaN of a zero weight: its tile takes every class.

By count, pruning costs about 26 operations for a cell and class, brute force 5 for an output value, and the smoother a
map, the fewer classes are left. So it is on from 12 outputs a cell, where it is the cheaper even if a third of the
classes remain, and up to 256 classes, which fit one tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.common.bilinear import (
    float_of,
    mix,
    nan_blind_maximum,
    source_coordinate,
    to_second,
    upsample_tile,
)
from fastseg.kernels.runtime.config import candidates, heuristic, select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import bits_of, cdiv, memoized, next_power_of_2
from fastseg.kernels.runtime.tensors import acc_dtype
from fastseg.kernels.upsample.sizes import Upsampling, row_block, row_splits

PRUNED_OUTPUTS = 12  # of a cell
PRUNED_CLASSES = 256


@triton.jit(
    do_not_specialize=["h", "w", "H", "bits_h", "bits_w", "bits_inverse", "splits", "stride_n", "stride_y"],
    do_not_specialize_on_alignment=["stride_c", "stride_x"],
)
def _upsample_argmax_fwd_kernel(
    x_ptr,
    h, w, H, W, bits_h, bits_w, bits_inverse, splits, stride_n, stride_c, stride_y, stride_x,
    y_ptr,
    C: tl.constexpr, ALIGN_CORNERS: tl.constexpr, PRUNE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    scale_h, scale_w = float_of(bits_h, tl.float32), float_of(bits_w, tl.float32)
    inverse_h = float_of(bits_inverse, tl.float32)
    n, y0, row_first, row_end, column = upsample_tile(tl.program_id(0), h, H, W, scale_h, inverse_h, splits,
                                                      ALIGN_CORNERS, ACC, BLOCK_H, BLOCK_W)  # fmt: skip
    offs_w = column + tl.arange(0, BLOCK_W)
    x0, x1, w1 = source_coordinate(offs_w, w, scale_w, ALIGN_CORNERS, ACC)  # (BLOCK_W,)
    w0 = 1 - w1
    left, right = x0 * stride_x, x1 * stride_x
    top_ptr = x_ptr + n * stride_n + y0 * stride_y
    bottom_ptr = top_ptr + (tl.minimum(y0 + to_second(scale_h, 0.0), h - 1) - y0) * stride_y
    if PRUNE:
        able = _able_classes(top_ptr, bottom_ptr, column, w, W, scale_w, stride_c, stride_x,
                             C, ALIGN_CORNERS, ACC, BLOCK_W, BLOCK_X, BLOCK_C)  # (BLOCK_C,)  # fmt: skip
    for row in range(row_first, row_end, BLOCK_H * splits):
        offs_h = row + tl.arange(0, BLOCK_H)
        h1 = source_coordinate(offs_h, h, scale_h, ALIGN_CORNERS, ACC)[2]
        h1 = h1[:, None]
        best = tl.full((BLOCK_H, BLOCK_W), float("-inf"), ACC)
        y = tl.zeros((BLOCK_H, BLOCK_W), tl.int32)
        if PRUNE:
            classes = tl.arange(0, BLOCK_C)
            for word in tl.static_range((C + 63) // 64):
                bit = tl.full((BLOCK_C,), 1, tl.int64) << (classes % 64)
                bits = tl.sum(tl.where(able & (classes // 64 == word), bit, 0), axis=0)
                while bits != 0:
                    lowest = bits & -bits
                    # the exponent of a power of two as a float; 2^63 is a negative number, so the sign bit goes
                    exponent = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255
                    c = word * 64 + nan_blind_maximum(tl.minimum(exponent, 190), 127) - 127
                    bits = bits ^ lowest
                    plane = c.to(tl.int64) * stride_c
                    best, y = _compare(best, y, c, top_ptr + plane, bottom_ptr + plane, left, right, w0, w1, h1)
        else:
            for c in tl.range(0, C, num_stages=1, loop_unroll_factor=2):
                best, y = _compare(best, y, c, top_ptr + c * stride_c, bottom_ptr + c * stride_c,
                                   left, right, w0, w1, h1)  # fmt: skip
        offs = offs_h[:, None] * W + offs_w[None, :]
        mask = (offs_h < row_end)[:, None] & (offs_w < W)[None, :]
        tl.store(y_ptr + n * H * W + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _compare(best, y, c, top_ptr, bottom_ptr, left, right, w0, w1, h1):
    """Let class ``c`` win where it is larger, or the first NaN. best, y: (BLOCK_H, BLOCK_W)."""
    top = mix(w0, tl.load(top_ptr + left).to(w0.dtype), w1, tl.load(top_ptr + right).to(w0.dtype))
    bottom = mix(w0, tl.load(bottom_ptr + left).to(w0.dtype), w1, tl.load(bottom_ptr + right).to(w0.dtype))
    v = mix(1 - h1, top[None, :], h1, bottom[None, :])
    wins = (v > best) | ((v != v) & (best == best))
    return tl.where(wins, v, best), tl.where(wins, c, y)


@triton.jit
def _able_classes(
    top_ptr, bottom_ptr, column, w, W, scale_w, stride_c, stride_x,
    C: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Which classes can win somewhere in the cells of BLOCK_W columns from ``column`` on: -> (BLOCK_C,) bool."""
    first = source_coordinate(column, w, scale_w, ALIGN_CORNERS, ACC)[0]
    last = source_coordinate(tl.minimum(column + BLOCK_W, W) - 1, w, scale_w, ALIGN_CORNERS, ACC)[0]
    classes = tl.arange(0, BLOCK_C)
    able = tl.zeros((BLOCK_X, BLOCK_C), tl.int32)
    for cell in range(first, last + 1, BLOCK_X):
        offs_x = cell + tl.arange(0, BLOCK_X)
        mask = (offs_x <= last)[:, None] & (classes < C)[None, :]
        inner = mask & (offs_x + 1 < w)[:, None]
        offs = offs_x[:, None] * stride_x + classes[None, :] * stride_c
        a = tl.load(top_ptr + offs, mask=mask, other=0.0).to(ACC)
        b = tl.where(inner, tl.load(top_ptr + stride_x + offs, mask=inner, other=0.0).to(ACC), a)
        c = tl.load(bottom_ptr + offs, mask=mask, other=0.0).to(ACC)
        d = tl.where(inner, tl.load(bottom_ptr + stride_x + offs, mask=inner, other=0.0).to(ACC), c)
        smallest = tl.where(mask, tl.minimum(tl.minimum(a, b), tl.minimum(c, d)), float("-inf"))
        largest = nan_blind_maximum(nan_blind_maximum(a, b), nan_blind_maximum(c, d))
        finite = tl.sum(((a - b) + (c - d)) * 0.0, axis=1) == 0  # else NaN
        bound = tl.reduce(smallest, 1, nan_blind_maximum)
        bound -= tl.abs(bound) * 2.0**-20 + 1e-36  # the latter for values so small that they have no relative precision
        bound = tl.where(finite, bound, float("-inf"))
        able |= (mask & ~(largest < bound[:, None])).to(tl.int32)
    return tl.sum(able, axis=0) > 0


@memoized
def prunes(C: int, up: Upsampling) -> bool:
    """Whether the kernel looks for the classes that can win; the header has the costs."""
    return up.y.outputs * up.x.outputs >= PRUNED_OUTPUTS and 8 <= C <= PRUNED_CLASSES


def upsample_argmax_fwd(x: Tensor, up: Upsampling, dtype: torch.dtype) -> Tensor:
    """x (N, C, h, w), any strides -> class indices (N, H, W)."""
    N, C, h, _ = x.shape
    y = torch.empty(N, up.y.full, up.x.full, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    prune = prunes(C, up)
    cfg = select("upsample_argmax_fwd", size=y.numel(), device=x.device, C=C, dtype=x.dtype, factor=up.factor)
    splits = row_splits(up)
    launch(
        _upsample_argmax_fwd_kernel, (N * h * splits * cdiv(up.x.full, cfg.BLOCK_W),),
        x, up.y.low, up.x.low, up.y.full, up.x.full,
        bits_of(up.y.scale), bits_of(up.x.scale), bits_of(up.y.inverse), splits, *x.stride(), y,
        C=C, ALIGN_CORNERS=up.align_corners, PRUNE=prune, ACC=acc_dtype(x),
        BLOCK_C=next_power_of_2(C) if prune else 1, **cfg.launch,
    )  # fmt: skip
    return y


@heuristic("upsample_argmax_fwd")
def _argmax_config(size: int, C: int, dtype: torch.dtype, factor: int) -> dict[str, int]:
    """One column a thread, the rows of a cell in its registers; about 1024 corners at a time to prune by."""
    block_x = min(16, max(4, 1024 // next_power_of_2(C)))
    return {"BLOCK_H": row_block(factor), "BLOCK_W": 128, "BLOCK_X": block_x, "num_warps": 4, "maxnreg": 128}


@candidates("upsample_argmax_fwd")
def _argmax_candidates(size: int, C: int, dtype: torch.dtype, factor: int) -> list[dict[str, int]]:
    return [
        {"BLOCK_H": rows, "BLOCK_W": columns, "BLOCK_X": cells, "num_warps": warps, "maxnreg": 128}
        for rows in (row_block(factor), max(1, row_block(factor) // 2))
        for columns, warps in ((64, 2), (128, 4), (128, 2), (256, 4))
        for cells in (8, 16, 32)
    ]
