"""Batch normalisation + activation (+ residual) over rows of channels, and the statistics it rests on.

    forward    y = act((z - mean) rstd weight + bias) + residual,     z, y, residual: (M, C), M = N*H*W, NHWC
    backward   g = dy act'(norm(z)),   dbias = sum(g),   dweight = sum(g zhat)

Statistics arrive as one (mean, squared deviations) pair per tile, written by the kernel that produced z while the tile
was in registers, and are merged here by Chan's formula in a fixed order: no second read of z, no atomics. For a z of
another library's convolution a kernel here reads it once and writes the pairs.
Traffic in elements: forward 2MC (3MC with a residual); reduce of the backward 2MC; statistics 2 C tiles (and MC).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.common import activate_grad, load_norm, norm_act, store_tile_sums
from fastseg.kernels.config import candidates, heuristic, launch, select


class Norm(NamedTuple):
    """One batch norm as a kernel sees it: vectors of C elements. ``weight`` and ``bias``: both or neither."""

    mean: Tensor
    var: Tensor  # biased
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    batch_stats: bool  # mean and var were taken from this batch: the gradient flows through them


def norm_args(norm: Norm | None, dummy: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, float], bool, bool]:
    """-> (weight, bias, mean, var, eps) for a kernel, NORM, AFFINE; ``dummy`` stands for a pointer nobody reads."""
    if norm is None:
        return (dummy, dummy, dummy, dummy, 0.0), False, False
    affine = norm.weight is not None
    return (
        (norm.weight if affine else dummy, norm.bias if affine else dummy, norm.mean, norm.var, norm.eps),
        True,
        affine,
    )


def acc_dtype(x: Tensor) -> tl.dtype:
    """Sums are fp32; fp64 for fp64 input, which only the interpreter runs (gradcheck)."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def stats_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums kept for maps like ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@triton.jit
