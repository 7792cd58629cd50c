"""Batch statistics: mean and variance of each channel over images and pixels, without cancellation.

    mean = sum(z) / M,   var = sum((z - mean)^2) / M,   M = N*H*W

One kernel reads the map once and writes a pair (mean, squared deviations) per tile. A second merges the pairs by Chan's
formula in a fixed order: no atomics, the same bits each time. A convolution of ours writes the pairs itself while the
tile is in registers; only the merge is left. The map is walked as in ``fwd.py``, in either layout. Traffic in elements:
MC, and 2 C tiles. One kernel for both would need a program per channel that sees the whole map: too few programs, and
in NHWC one element used per line of memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.batch_norm.fwd import Walk, tile_of
from fastseg.kernels.common.norm_act import where_all
from fastseg.kernels.common.tiles import tile_and_block
from fastseg.kernels.runtime.config import candidates, heuristic, select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv
from fastseg.kernels.runtime.tensors import acc_dtype, stats_dtype


@triton.jit
def _pixels_before(step, blocks, pixels, BLOCK_M: tl.constexpr):
    """How many pixels of the batch lie in blocks before ``step``."""
    in_image = tl.minimum((step % blocks).to(tl.int64) * BLOCK_M, pixels)
    return (step // blocks).to(tl.int64) * pixels + in_image


@triton.jit(do_not_specialize=["blocks", "total", "steps"])
def _batch_norm_tile_stats_kernel(
    z_ptr,
    tile_stats_ptr, counts_ptr,
    pixels, blocks, total, steps,
    C: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid, block = tile_and_block(tl.cdiv(C, BLOCK_C))
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    # All programs measure from one pixel, so that their means differ by what fp32 resolves, however large the mean; and
    # each sums about its first block's mean, which does not cancel: the block is one of those it sums over.
    at_origin = offs_c if LAST else offs_c.to(tl.int64) * pixels
    origin = tl.load(z_ptr + at_origin, mask=mask_c, other=0.0).to(ACC)
    start, offs, inside = tile_of(pid * steps, blocks, pixels, offs_c, C, LAST, BLOCK_M)
    mask = inside[:, None] & mask_c[None, :]
    first = tl.load(z_ptr + start + offs, mask=mask, other=0.0).to(ACC)
    first = tl.where(mask, first - origin[None, :], 0.0)
    pivot = tl.sum(first, axis=0) / tl.sum(inside.to(ACC), axis=0)
    sum_d, sum_dd = tl.zeros((BLOCK_M, BLOCK_C), ACC), tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for s in range(0, steps):
        start, offs, inside = tile_of(pid * steps + s, blocks, pixels, offs_c, C, LAST, BLOCK_M)
        inside = where_all(inside, pid * steps + s < total)
        mask = inside[:, None] & mask_c[None, :]
        z = tl.load(z_ptr + start + offs, mask=mask, other=0.0).to(ACC)
        d = tl.where(mask, z - origin[None, :] - pivot[None, :], 0.0)
        sum_d += d
        sum_dd += d * d
    end = tl.minimum(pid * steps + steps, total)  # of blocks, no data
    n = (_pixels_before(end, blocks, pixels, BLOCK_M) - _pixels_before(pid * steps, blocks, pixels, BLOCK_M)).to(ACC)
    shift = tl.sum(sum_d, axis=0) / n
    at = tile_stats_ptr + pid.to(tl.int64) * 2 * C + offs_c
    tl.store(at, pivot + shift, mask=mask_c)
    tl.store(at + C, tl.sum(sum_dd, axis=0) - shift * shift * n, mask=mask_c)
    if block == 0:
        tl.store(counts_ptr + pid, n)


@triton.jit(do_not_specialize=["tiles"])
def _batch_stats_kernel(
    tile_stats_ptr, counts_ptr, origin_ptr,
    stats_ptr,
    tiles, origin_stride,
    C: tl.constexpr, HAS_ORIGIN: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    pivot = tl.load(tile_stats_ptr + offs_c, mask=mask_c, other=0.0)  # sums of differences do not cancel
    total = tl.zeros((1,), ACC)
    sum_d = tl.zeros((BLOCK_C,), ACC)
    for t in range(0, tiles, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = (offs_t < tiles)[:, None] & mask_c[None, :]
        count = tl.load(counts_ptr + offs_t, mask=offs_t < tiles, other=0.0)
        mean_t = tl.load(tile_stats_ptr + offs_t[:, None].to(tl.int64) * 2 * C + offs_c[None, :], mask=mask, other=0.0)
        total += tl.sum(count, axis=0)
        sum_d += tl.sum(count[:, None] * (mean_t - pivot[None, :]), axis=0)
    mean = pivot + sum_d / total
    m2 = tl.zeros((BLOCK_C,), ACC)
    for t in range(0, tiles, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = (offs_t < tiles)[:, None] & mask_c[None, :]
        count = tl.load(counts_ptr + offs_t, mask=offs_t < tiles, other=0.0)
        row = offs_t[:, None].to(tl.int64) * 2 * C + offs_c[None, :]
        d = tl.load(tile_stats_ptr + row, mask=mask, other=0.0) - mean[None, :]
        m2 += tl.sum(tl.load(tile_stats_ptr + row + C, mask=mask, other=0.0) + count[:, None] * d * d, axis=0)
    if HAS_ORIGIN:
        mean += tl.load(origin_ptr + offs_c.to(tl.int64) * origin_stride, mask=mask_c, other=0.0).to(ACC)
    tl.store(stats_ptr + offs_c, mean, mask=mask_c)
    tl.store(stats_ptr + C + offs_c, m2 / total, mask=mask_c)
    tl.store(stats_ptr + 2 * C + offs_c, m2 / (total - 1.0), mask=mask_c)


def batch_stats(tile_stats: Tensor, counts: Tensor, origin: Tensor | None = None, origin_stride: int = 1) -> Tensor:
    """(tiles, 2, C) means and squared deviations of tiles, (tiles,) rows in each -> (3, C): mean, var, unbiased var.

    ``origin``: what the means are measured from, one element for each channel, ``origin_stride`` apart.
    """
    tiles, _, C = tile_stats.shape
    stats = tile_stats.new_empty(3, C)
    cfg = select("batch_stats", size=tiles, device=stats.device, C=C)
    acc = acc_dtype(stats)
    launch(
        _batch_stats_kernel,
        (cdiv(C, cfg.BLOCK_C),),
        tile_stats,
        counts,
        tile_stats if origin is None else origin,
        stats,
        tiles,
        origin_stride,
        C=C,
        HAS_ORIGIN=origin is not None,
        ACC=acc,
        **cfg.launch,
    )
    return stats


def batch_norm_stats(z: Tensor) -> Tensor:
    """z (N, C, H, W) in NHWC or NCHW memory -> (3, C): mean, var, unbiased var; for a z that no kernel of ours made."""
    C, walk = z.shape[1], Walk.of(z)
    if z.numel() == 0:
        return torch.zeros(3, C, dtype=stats_dtype(z), device=z.device)
    cfg = select("batch_norm_tile_stats", **walk.key(z))
    blocks, total, steps, tiles = walk.reduction(cfg)
    tile_stats = torch.empty(tiles, 2, C, dtype=stats_dtype(z), device=z.device)
    counts = tile_stats.new_empty(tiles)
    launch(
        _batch_norm_tile_stats_kernel, (tiles * cdiv(C, cfg.BLOCK_C),),
        z, tile_stats, counts, walk.pixels, blocks, total, steps,
        C=C, LAST=walk.last, ACC=acc_dtype(z), **cfg.launch,
    )  # fmt: skip
    return batch_stats(tile_stats, counts, z, 1 if walk.last else walk.pixels)


@heuristic("batch_stats")
def _batch_stats_config(size: int, C: int) -> dict[str, int]:
    """32 channels are one 128-byte line of fp32; 64 tiles in flight hide the latency of the next."""
    return {"BLOCK_T": 64 if size > 32 else 32, "BLOCK_C": 32, "num_warps": 4}


@candidates("batch_stats")
def _batch_stats_candidates(size: int, C: int) -> list[dict[str, int]]:
    return [{"BLOCK_T": t, "BLOCK_C": c, "num_warps": 4} for t in (32, 64, 128) for c in (8, 16, 32)]
