"""Max pooling that records the winning cell of each window, as torch's int64 index or a code of 2, 4 or 8 bits.

    forward    y = max over the window's cells, padding left out; ties: the first cell; NaN: the last NaN
    backward   max_unpool.py, with the windows' gradients summed

A cell may first pass a batch norm with given statistics and an activation: the pooling then reads the convolution's
output once, and the normalised map is never stored. Traffic in elements, hi cells and lo windows: hi + lo, and lo
indices of 8 bytes or lo codes of 1/4, 1/2 or 1 byte. Each program owns whole windows; windows that overlap read their
shared cells from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.common.norm_act import activate, load_norm
from fastseg.kernels.common.norm_args import Norm, norm_args
from fastseg.kernels.pooling.windows import (
    INT64,
    NO_INDEX,
    UNROLLED,
    Pooling,
    grid_rows,
    new_index,
    new_map,
    pack_codes,
)
from fastseg.kernels.runtime.config import candidates, heuristic, select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv, next_power_of_2
from fastseg.kernels.runtime.tensors import acc_dtype


@triton.jit
def _steps_to_0(start, STEP: tl.constexpr):
    """Steps from ``start`` to the first position that is not negative."""
    return (tl.where(start < 0, -start, 0) + STEP - 1) // STEP


@triton.jit
def _better(
    best, label, x_ptr, base, d0, h0, w0, channel, mask, mean, scale, bias, D, H, W, step, t,
    KH: tl.constexpr, KW: tl.constexpr, LD: tl.constexpr, LH: tl.constexpr, LW: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Hold tap ``t`` of each window against the best so far; its label is its index where FLAT, else its code."""
    d = d0 + t // (KH * KW) * LD
    h = h0 + t // KW % KH * LH
    w = w0 + t % KW * LW
    ok = mask & (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    cell = (d * H + h) * W + w
    v = tl.load(x_ptr + base + (cell * step + channel), mask=ok, other=0.0).to(best.dtype)
    if NORM:
        v = (v - mean) * scale + bias
    v = activate(v, ACT)
    take = ok & ((v > best) | (v != v))
    return tl.where(take, v, best), tl.where(take, cell if FLAT else t, label)


@triton.jit(do_not_specialize=["rows", "H", "W", "OH", "OW"])
def _max_pool_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    y_ptr, index_ptr,
    rows, inner, C, D, H, W, OD, OH, OW, eps,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, LD: tl.constexpr, LH: tl.constexpr, LW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    row0 = tl.program_id(0) * BLOCK_M  # a map has fewer than 2^31 rows
    col0 = tl.program_id(1) * BLOCK_L
    offs_m, offs_l = tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_L)
    mask_m, mask_l = row0 + offs_m < rows, offs_l < inner
    mask = mask_m[:, None] & mask_l[None, :]
    image, od, oh, ow, channel = grid_rows(row0 + offs_m, offs_l, OD, OH, OW, CHANNELS_LAST)
    d0, h0, w0 = od * SD - PD, oh * SH - PH, ow * SW - PW
    step = C if CHANNELS_LAST else 1
    base = image * (D * H * W).to(tl.int64) * step

    mean, scale, bias = 0.0, 1.0, 0.0
    if NORM:  # channels_last
        mean, rstd, weight, bias = load_norm(weight_ptr, bias_ptr, mean_ptr, var_ptr, offs_l, mask_l, eps, AFFINE, ACC)
        mean, scale, bias = mean[None, :], (rstd * weight)[None, :], bias[None, :]

    # The first cell inside the plane wins a window of -inf: as torch, also where no tap is inside.
    iz, iy, ix = _steps_to_0(d0, LD), _steps_to_0(h0, LH), _steps_to_0(w0, LW)
    FLAT: tl.constexpr = BITS == INT64
    index = ((d0 + iz * LD) * H + h0 + iy * LH) * W + w0 + ix * LW
    label = tl.broadcast_to(index if FLAT else (iz * KH + iy) * KW + ix, (BLOCK_M, BLOCK_L))
    best = tl.full((BLOCK_M, BLOCK_L), float("-inf"), ACC)
    TAPS: tl.constexpr = KD * KH * KW
    for t in tl.range(0, TAPS, loop_unroll_factor=TAPS if TAPS <= UNROLLED else 1):
        best, label = _better(
            best, label, x_ptr, base, d0, h0, w0, channel, mask, mean, scale, bias, D, H, W, step, t,
            KH, KW, LD, LH, LW, NORM, ACT, FLAT,
        )  # fmt: skip

    row = row0.to(tl.int64) * inner
    offs = offs_m[:, None] * inner + offs_l[None, :]
    tl.store(y_ptr + row + offs, best.to(y_ptr.dtype.element_ty), mask=mask)
    if BITS == INT64:
        tl.store(index_ptr + row + offs, label.to(tl.int64), mask=mask)
    elif BITS == 8:
        tl.store(index_ptr + row + offs, label.to(tl.uint8), mask=mask)
    elif BITS > 0:
        FIELDS: tl.constexpr = 8 // BITS
        packed = pack_codes(tl.where(mask, label, 0), BITS, BLOCK_M, BLOCK_L)
        width = (inner + FIELDS - 1) // FIELDS
        offs_b = col0 // FIELDS + tl.arange(0, BLOCK_L // FIELDS)
        at = index_ptr + row0.to(tl.int64) * width + (offs_m[:, None] * width + offs_b[None, :])
        tl.store(at, packed, mask=mask_m[:, None] & (offs_b < width)[None, :])