def _batch_norm_tile_stats_kernel(
    z_ptr,
    tile_stats_ptr, counts_ptr,
    M, rows,
    C: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0)
    row0 = pid_m.to(tl.int64) * rows
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_m = tl.arange(0, BLOCK_M)
    mask_c = offs_c < C
    here = tl.minimum(rows, (M - row0).to(tl.int32))  # a number of rows, no data
    # All programs measure from one row, so that their means differ by what fp32 resolves, however large the mean; and
    # each sums about its first block's mean, which does not cancel: the block is one of those it sums over.
    origin = tl.load(z_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)
    mask = (offs_m < here)[:, None] & mask_c[None, :]
    first = tl.load(z_ptr + row0 * C + offs_m[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(ACC)
    count = here.to(ACC)
    first = tl.where(mask, first - origin[None, :], 0.0)
    pivot = tl.sum(first, axis=0) / tl.where(here < BLOCK_M, count, BLOCK_M)
    sum_d, sum_dd = tl.zeros((BLOCK_M, BLOCK_C), ACC), tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for m in range(0, rows, BLOCK_M):
        mask = (m + offs_m < here)[:, None] & mask_c[None, :]
        z = tl.load(z_ptr + (row0 + m) * C + offs_m[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        d = tl.where(mask, z - origin[None, :] - pivot[None, :], 0.0)
        sum_d += d
        sum_dd += d * d
    shift = tl.sum(sum_d, axis=0) / count
    at = tile_stats_ptr + pid_m.to(tl.int64) * 2 * C + offs_c
    tl.store(at, pivot + shift, mask=mask_c)
    tl.store(at + C, tl.sum(sum_dd, axis=0) - shift * shift * count, mask=mask_c)
    if tl.program_id(1) == 0:
        tl.store(counts_ptr + pid_m, count)


@triton.jit
def _batch_stats_kernel(
    tile_stats_ptr, counts_ptr, origin_ptr,
    stats_ptr,
    tiles,
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
        mean += tl.load(origin_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)
    tl.store(stats_ptr + offs_c, mean, mask=mask_c)
    tl.store(stats_ptr + C + offs_c, m2 / total, mask=mask_c)
    tl.store(stats_ptr + 2 * C + offs_c, m2 / (total - 1.0), mask=mask_c)


@triton.jit
def _batch_norm_act_fwd_kernel(
    z_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, residual_ptr,
    y_ptr,
    M, eps,
    C: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_m = tl.arange(0, BLOCK_M)
    mask_c = offs_c < C
    mask = (row0 + offs_m < M)[:, None] & mask_c[None, :]
    offs = offs_m[:, None] * C + offs_c[None, :]  # (BLOCK_M, BLOCK_C), from row0

    z = tl.load(z_ptr + row0 * C + offs, mask=mask, other=0.0).to(ACC)
    y = norm_act(z, weight_ptr, bias_ptr, mean_ptr, var_ptr, offs_c, mask_c, eps, True, AFFINE, ACT, ACC)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + row0 * C + offs, mask=mask, other=0.0).to(ACC)
    tl.store(y_ptr + row0 * C + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _batch_norm_act_bwd_reduce_kernel(
    dy_ptr, z_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    sums_ptr,
    M, rows, eps,
    C: tl.constexpr, NORM: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0)
    row0 = pid_m.to(tl.int64) * rows
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_m = tl.arange(0, BLOCK_M)
    mask_c = offs_c < C
    if NORM:
        mean, rstd, weight, bias = load_norm(weight_ptr, bias_ptr, mean_ptr, var_ptr, offs_c, mask_c, eps, AFFINE, ACC)
    sum_g = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    sum_gz = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for m in range(0, rows, BLOCK_M):
        mask_m = (m + offs_m < rows) & (row0 + m + offs_m < M)
        mask = mask_m[:, None] & mask_c[None, :]
        offs = (row0 + m) * C + offs_m[:, None] * C + offs_c[None, :]
        g = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(ACC)
        if NORM:
            zhat = (tl.load(z_ptr + offs, mask=mask, other=0.0).to(ACC) - mean[None, :]) * rstd[None, :]
            g = activate_grad(g, zhat * weight[None, :] + bias[None, :], ACT)
            sum_gz += g * zhat
        elif ACT != "none":
            g = activate_grad(g, tl.load(z_ptr + offs, mask=mask, other=0.0).to(ACC), ACT)
        sum_g += g
    store_tile_sums(sum_g, sum_gz, offs_m < BLOCK_M, pid_m, sums_ptr, offs_c, mask_c, C)


def batch_stats(tile_stats: Tensor, counts: Tensor, origin: Tensor | None = None) -> Tensor:
    """(tiles, 2, C) means and squared deviations of tiles, (tiles,) rows in each -> (3, C): mean, var, unbiased var.

    ``origin``: its first C elements are what the means are measured from.
    """
    tiles, _, C = tile_stats.shape
    stats = tile_stats.new_empty(3, C)
    cfg = select("batch_stats", size=tiles, device=stats.device, C=C)
    acc = acc_dtype(stats)
    launch(
        _batch_stats_kernel,
        (triton.cdiv(C, cfg.BLOCK_C),),
        tile_stats,
        counts,
        tile_stats if origin is None else origin,
        stats,
        tiles,
        C=C,
        HAS_ORIGIN=origin is not None,
        ACC=acc,
        **cfg.launch,
    )
    return stats


def batch_norm_stats(z: Tensor) -> Tensor:
    """z (N, C, H, W) in NHWC memory -> (3, C): mean, var, unbiased var; for a z that no kernel of ours has made."""
    N, C, H, W = z.shape
    M = N * H * W
    cfg = select("batch_norm_tile_stats", size=M, device=z.device, C=C, dtype=z.dtype)
    blocks_c = triton.cdiv(C, cfg.BLOCK_C)
    rows = rows_per_program(M, cfg.BLOCK_M, blocks_c)
    tiles = triton.cdiv(M, rows)
    tile_stats = torch.empty(tiles, 2, C, dtype=stats_dtype(z), device=z.device)
    counts = tile_stats.new_empty(tiles)
    launch(
        _batch_norm_tile_stats_kernel, (tiles, blocks_c),
        z, tile_stats, counts, M, rows, C=C, ACC=acc_dtype(z), **cfg.launch,
    )  # fmt: skip
    return batch_stats(tile_stats, counts, z)


def batch_norm_act_fwd(z: Tensor, norm: Norm, act: str, residual: Tensor | None) -> Tensor:
    """z (N, C, H, W) in NHWC memory, residual the same or None -> y: the same."""
    y = torch.empty_like(z)
    N, C, H, W = z.shape
    M = N * H * W
    args, _, affine = norm_args(norm, z)
    *vectors, eps = args
    cfg = select("batch_norm_act_fwd", size=M, device=z.device, C=C, dtype=z.dtype)
    launch(
        _batch_norm_act_fwd_kernel, (triton.cdiv(M, cfg.BLOCK_M), triton.cdiv(C, cfg.BLOCK_C)),
        z, *vectors, z if residual is None else residual, y, M, eps,
        C=C, AFFINE=affine, ACT=act, HAS_RESIDUAL=residual is not None, ACC=acc_dtype(z), **cfg.launch,
    )  # fmt: skip
    return y


def batch_norm_act_bwd_reduce(dy: Tensor, z: Tensor, norm: Norm | None, act: str) -> Tensor:
    """dy, z (N, C, H, W) in NHWC memory -> (2, C): sum(g), sum(g zhat); the second row is 0 without a norm."""
    N, C, H, W = dy.shape
    M = N * H * W
    args, has_norm, affine = norm_args(norm, dy)
    *vectors, eps = args
    cfg = select("batch_norm_act_bwd_reduce", size=M, device=dy.device, C=C, dtype=dy.dtype)
    blocks_c = triton.cdiv(C, cfg.BLOCK_C)
    rows = rows_per_program(M, cfg.BLOCK_M, blocks_c)
    tiles = triton.cdiv(M, rows)
    sums = torch.empty(tiles, 2, C, dtype=stats_dtype(dy), device=dy.device)
    launch(
        _batch_norm_act_bwd_reduce_kernel, (tiles, blocks_c),
        dy, z, *vectors, sums, M, rows, eps,
        C=C, NORM=has_norm, AFFINE=affine, ACT=act, ACC=acc_dtype(dy), **cfg.launch,
    )  # fmt: skip
    return sums.sum(0)


PROGRAMS = 1024  # of a reduction: about 8 for each SM of an H200, and few enough that their partial sums stay small


def rows_per_program(M: int, block: int, others: int) -> int:
    """Rows that each program of a reduction walks, a multiple of ``block``; ``others``: programs on the other axes."""
    return triton.cdiv(triton.cdiv(M, max(PROGRAMS // others, 1)), block) * block


@heuristic("batch_stats")
def _batch_stats_config(size: int, C: int) -> dict[str, int]:
    """32 channels are one 128-byte line of fp32; 64 tiles in flight hide the latency of the next."""
    return {"BLOCK_T": min(64, triton.next_power_of_2(size)), "BLOCK_C": 32, "num_warps": 4}


@heuristic("batch_norm_act_fwd")
@heuristic("batch_norm_act_bwd_reduce")
@heuristic("batch_norm_tile_stats")
def _rows_config(size: int, C: int, dtype: torch.dtype) -> dict[str, int]:
    """4096 elements a program: 32 a thread, so that each thread has several 16-byte loads in flight."""
    block_c = min(64, max(16, triton.next_power_of_2(C)))
    return {"BLOCK_M": 4096 // block_c, "BLOCK_C": block_c, "num_warps": 4}


@candidates("batch_norm_act_fwd")
@candidates("batch_norm_act_bwd_reduce")
@candidates("batch_norm_tile_stats")
def _rows_candidates(size: int, C: int, dtype: torch.dtype) -> list[dict[str, int]]:
    return [
        {"BLOCK_M": elements // c, "BLOCK_C": c, "num_warps": warps}
        for elements in (1024, 2048, 4096, 8192)
        for c in (32, 64, 128)
        for warps in (4, 8)
    ]


@candidates("batch_stats")
def _batch_stats_candidates(size: int, C: int) -> list[dict[str, int]]:
    return [{"BLOCK_T": t, "BLOCK_C": c, "num_warps": 4} for t in (32, 64, 128) for c in (8, 16, 32)]
