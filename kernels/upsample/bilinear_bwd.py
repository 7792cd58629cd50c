"""Backward of ``bilinear.py``: each input pixel gathers the gradients of the outputs that it contributed to."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.common.bilinear import source_position
from fastseg.kernels.common.tiles import clamp_index
from fastseg.kernels.runtime.config import candidates, heuristic
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.tensors import acc_dtype
from fastseg.kernels.upsample.bilinear import (
    Taps,
    grid_of,
    hat,
    held_at,
    held_channels,
    is_flat,
    layout_of,
    owned_tile,
    rows_of,
    scale_args,
    select_for,
    tile_config,
)

# Outputs of an input pixel along a row up to which single elements keep their weights, the same in every row, in
# registers. A vector shares its weight, and computes it again: it needs the registers for loads in flight.
UNROLL_UP_TO = 16


@triton.jit
def _weight(
    o, i, size, scale, scale_rest, padding,
    MODE: tl.constexpr, S: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """w(o, i): what input ``i`` contributes to output ``o``."""
    if MODE == "kernel":
        return hat(o + padding - i * S, K, ACC)
    else:
        p = source_position(o, scale, scale_rest, MODE == "corners", ACC)
        p = tl.where(p < 0, 0.0, p)
        end = (size - 1 + 0 * i).to(ACC)
        p = tl.where(p > end, end, p)
        d = p - i.to(ACC)
        w = 1.0 - tl.where(d < 0, -d, d)
        return tl.where(w < 0, 0.0, w)


@triton.jit
def _first_output(
    i, size, out, scale, padding,
    MODE: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The first output at or after input ``i``: outputs [first(i), first(i + 1)) lie between inputs i and i + 1.

    A rounding that puts an output into the neighbouring run loses a weight of about that rounding.
    """
    if MODE == "kernel":
        o = (i + 1) * S - padding
    else:
        at = i.to(ACC)
        shift = 0.0 if MODE == "corners" else 0.5
        ratio = at * 0.0 + scale  # 0 from or to one pixel
        o = tl.where(ratio > 0, tl.ceil((at + shift) / tl.where(ratio > 0, ratio, 1.0) - shift), at).to(tl.int32)
        o = tl.where(i < size, o, out)
        o = tl.where(i < 0, 0, o)
    return clamp_index(o, out)