def max_pool_fwd(
    x: Tensor, pool: Pooling, bits: int, norm: Norm | None = None, act: str = "none"
) -> tuple[Tensor, Tensor]:
    """x (N, C, *pool.size), dense in pool's layout -> y (N, C, *pool.out), and its index (empty for ``NO_INDEX``)."""
    y, index = new_map(x, pool, pool.out), new_index(x, pool, bits)
    rows, inner = pool.window_rows
    args, has_norm, affine = norm_args(norm, x)
    *vectors, eps = args
    cfg = select(
        "max_pool_fwd", size=y.numel(), device=x.device, dtype=x.dtype, inner=inner, last=pool.channels_last, bits=bits
    )
    launch(
        _max_pool_fwd_kernel, (cdiv(rows, cfg.BLOCK_M), cdiv(inner, cfg.BLOCK_L)),
        x, *vectors, y, y if bits == NO_INDEX else index, rows, inner, pool.C, *pool.size, *pool.out, eps,
        **pool.constants, BITS=bits, NORM=has_norm, AFFINE=affine, ACT=act, ACC=acc_dtype(x), **cfg.launch,
    )  # fmt: skip
    return y, index


@heuristic("max_pool_fwd")
@heuristic("max_unpool_fwd")
@heuristic("max_unpool_bwd")
def _rows_config(size: int, dtype: torch.dtype, inner: int, last: bool, bits: int) -> dict[str, int]:
    """16 windows a thread: 2 vectors of 16 bytes of bf16 channels, with all their taps in flight. In planes with int64
    indices 8, in fp32 4: more take all registers, and spill with Triton 3.9.

    In planes a block is as wide as a line of windows, so that lanes of a warp are neighbours in memory.
    """
    block_l = min(64 if last else 256, max(16, next_power_of_2(inner)))
    elements = 2048 if last or bits <= 4 else 1024 if dtype.itemsize == 2 else 512
    return {"BLOCK_M": max(elements // block_l, 1), "BLOCK_L": block_l, "num_warps": 4}


@candidates("max_pool_fwd")
@candidates("max_unpool_fwd")
@candidates("max_unpool_bwd")
def _rows_candidates(size: int, dtype: torch.dtype, inner: int, last: bool, bits: int) -> list[dict[str, int]]:
    return [
        {"BLOCK_M": max(elements // block, 1), "BLOCK_L": block, "num_warps": warps}
        for elements in (512, 1024, 2048, 4096)
        for block in ((32, 64, 128) if last else (64, 128, 256, 512))
        for warps in (2, 4, 8)
    ]
