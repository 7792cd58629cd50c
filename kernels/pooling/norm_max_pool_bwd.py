"""Backward of batch norm, activation and max pooling in one: y = maxpool(act(norm(z))), channels_last.

    g    = dy act'(norm(z)) at each window's chosen cell, 0 at all others,      zhat = (z - mean) rstd
    dbias = sum(g),   dweight = sum(g zhat),   dz = weight rstd (g - mean(g) - zhat mean(g zhat))

as in ``common/norm_act.py``. The normalised map and its gradient exist in registers only; the forward saves z and the
index. Both kernels take windows that share no cell. Traffic in elements, hi cells and lo windows: reduce lo + lo chosen
cells of z + index, input 2hi + lo + index.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.batch_norm.fwd import rows_per_program
from fastseg.kernels.common.norm_act import activate_grad, load_mean_grads, load_norm, norm_grad, store_tile_sums
from fastseg.kernels.common.norm_args import Norm, norm_args
from fastseg.kernels.pooling.windows import INT64, UNROLLED, Pooling, grid_rows, load_index, new_map
from fastseg.kernels.runtime.config import candidates, heuristic, select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv, next_power_of_2
from fastseg.kernels.runtime.tensors import acc_dtype, stats_dtype


@triton.jit(do_not_specialize=["total", "rows", "H", "W", "OH", "OW"])
def _norm_max_pool_bwd_reduce_kernel(
    dy_ptr, index_ptr, z_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    sums_ptr,
    total, rows, C, H, W, OH, OW, eps,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BITS: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    mask_c = offs_c < C
    mean, rstd, weight, bias = load_norm(weight_ptr, bias_ptr, mean_ptr, var_ptr, offs_c, mask_c, eps, AFFINE, ACC)
    sum_g, sum_gz = tl.zeros((BLOCK_M, BLOCK_L), ACC), tl.zeros((BLOCK_M, BLOCK_L), ACC)
    row0 = pid_m * rows  # a map has fewer than 2^31 rows
    for m in range(0, rows, BLOCK_M):
        row = row0 + m + tl.arange(0, BLOCK_M)
        mask_m = (m + tl.arange(0, BLOCK_M) < rows)[:, None] & (row < total)[:, None]
        mask = mask_m & mask_c[None, :]
        image, z, y, x, channel = grid_rows(row, offs_c, 1, OH, OW, True)
        offs = row[:, None].to(tl.int64) * C + channel
        index = load_index(
            index_ptr, offs, image, z, y, x, channel, mask_m, mask, C, 1, OH, OW, True, BITS, True, BLOCK_M, BLOCK_L
        )
        cell = index if BITS == INT64 else (y * SH - PH + index // KW) * W + x * SW - PW + index % KW
        ok = mask & (cell >= 0) & (cell < H * W)
        g = tl.load(dy_ptr + offs, mask=ok, other=0.0).to(ACC)
        chosen = tl.load(z_ptr + image * (H * W).to(tl.int64) * C + (cell * C + channel), mask=ok, other=0.0).to(ACC)
        zhat = (chosen - mean[None, :]) * rstd[None, :]
        g = activate_grad(g, zhat * weight[None, :] + bias[None, :], ACT)
        sum_g += g
        sum_gz += g * zhat
    store_tile_sums(sum_g, sum_gz, tl.arange(0, BLOCK_M) < BLOCK_M, pid_m, sums_ptr, offs_c, mask_c, C)


@triton.jit(do_not_specialize=["rows", "H", "W", "OH", "OW", "QH", "QW"])
def _norm_max_pool_bwd_input_kernel(
    dy_ptr, index_ptr, z_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, sums_ptr,
    dz_ptr,
    rows, C, H, W, OH, OW, QH, QW, eps, inv_count,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BITS: tl.constexpr, AFFINE: tl.constexpr, BATCH_STATS: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # a map has fewer than 2^31 rows
    offs_c = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    mask_m, mask_c = (row < rows)[:, None], offs_c < C
    mean, rstd, weight, bias = load_norm(weight_ptr, bias_ptr, mean_ptr, var_ptr, offs_c, mask_c, eps, AFFINE, ACC)
    mean_g, mean_gz = load_mean_grads(sums_ptr, offs_c, mask_c, inv_count, C, BATCH_STATS, ACC)

    image, z, y, x, channel = grid_rows(row, offs_c, 1, QH, QW, True)
    row_ok = mask_m & (y < OH) & (x < OW)
    ok = row_ok & mask_c[None, :]
    offs = image * (OH * OW).to(tl.int64) * C + ((y * OW + x) * C + channel)
    dy = tl.load(dy_ptr + offs, mask=ok, other=0.0).to(ACC)
    index = load_index(
        index_ptr, offs, image, z, y, x, channel, row_ok, ok, C, 1, OH, OW, True, BITS, True, BLOCK_M, BLOCK_L
    )
    base = image * (H * W).to(tl.int64) * C
    for cell in tl.range(0, SH * SW, loop_unroll_factor=SH * SW if SH * SW <= UNROLLED else 1):
        iy, ix = cell // SW, cell % SW
        h, w = y * SH - PH + iy, x * SW - PW + ix
        flat = h * W + w
        inside = mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W) & mask_c[None, :]
        u = tl.load(z_ptr + base + (flat * C + channel), mask=inside, other=0.0).to(ACC)
        hit = ok & (iy < KH) & (ix < KW) & (index == (flat if BITS == INT64 else iy * KW + ix))
        dz = norm_grad(tl.where(hit, dy, 0.0), u, mean, rstd, weight, bias, mean_g, mean_gz, ACT)
        tl.store(dz_ptr + base + (flat * C + channel), dz.to(dz_ptr.dtype.element_ty), mask=inside)


def norm_max_pool_bwd(
    dy: Tensor, index: Tensor, z: Tensor, norm: Norm, act: str, pool: Pooling, bits: int
) -> tuple[Tensor, Tensor]:
    """dy (N, C, *pool.out), its index, z (N, C, *pool.size) in NHWC memory -> dz, and (2, C): sum(g), sum(g zhat)."""
    (_, H, W), (_, OH, OW), (_, QH, QW) = pool.size, pool.out, pool.windows
    args, _, affine = norm_args(norm, z)
    *vectors, eps = args
    axes = lambda size: dict(zip(("H", "W"), size[1:], strict=True))
    constants = {
        name + axis: n
        for name, size in (("K", pool.kernel), ("S", pool.stride), ("P", pool.padding))
        for axis, n in axes(size).items()
    }
    constants |= {"BITS": bits, "AFFINE": affine, "ACT": act, "ACC": acc_dtype(z)}
    key = {"device": z.device, "C": pool.C, "dtype": z.dtype, "bits": bits}

    total, _ = pool.rows(pool.out)
    cfg = select("norm_max_pool_bwd_reduce", size=total, **key)
    blocks_c = cdiv(pool.C, cfg.BLOCK_L)
    rows = rows_per_program(total, cfg.BLOCK_M, blocks_c)
    tiles = cdiv(total, rows)
    sums = torch.empty(tiles, 2, pool.C, dtype=stats_dtype(z), device=z.device)
    launch(
        _norm_max_pool_bwd_reduce_kernel, (tiles, blocks_c),
        dy, index, z, *vectors, sums, total, rows, pool.C, H, W, OH, OW, eps, **constants, **cfg.launch,
    )  # fmt: skip
    sums = sums.sum(0)

    dz = new_map(z, pool, pool.size)
    rows, _ = pool.rows(pool.windows)
    cfg = select("norm_max_pool_bwd_input", size=rows, **key)
    launch(
        _norm_max_pool_bwd_input_kernel, (cdiv(rows, cfg.BLOCK_M), cdiv(pool.C, cfg.BLOCK_L)),
        dy, index, z, *vectors, sums, dz, rows, pool.C, H, W, OH, OW, QH, QW, eps, 1.0 / (pool.N * H * W),
        **constants, BATCH_STATS=norm.batch_stats, **cfg.launch,
    )  # fmt: skip
    return dz, sums


@heuristic("norm_max_pool_bwd_reduce")
@heuristic("norm_max_pool_bwd_input")
def _config(size: int, C: int, dtype: torch.dtype, bits: int) -> dict[str, int]:
    """8 windows a thread: with four cells each, and the norm's vectors, that fills the registers."""
    block_l = min(64, max(16, next_power_of_2(C)))
    return {"BLOCK_M": 1024 // block_l, "BLOCK_L": block_l, "num_warps": 4}


@candidates("norm_max_pool_bwd_reduce")
@candidates("norm_max_pool_bwd_input")
def _candidates(size: int, C: int, dtype: torch.dtype, bits: int) -> list[dict[str, int]]:
    return [
        {"BLOCK_M": elements // block, "BLOCK_L": block, "num_warps": warps}
        for elements in (512, 1024, 2048)
        for block in (32, 64, 128)
        for warps in (4, 8)
    ]
