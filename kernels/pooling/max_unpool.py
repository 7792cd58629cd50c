"""Max unpooling as a gather, and the kernels of max pooling's gradients.

    spread (windows -> cells)   y[cell] = v[window] where the window's index names the cell, else 0
                                forward of unpooling: of several windows that name one cell, the last wins, as on a CPU;
                                backward of pooling: their values are summed
    pick (cells -> windows)     dx[window] = dy[cell that the index names], 0 outside the plane
                                backward of unpooling, and tangent of pooling

A program of the spread owns stride x stride cells for each of its windows and writes each once: no memset, no atomics,
the same bits at every run. Where windows overlap it reads the neighbours that reach into its cells from the cache.
Traffic in elements, hi cells and lo windows: hi + lo, and lo indices of 8 bytes or lo codes of 1/4, 1/2 or 1 byte.

A code cannot leave its window. An int64 index can: it may name any cell, one of another window (if the output is not of
the pooling's input size), or none at all. Each program of the spread reports what the indices of its windows do, and a
second kernel of a few blocks reads the report. It usually ends there. If an index names a foreign cell, a program of it
takes some planes at a time: for each cell it finds the last window that names it, by a maximum of window numbers, which
no order changes, and then the windows that came out write their cells. Each pass is parallel over the plane; with the
maxima, 4 bytes for each cell of the planes in work, it moves at most 3 times as much again. An index outside the plane
is never used as an address.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.pooling.windows import INT64, UNROLLED, Pooling, grid_rows, load_index, new_map
from fastseg.kernels.runtime.ceilings import chip_of
from fastseg.kernels.runtime.config import heuristic, select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv
from fastseg.kernels.runtime.tensors import acc_dtype

LOCAL, FOREIGN, INVALID = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what a program reports of its indices


@triton.jit
def _window(
    v_ptr, index_ptr, image, z, y, x, channel, mask_m, offs_l, C, OD, OH, OW,
    CHANNELS_LAST: tl.constexpr, BITS: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Windows (z, y, x): values, indices, and which of them exist."""
    row_ok = mask_m & (z >= 0) & (z < OD) & (y >= 0) & (y < OH)
    if CHANNELS_LAST:
        row_ok = row_ok & (x >= 0) & (x < OW)
        ok = row_ok & (channel < C)
    else:
        ok = row_ok & (x >= 0) & (x < OW)
    step = C if CHANNELS_LAST else 1
    offs = image * (OD * OH * OW).to(tl.int64) * step + (((z * OH + y) * OW + x) * step + channel)
    v = tl.load(v_ptr + offs, mask=ok, other=0.0).to(ACC)
    index = load_index(
        index_ptr, offs, image, z, y, x, channel, row_ok, ok, C, OD, OH, OW, CHANNELS_LAST, BITS, ALIGNED,
        BLOCK_M, BLOCK_L,
    )  # fmt: skip
    return v, index, ok


