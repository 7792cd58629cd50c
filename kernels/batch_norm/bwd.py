"""Backward of batch normalisation + residual + activation, y = act(norm(z) + residual), in NHWC or NCHW memory.

    reduce   g = dy act'(norm(z) + residual),   dbias = sum(g),   dweight = sum(g zhat),   zhat = (z - mean) rstd
    input    dz = weight rstd (g - mean(g) - zhat mean(g zhat));  with fixed statistics weight rstd g, in the reduction

The input of the activation is recomputed from z. With a residual that would need the residual's map as well. y has the
same signs, and its next reader (a convolution, for its weight gradient) saves it anyway, so that saving it costs no
memory; a mask of bits would. g is then the gradient of the residual: the reduction writes it, and the second pass reads
it in place of dy and y. Traffic in elements, M = N*H*W: batch statistics 2MC + 3MC, with a residual 4MC + 3MC; fixed
statistics 3MC, 5MC.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.batch_norm.fwd import Walk, tile_of
from fastseg.kernels.common.norm_act import (
    activate_grad,
    load_mean_grads,
    load_norm,
    norm_grad,
    store_tile_sums,
    where_all,
)
from fastseg.kernels.common.norm_args import Norm, norm_args
from fastseg.kernels.common.tiles import tile_and_block
from fastseg.kernels.runtime.config import select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv
from fastseg.kernels.runtime.tensors import acc_dtype, stats_dtype


@triton.jit(do_not_specialize=["blocks", "total", "steps"])
def _batch_norm_act_bwd_reduce_kernel(
    dy_ptr, z_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    sums_ptr, g_ptr, dz_ptr,
    pixels, blocks, total, steps, eps,
    C: tl.constexpr, LAST: tl.constexpr, NORM: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr,
    FROM_Y: tl.constexpr, FIXED: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid, block = tile_and_block(tl.cdiv(C, BLOCK_C))
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    if NORM:
        mean, rstd, weight, bias = load_norm(weight_ptr, bias_ptr, mean_ptr, var_ptr, offs_c, mask_c, eps, AFFINE, ACC)
    sum_g = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    sum_gz = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for s in range(0, steps):
        start, offs, inside = tile_of(pid * steps + s, blocks, pixels, offs_c, C, LAST, BLOCK_M)
        mask = where_all(inside, pid * steps + s < total)[:, None] & mask_c[None, :]
        g = tl.load(dy_ptr + start + offs, mask=mask, other=0.0).to(ACC)
        if FROM_Y:
            g = activate_grad(g, tl.load(y_ptr + start + offs, mask=mask, other=0.0).to(ACC), ACT)
            tl.store(g_ptr + start + offs, g.to(g_ptr.dtype.element_ty), mask=mask)
        if NORM:
            zhat = (tl.load(z_ptr + start + offs, mask=mask, other=0.0).to(ACC) - mean[None, :]) * rstd[None, :]
            if not FROM_Y:
                g = activate_grad(g, zhat * weight[None, :] + bias[None, :], ACT)
            sum_gz += g * zhat
        elif ACT != "none":
            g = activate_grad(g, tl.load(z_ptr + start + offs, mask=mask, other=0.0).to(ACC), ACT)
        sum_g += g
        if FIXED:
            dz = g * (weight * rstd)[None, :]
            tl.store(dz_ptr + start + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    store_tile_sums(sum_g, sum_gz, tl.arange(0, BLOCK_M) < BLOCK_M, pid, sums_ptr, offs_c, mask_c, C)


@triton.jit(do_not_specialize=["blocks"])
def _batch_norm_act_bwd_input_kernel(
    g_ptr, z_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, sums_ptr,
    dz_ptr,
    pixels, blocks, eps, inv_count,
    C: tl.constexpr, LAST: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid, block = tile_and_block(tl.cdiv(C, BLOCK_C))
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean, rstd, weight, bias = load_norm(weight_ptr, bias_ptr, mean_ptr, var_ptr, offs_c, mask_c, eps, AFFINE, ACC)
    mean_g, mean_gz = load_mean_grads(sums_ptr, offs_c, mask_c, inv_count, C, True, ACC)
    start, offs, inside = tile_of(pid, blocks, pixels, offs_c, C, LAST, BLOCK_M)
    mask = inside[:, None] & mask_c[None, :]
    g = tl.load(g_ptr + start + offs, mask=mask, other=0.0).to(ACC)
    z = tl.load(z_ptr + start + offs, mask=mask, other=0.0).to(ACC)
    dz = norm_grad(g, z, mean, rstd, weight, bias, mean_g, mean_gz, ACT)
    tl.store(dz_ptr + start + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def batch_norm_act_bwd_reduce(
    dy: Tensor, z: Tensor, norm: Norm | None, act: str, y: Tensor | None = None, *, with_dz: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dy, z, y (N, C, H, W) in one memory, NHWC or NCHW -> (2, C), g, dz.

    The first: sum(g), sum(g zhat); its second row is 0 without a norm. g where ``y`` says what the activation passed;
    dz where it is asked for, with fixed statistics.
    """
    args, has_norm, affine = norm_args(norm, dy)
    *vectors, eps = args
    walk = Walk.of(dy)
    cfg = select("batch_norm_act_bwd_reduce", **walk.key(dy))
    blocks, total, steps, tiles = walk.reduction(cfg)
    sums = torch.empty(tiles, 2, walk.C, dtype=stats_dtype(dy), device=dy.device)
    g = None if y is None else torch.empty_like(z)
    dz = torch.empty_like(z) if with_dz else None
    if tiles == 0:
        return sums.sum(0), g, dz
    launch(
        _batch_norm_act_bwd_reduce_kernel, (tiles * cdiv(walk.C, cfg.BLOCK_C),),
        dy, z, z if y is None else y, *vectors, sums, sums if g is None else g, sums if dz is None else dz,
        walk.pixels, blocks, total, steps, eps,
        C=walk.C, LAST=walk.last, NORM=has_norm, AFFINE=affine, ACT=act, FROM_Y=y is not None, FIXED=with_dz,
        ACC=acc_dtype(dy), **cfg.launch,
    )  # fmt: skip
    return sums.sum(0), g, dz


def batch_norm_act_bwd_input(g: Tensor, z: Tensor, norm: Norm, act: str, sums: Tensor, inv_count: float) -> Tensor:
    """g, z (N, C, H, W) in one memory, (2, C) sums of the batch, 1 / its pixels -> dz. ``g`` is before ``act``'s
    gradient, where there is one."""
    dz = torch.empty_like(z)
    if z.numel() == 0:
        return dz
    args, _, affine = norm_args(norm, z)
    *vectors, eps = args
    walk = Walk.of(z)
    cfg = select("batch_norm_act_bwd_input", **walk.key(z))
    blocks, total = walk.blocks(cfg)
    launch(
        _batch_norm_act_bwd_input_kernel, (total * cdiv(walk.C, cfg.BLOCK_C),),
        g, z, *vectors, sums, dz, walk.pixels, blocks, eps, inv_count,
        C=walk.C, LAST=walk.last, AFFINE=affine, ACT=act, ACC=acc_dtype(z), **cfg.launch,
    )  # fmt: skip
    return dz