@triton.jit(do_not_specialize=["planes", "IH", "OH"])
def _bilinear_bwd_kernel(
    dy_ptr,
    dx_ptr,
    planes, IH, IW, OH, OW, padding, scale_h, scale_h_rest, scale_w, scale_w_rest,
    C: tl.constexpr, MODE: tl.constexpr, S: tl.constexpr, K: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    FLAT: tl.constexpr, HELD: tl.constexpr, ACC: tl.constexpr, REACH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    PIXEL: tl.constexpr = C if CHANNELS_LAST else 1
    DY_PIXEL: tl.constexpr = HELD if CHANNELS_LAST else 1
    n, row0, ix, c, place, mask = owned_tile(planes, IH, IW, C, CHANNELS_LAST, FLAT, ROWS, BLOCK_W, BLOCK_C)
    first = _first_output(ix - 1, IW, OW, scale_w, padding, MODE, S, ACC)
    end = _first_output(ix + 1, IW, OW, scale_w, padding, MODE, S, ACC)
    dy_ptr += held_at(n, OH * OW, C, HELD, CHANNELS_LAST) + (first * DY_PIXEL + c)
    dx_ptr += n * (IH * IW * PIXEL) + place

    here = tl.zeros(mask.shape, ACC)
    below = tl.zeros(mask.shape, ACC)
    for r in tl.range(-1, tl.minimum(ROWS, IH - row0), num_stages=1, loop_unroll_factor=1):
        iy = row0 + r  # row0 - 1 belongs to the strip above: only what its outputs give to row0 is kept
        here = below
        below = tl.zeros(mask.shape, ACC)
        oy0 = _first_output(iy, IH, OH, scale_h, padding, MODE, S, ACC)
        oy1 = _first_output(iy + 1, IH, OH, scale_h, padding, MODE, S, ACC)
        for q in tl.range(0, oy1 - oy0, num_stages=1, loop_unroll_factor=1):
            oy = oy0 + q
            along = tl.zeros(mask.shape, ACC)
            if UNROLL:
                for j in tl.static_range(REACH):
                    w = _weight(first + j, ix, IW, scale_w, scale_w_rest, padding, MODE, S, K, ACC)
                    inside = mask & (first + j < end) & (w > 0)
                    along += w * tl.load(dy_ptr + (oy * OW + j) * DY_PIXEL, mask=inside, other=0.0).to(ACC)
            else:
                for j in tl.range(0, REACH, num_stages=1, loop_unroll_factor=4):
                    w = _weight(first + j, ix, IW, scale_w, scale_w_rest, padding, MODE, S, K, ACC)
                    inside = mask & (first + j < end) & (w > 0)
                    along += w * tl.load(dy_ptr + (oy * OW + j) * DY_PIXEL, mask=inside, other=0.0).to(ACC)
            upper = _weight(oy, iy, IH, scale_h, scale_h_rest, padding, MODE, S, K, ACC)
            lower = _weight(oy, iy + 1, IH, scale_h, scale_h_rest, padding, MODE, S, K, ACC)
            here += tl.where(upper > 0, along * upper, 0.0)  # an output of weight 0 gives nothing, were it NaN
            below += tl.where(lower > 0, along * lower, 0.0)
        if r >= 0:
            tl.store(dx_ptr + iy * IW * PIXEL, here.to(dx_ptr.dtype.element_ty), mask=mask)


def bilinear_bwd(dy: Tensor, size: tuple[int, int], taps: Taps, channels_last: bool) -> Tensor:
    """dy (N, C, OH, OW) dense, or a slice of the channels of a dense map -> dx (N, C, IH, IW) in the same format."""
    N, C, OH, OW = dy.shape
    IH, IW = size
    dx = torch.empty(N, C, IH, IW, dtype=dy.dtype, device=dy.device, memory_format=layout_of(channels_last))
    if dx.numel() == 0:
        return dx
    cfg = select_for("bilinear_bwd", dx, channels_last)
    grid, planes, flat = grid_of(dx, channels_last, cfg)
    reach = taps.reach(IW, OW, 1)
    held = held_channels(dy, channels_last)
    by_channel = channels_last or held != C
    unroll = reach <= UNROLL_UP_TO and (flat or not channels_last)
    launch(
        _bilinear_bwd_kernel, grid,
        dy, dx, planes, IH, IW, OH, OW, taps.padding, *scale_args(taps),
        C=C if by_channel else 1, MODE=taps.mode, S=taps.stride, K=taps.kernel, CHANNELS_LAST=channels_last,
        FLAT=flat, HELD=held if by_channel else 1, ACC=acc_dtype(dy), REACH=reach, UNROLL=unroll, **cfg.launch,
    )  # fmt: skip
    return dx


@heuristic("bilinear_bwd")
def _bwd_config(size: int, C: int, W: int, dtype: torch.dtype) -> dict[str, int]:
    """Vectors of channels: as forward. Single elements: one a thread, so that a warp's loads touch the fewest lines."""
    elements, per_thread = (1024, 32 // dtype.itemsize) if C and not is_flat(C, dtype) else (256, 1)
    return tile_config(elements, per_thread, rows_of(size, elements, 1024), C, W, dtype)


@candidates("bilinear_bwd")
def _bwd_candidates(size: int, C: int, W: int, dtype: torch.dtype) -> list[dict[str, int]]:
    vectors = C and not is_flat(C, dtype)
    tiles = [(512, 8), (1024, 8), (1024, 16)] if vectors else [(128, 1), (256, 1), (256, 2), (512, 2)]
    return [tile_config(*tile, rows, C, W, dtype) for tile in tiles for rows in (1, 2, 4, 8)]