@triton.jit
def _cell(
    cell, v, index, owned, v_ptr, index_ptr, image, qd, qh, qw, channel, mask_m, mask, offs_l, C, D, H, W, OD, OH, OW,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, LD: tl.constexpr, LH: tl.constexpr, LW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BITS: tl.constexpr, DISJOINT: tl.constexpr, SUM: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One of the cells that windows (qd, qh, qw) own: -> its value, its place in the plane, whether it is inside."""
    iz, iy, ix = cell // (SH * SW), cell // SW % SH, cell % SW
    d, h, w = qd * SD - PD + iz, qh * SH - PH + iy, qw * SW - PW + ix
    flat = (d * H + h) * W + w
    inside = mask & (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    FLAT: tl.constexpr = BITS == INT64
    if DISJOINT:
        hit = owned & (index == (flat if FLAT else (iz * KH + iy) * KW + ix))
        y = tl.where(hit & (iz < KD) & (iy < KH) & (ix < KW), v, 0.0)
    else:
        y = tl.zeros((BLOCK_M, BLOCK_L), ACC)
        TAPS: tl.constexpr = KD * KH * KW
        for back in range(TAPS):  # not unrolled: inside the unrolled loop over cells that crashes Triton 3.6
            tap = TAPS - 1 - back  # the last tap belongs to the first window
            # Window q + a / S has the cell as its tap i where a = cell - i L is a multiple of S; lifted above 0.
            az = iz + KD * LD * SD - tap // (KH * KW) * LD
            ay = iy + KH * LH * SH - tap // KW % KH * LH
            ax = ix + KW * LW * SW - tap % KW * LW
            if (az % SD == 0) & (ay % SH == 0) & (ax % SW == 0):
                v_tap, index_tap, ok = _window(
                    v_ptr, index_ptr, image, qd + az // SD - KD * LD, qh + ay // SH - KH * LH, qw + ax // SW - KW * LW,
                    channel, mask_m, offs_l, C, OD, OH, OW, CHANNELS_LAST, BITS, False, ACC, BLOCK_M, BLOCK_L,
                )  # fmt: skip
                hit = ok & (index_tap == (flat if FLAT else tap))
                y = tl.where(hit, y + v_tap if SUM else v_tap, y)
    return y, flat, inside


@triton.jit(do_not_specialize=["rows", "H", "W", "OH", "OW", "QH", "QW"])
def _max_unpool_fwd_kernel(
    v_ptr, index_ptr,
    rows, inner, C, D, H, W, OD, OH, OW, QD, QH, QW,
    y_ptr, report_ptr,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, LD: tl.constexpr, LH: tl.constexpr, LW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BITS: tl.constexpr, DISJOINT: tl.constexpr, SUM: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    row0 = tl.program_id(0) * BLOCK_M  # a map has fewer than 2^31 rows
    offs_m, offs_l = row0 + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    mask_m = (offs_m < rows)[:, None]
    mask = mask_m & (offs_l < inner)[None, :]
    image, qd, qh, qw, channel = grid_rows(offs_m, offs_l, QD, QH, QW, CHANNELS_LAST)
    step = C if CHANNELS_LAST else 1
    base = image * (D * H * W).to(tl.int64) * step
    FLAT: tl.constexpr = BITS == INT64
    TAPS: tl.constexpr = KD * KH * KW
    CELLS: tl.constexpr = SD * SH * SW
    v, owned = tl.zeros((BLOCK_M, BLOCK_L), ACC), mask
    index = v.to(tl.int32)
    if DISJOINT or FLAT:  # overlapping windows are loaded cell by cell
        v, index, owned = _window(
            v_ptr, index_ptr, image, qd, qh, qw, channel, mask_m, offs_l, C, OD, OH, OW, CHANNELS_LAST, BITS, True,
            ACC, BLOCK_M, BLOCK_L,
        )  # fmt: skip

    if CHANNELS_LAST or SW != 2:
        for cell in tl.range(0, CELLS, loop_unroll_factor=CELLS if CELLS <= UNROLLED else 1):
            y, flat, inside = _cell(
                cell, v, index, owned, v_ptr, index_ptr, image, qd, qh, qw, channel, mask_m, mask, offs_l, C, D, H, W,
                OD, OH, OW, KD, KH, KW, SD, SH, SW, PD, PH, PW, LD, LH, LW, CHANNELS_LAST, BITS, DISJOINT, SUM, ACC,
                BLOCK_M, BLOCK_L,
            )  # fmt: skip
            tl.store(y_ptr + base + (flat * step + channel), y.to(y_ptr.dtype.element_ty), mask=inside)
    else:  # two cells a window along the line: side by side they fill whole vectors
        for line in tl.range(0, SD * SH, loop_unroll_factor=SD * SH if CELLS <= UNROLLED else 1):
            left, _, _ = _cell(
                2 * line, v, index, owned, v_ptr, index_ptr, image, qd, qh, qw, channel, mask_m, mask, offs_l, C, D, H,
                W, OD, OH, OW, KD, KH, KW, SD, SH, SW, PD, PH, PW, LD, LH, LW, CHANNELS_LAST, BITS, DISJOINT, SUM, ACC,
                BLOCK_M, BLOCK_L,
            )  # fmt: skip
            right, _, _ = _cell(
                2 * line + 1, v, index, owned, v_ptr, index_ptr, image, qd, qh, qw, channel, mask_m, mask, offs_l, C, D,
                H, W, OD, OH, OW, KD, KH, KW, SD, SH, SW, PD, PH, PW, LD, LH, LW, CHANNELS_LAST, BITS, DISJOINT, SUM,
                ACC, BLOCK_M, BLOCK_L,
            )  # fmt: skip
            d, h = qd * SD - PD + line // SH, qh * SH - PH + line % SH
            w = (tl.program_id(1) * (2 * BLOCK_L) + tl.arange(0, 2 * BLOCK_L) - PW)[None, :]
            inside = mask_m & (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            y = tl.interleave(left, right).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + base + ((d * H + h) * W + w), y, mask=inside)

    if FLAT and not SUM:
        local = tl.zeros((BLOCK_M, BLOCK_L), tl.int1)
        for tap in tl.range(0, TAPS, loop_unroll_factor=TAPS if TAPS <= UNROLLED else 1):
            d, h = qd * SD - PD + tap // (KH * KW) * LD, qh * SH - PH + tap // KW % KH * LH
            w = qw * SW - PW + tap % KW * LW
            inside = (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            local = local | (inside & (index == (d * H + h) * W + w))
        invalid = owned & ((index < 0) | (index >= D * H * W))
        kind = tl.where(_any(owned & ~local), FOREIGN, LOCAL)
        kind = tl.where(_any(invalid), INVALID, kind)
        tl.store(report_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), kind)


@triton.jit
def _any(mask):
    return tl.sum(tl.sum(mask.to(tl.int32), axis=1), axis=0) > 0


@triton.jit(do_not_specialize=["reports", "planes", "cells", "windows"])
def _max_unpool_fwd_foreign_kernel(
    v_ptr, index_ptr, report_ptr,
    reports, planes, C, cells, windows,
    y_ptr, valid_ptr, last_ptr,
    CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    foreign, invalid = tl.zeros((BLOCK_R,), tl.int32), tl.zeros((BLOCK_R,), tl.int32)
    for r in range(0, reports, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        kind = tl.load(report_ptr + offs_r, mask=offs_r < reports, other=0)
        foreign += (kind != LOCAL).to(tl.int32)
        invalid += (kind == INVALID).to(tl.int32)
    if tl.program_id(0) == 0:
        tl.store(valid_ptr, (tl.sum(invalid, axis=0) == 0).to(tl.int32))
    if tl.sum(foreign, axis=0) > 0:
        lanes, offs_m = tl.arange(0, BLOCK_L)[None, :], tl.arange(0, BLOCK_M)[:, None]
        own_ptr = last_ptr + (tl.program_id(0).to(tl.int64) * cells * BLOCK_L + lanes)
        for first in range(tl.program_id(0) * BLOCK_L, planes, tl.num_programs(0) * BLOCK_L):
            plane = first + lanes
            if CHANNELS_LAST:
                image, channel, step = (plane // C).to(tl.int64), plane % C, C
            else:
                image, channel, step = plane.to(tl.int64), plane * 0, 1
            v_base, y_base = image * windows * step + channel, image * cells * step + channel
            for m in range(0, cells, BLOCK_M):
                none = tl.full((BLOCK_M, BLOCK_L), -1, tl.int32)
                tl.store(own_ptr + (m + offs_m).to(tl.int64) * BLOCK_L, none, mask=m + offs_m < cells)
            tl.debug_barrier()
            for m in range(0, windows, BLOCK_M):
                window = m + offs_m + lanes * 0
                mask = (window < windows) & (plane < planes)
                index = tl.load(index_ptr + v_base + window.to(tl.int64) * step, mask=mask, other=-1)
                tl.atomic_max(own_ptr + index * BLOCK_L, window, mask=(index >= 0) & (index < cells))
            tl.debug_barrier()
            for m in range(0, windows, BLOCK_M):
                window = m + offs_m + lanes * 0
                mask = (window < windows) & (plane < planes)
                at = v_base + window.to(tl.int64) * step
                index = tl.load(index_ptr + at, mask=mask, other=-1)
                inside = (index >= 0) & (index < cells)
                # from the L2, where the maxima are made
                last = tl.load(own_ptr + index * BLOCK_L, mask=inside, other=-1, cache_modifier=".cg")
                wins = inside & (last == window)
                tl.store(y_ptr + y_base + index * step, tl.load(v_ptr + at, mask=wins, other=0.0), mask=wins)
            tl.debug_barrier()  # before the next planes' maxima take the place of these


@triton.jit(do_not_specialize=["rows", "H", "W", "OH", "OW"])
def _max_unpool_bwd_kernel(
    dy_ptr, index_ptr,
    dx_ptr,
    rows, inner, C, D, H, W, OD, OH, OW,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, LD: tl.constexpr, LH: tl.constexpr, LW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    row0 = tl.program_id(0) * BLOCK_M  # a map has fewer than 2^31 rows
    offs_m, offs_l = row0 + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    mask_m = (offs_m < rows)[:, None]
    mask = mask_m & (offs_l < inner)[None, :]
    image, z, y, x, channel = grid_rows(offs_m, offs_l, OD, OH, OW, CHANNELS_LAST)
    step = C if CHANNELS_LAST else 1
    offs = image * (OD * OH * OW).to(tl.int64) * step + (((z * OH + y) * OW + x) * step + channel)
    index = load_index(
        index_ptr, offs, image, z, y, x, channel, mask_m, mask, C, OD, OH, OW, CHANNELS_LAST, BITS, True,
        BLOCK_M, BLOCK_L,
    )  # fmt: skip
    if BITS == INT64:
        ok = mask & (index >= 0) & (index < D * H * W)
        cell = index
    else:
        d, h = z * SD - PD + index // (KH * KW) * LD, y * SH - PH + index // KW % KH * LH
        w = x * SW - PW + index % KW * LW
        ok = mask & (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        cell = (d * H + h) * W + w
    at = dy_ptr + image * (D * H * W).to(tl.int64) * step + (cell * step + channel)
    tl.store(dx_ptr + offs, tl.load(at, mask=ok, other=0.0), mask=mask)


def max_unpool_fwd(
    v: Tensor, index: Tensor, pool: Pooling, bits: int, *, add: bool = False
) -> tuple[Tensor, Tensor | None]:
    """v (N, C, *pool.out), its index -> y (N, C, *pool.size); for int64 indices whether all are inside, (1,) int32.

    ``add``: windows that share a cell are summed; their indices are a pooling's own, and are not reported on.
    """
    y = new_map(v, pool, pool.size)
    rows, inner = pool.rows(pool.windows)
    cfg = select(
        "max_unpool_fwd",
        size=y.numel(),
        device=v.device,
        dtype=v.dtype,
        inner=inner,
        last=pool.channels_last,
        bits=bits,
    )
    grid = cdiv(rows, cfg.BLOCK_M), cdiv(inner, cfg.BLOCK_L)
    checked = bits == INT64.value and not add
    report = v.new_empty(grid if checked else 0, dtype=torch.int32)
    launch(
        _max_unpool_fwd_kernel, grid,
        v, index, rows, inner, pool.C, *pool.size, *pool.out, *pool.windows, y, report if checked else y,
        **pool.constants, BITS=bits, DISJOINT=pool.disjoint, SUM=add, ACC=acc_dtype(v), **cfg.launch,
    )  # fmt: skip
    if not checked:
        return y, None
    valid = v.new_empty(1, dtype=torch.int32)
    planes, cells = pool.N * pool.C, math.prod(pool.size)
    cfg = select("max_unpool_fwd_foreign", size=planes, device=v.device, last=pool.channels_last)
    # each with maxima of its own: at most 4 bytes for each cell
    programs = min(cdiv(planes, cfg.BLOCK_L), chip_of(v.device).multiprocessors)
    launch(
        _max_unpool_fwd_foreign_kernel, (programs,),
        v, index, report, report.numel(), planes, pool.C, cells, math.prod(pool.out),
        y, valid, v.new_empty(programs * cells * cfg.BLOCK_L, dtype=torch.int32),
        CHANNELS_LAST=pool.channels_last, **cfg.launch,
    )  # fmt: skip
    return y, valid


def max_unpool_bwd(dy: Tensor, index: Tensor, pool: Pooling, bits: int) -> Tensor:
    """dy (N, C, *pool.size), the windows' index -> dx (N, C, *pool.out)."""
    dx = new_map(dy, pool, pool.out)
    rows, inner = pool.window_rows
    cfg = select(
        "max_unpool_bwd",
        size=dx.numel(),
        device=dy.device,
        dtype=dy.dtype,
        inner=inner,
        last=pool.channels_last,
        bits=bits,
    )
    launch(
        _max_unpool_bwd_kernel, (cdiv(rows, cfg.BLOCK_M), cdiv(inner, cfg.BLOCK_L)),
        dy, index, dx, rows, inner, pool.C, *pool.size, *pool.out,
        **pool.constants, BITS=bits, **cfg.launch,
    )  # fmt: skip
    return dx


@heuristic("max_unpool_fwd_foreign")
def _foreign_config(size: int, last: bool) -> dict[str, int]:
    """1024 windows at a time; channels innermost, four planes are a sector of indices. As a rule the kernel reads the
    report and ends."""
    lanes = 4 if last else 1
    return {"BLOCK_R": 1024, "BLOCK_M": 1024 // lanes, "BLOCK_L": lanes, "num_warps": 8}
