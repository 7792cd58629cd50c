"""Kernels and launchers of the separable convolution's backward; ``launch.py`` has the whole design.

Names: dz = gradient at the output of the pointwise convolution, g1 = at the output of the middle norm (after the middle
activation), du = at the output of the depthwise convolution. dz and du are never stored: each kernel that needs them
computes them from (dy, z) and (g1, u) as it loads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.batch_norm.fwd import rows_per_program
from fastseg.kernels.common.norm_act import activate, activate_grad, load_norm, norm_act, norm_act_grad, store_tile_sums
from fastseg.kernels.common.norm_args import Norm, norm_args
from fastseg.kernels.common.tiles import dilated_tile_pixels, tile_and_block
from fastseg.kernels.runtime.config import select
from fastseg.kernels.runtime.conv_sizes import Geometry
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv, next_power_of_2
from fastseg.kernels.runtime.tensors import acc_dtype, precision, stats_dtype
from fastseg.kernels.separable_conv.fwd import Acts, Weights


@triton.jit(do_not_specialize=["M"])
def _separable_conv_bwd_pw_input_kernel(
    dy_ptr, z_ptr, u_ptr, post_weight_ptr, post_bias_ptr, post_mean_ptr, post_var_ptr, post_sums_ptr, pw_ptr,
    mid_weight_ptr, mid_bias_ptr, mid_mean_ptr, mid_var_ptr,
    g1_ptr, mid_sums_ptr,
    M, post_eps, mid_eps, inv_count,
    C: tl.constexpr, COUT: tl.constexpr, POST_NORM: tl.constexpr, POST_AFFINE: tl.constexpr, POST_BATCH: tl.constexpr,
    POST_ACT: tl.constexpr, MID_NORM: tl.constexpr, MID_AFFINE: tl.constexpr, MID_ACT: tl.constexpr, SUMS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, block = tile_and_block(tl.cdiv(C, BLOCK_N))
    row0 = tile.to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)  # depthwise channels
    mask_m = row0 + offs_m < M
    mask_n = offs_n < C
    dtype = g1_ptr.dtype.element_ty
    dy_ptr += row0 * COUT
    z_ptr += row0 * COUT

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for k in range(0, COUT, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < COUT
        offs = offs_m[:, None] * COUT + offs_k[None, :]
        mask = mask_m[:, None] & mask_k[None, :]
        dz = tl.load(dy_ptr + offs, mask=mask, other=0.0)
        if POST_NORM or POST_ACT != "none":
            z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(ACC)
            dz = norm_act_grad(dz.to(ACC), z, post_weight_ptr, post_bias_ptr, post_mean_ptr, post_var_ptr,
                               post_sums_ptr, offs_k, mask_k, post_eps, inv_count, COUT,
                               POST_NORM, POST_AFFINE, POST_BATCH, POST_ACT, ACC).to(dtype)  # fmt: skip
        w = tl.load(pw_ptr + offs_k[:, None] * C + offs_n[None, :], mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(dz, w.to(dtype), acc, input_precision=PRECISION, out_dtype=ACC)

    offs = row0 * C + offs_m[:, None] * C + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    g1 = acc.to(dtype).to(ACC)
    uhat = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if MID_NORM:
        mean, rstd, weight, bias = load_norm(mid_weight_ptr, mid_bias_ptr, mid_mean_ptr, mid_var_ptr, offs_n, mask_n,
                                             mid_eps, MID_AFFINE, ACC)  # fmt: skip
        uhat = (tl.load(u_ptr + offs, mask=mask, other=0.0).to(ACC) - mean[None, :]) * rstd[None, :]
        g1 = activate_grad(g1, uhat * weight[None, :] + bias[None, :], MID_ACT)
    elif MID_ACT != "none":
        g1 = activate_grad(g1, tl.load(u_ptr + offs, mask=mask, other=0.0).to(ACC), MID_ACT)
    tl.store(g1_ptr + offs, g1.to(dtype), mask=mask)
    if SUMS:
        store_tile_sums(g1, g1 * uhat, mask_m, tile, mid_sums_ptr, offs_n, mask_n, C)


@triton.jit(do_not_specialize=["M", "rows"])
def _separable_conv_bwd_pw_weight_kernel(
    dy_ptr, z_ptr, u_ptr, post_weight_ptr, post_bias_ptr, post_mean_ptr, post_var_ptr, post_sums_ptr,
    mid_weight_ptr, mid_bias_ptr, mid_mean_ptr, mid_var_ptr,
    dpw_ptr,
    M, rows, post_eps, mid_eps, inv_count,
    C: tl.constexpr, COUT: tl.constexpr, POST_NORM: tl.constexpr, POST_AFFINE: tl.constexpr, POST_BATCH: tl.constexpr,
    POST_ACT: tl.constexpr, MID_NORM: tl.constexpr, MID_AFFINE: tl.constexpr, MID_ACT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks_k = tl.cdiv(C, BLOCK_K)
    split, block = tile_and_block(tl.cdiv(COUT, BLOCK_N) * blocks_k)
    row0 = split.to(tl.int64) * rows
    offs_n = block // blocks_k * BLOCK_N + tl.arange(0, BLOCK_N)  # output channels
    offs_k = block % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)  # depthwise channels
    offs_m = tl.arange(0, BLOCK_M)
    mask_n = offs_n < COUT
    mask_k = offs_k < C
    dtype = u_ptr.dtype.element_ty
    dy_ptr += row0 * COUT
    z_ptr += row0 * COUT
    u_ptr += row0 * C

    acc = tl.zeros((BLOCK_N, BLOCK_K), ACC)
    for m in range(0, rows, BLOCK_M):
        mask_m = (m + offs_m < rows) & (row0 + m + offs_m < M)
        mask_dz = mask_m[:, None] & mask_n[None, :]
        offs = (m + offs_m)[:, None] * COUT + offs_n[None, :]
        dz = tl.load(dy_ptr + offs, mask=mask_dz, other=0.0)
        if POST_NORM or POST_ACT != "none":
            z = tl.load(z_ptr + offs, mask=mask_dz, other=0.0).to(ACC)
            dz = norm_act_grad(dz.to(ACC), z, post_weight_ptr, post_bias_ptr, post_mean_ptr, post_var_ptr,
                               post_sums_ptr, offs_n, mask_n, post_eps, inv_count, COUT,
                               POST_NORM, POST_AFFINE, POST_BATCH, POST_ACT, ACC)  # fmt: skip
            dz = tl.where(mask_dz, dz, 0.0).to(dtype)  # rows past the end: batch statistics make them non-zero
        mask_a = mask_m[:, None] & mask_k[None, :]
        a = tl.load(u_ptr + (m + offs_m)[:, None] * C + offs_k[None, :], mask=mask_a, other=0.0)
        if MID_NORM or MID_ACT != "none":
            a = norm_act(a.to(ACC), mid_weight_ptr, mid_bias_ptr, mid_mean_ptr, mid_var_ptr, offs_k, mask_k, mid_eps,
                         MID_NORM, MID_AFFINE, MID_ACT, ACC).to(dtype)  # fmt: skip
        acc = tl.dot(tl.trans(dz), a, acc, input_precision=PRECISION, out_dtype=ACC)
    offs = split.to(tl.int64) * COUT * C + offs_n[:, None] * C + offs_k[None, :]
    tl.store(dpw_ptr + offs, acc, mask=mask_n[:, None] & mask_k[None, :])


@triton.jit(do_not_specialize=["H", "W", "OH", "OW"])
def _separable_conv_bwd_dw_input_kernel(
    g1_ptr, u_ptr, x_ptr, dw_ptr, mid_weight_ptr, mid_bias_ptr, mid_mean_ptr, mid_var_ptr, mid_sums_ptr,
    dx_ptr,
    H, W, OH, OW, stride, padding, dilation, mid_eps, inv_count,
    C: tl.constexpr, K: tl.constexpr, DW_C: tl.constexpr, DW_T: tl.constexpr, PRE_ACT: tl.constexpr,
    MID_NORM: tl.constexpr, MID_AFFINE: tl.constexpr, MID_BATCH: tl.constexpr, ACC: tl.constexpr,
    PHASED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile, block = tile_and_block(tl.cdiv(C, BLOCK_C))
    n, iy, ix, mask_m = dilated_tile_pixels(tile, H, W, dilation, PHASED, BLOCK_H, BLOCK_W)
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    g1_ptr += n * OH * OW * C
    u_ptr += n * OH * OW * C

    dx = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), ACC)
    for ky in tl.range(0, K, num_stages=1, loop_unroll_factor=1):
        ty = iy + padding - ky * dilation  # stride times the output row that this tap reads from
        oy = ty // stride
        mask_y = mask_m & (ty >= 0) & (oy < OH) & (ty == oy * stride)
        for kx in tl.static_range(K):
            tx = ix + padding - kx * dilation
            ox = tx // stride
            mask_t = mask_y & (tx >= 0) & (ox < OW) & (tx == ox * stride)
            mask = mask_t[:, None] & mask_c[None, :]
            offs = (oy * OW + ox)[:, None] * C + offs_c[None, :]
            du = tl.load(g1_ptr + offs, mask=mask, other=0.0).to(ACC)
            if MID_NORM:
                u = tl.load(u_ptr + offs, mask=mask, other=0.0).to(ACC) if MID_BATCH else du
                du = norm_act_grad(du, u, mid_weight_ptr, mid_bias_ptr, mid_mean_ptr, mid_var_ptr, mid_sums_ptr, offs_c,
                                   mask_c, mid_eps, inv_count, C, True, MID_AFFINE, MID_BATCH, "none", ACC)  # fmt: skip
                du = tl.where(mask, du, 0.0)  # outside the map: batch statistics make it non-zero
            w = tl.load(dw_ptr + offs_c * DW_C + (ky * K + kx) * DW_T, mask=mask_c, other=0.0).to(ACC)
            dx += du * w[None, :]
    offs = n * H * W * C + (iy * W + ix)[:, None] * C + offs_c[None, :]
    mask = mask_m[:, None] & mask_c[None, :]
    if PRE_ACT != "none":
        dx = activate_grad(dx, tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC), PRE_ACT)
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "rows", "H", "W", "OH", "OW"])
def _separable_conv_bwd_dw_weight_kernel(
    g1_ptr, u_ptr, x_ptr, mid_weight_ptr, mid_bias_ptr, mid_mean_ptr, mid_var_ptr, mid_sums_ptr,
    ddw_ptr,
    M, rows, H, W, OH, OW, stride, padding, dilation, mid_eps, inv_count,
    C: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr, PRE_ACT: tl.constexpr,
    MID_NORM: tl.constexpr, MID_AFFINE: tl.constexpr, MID_BATCH: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    split, block = tile_and_block(tl.cdiv(C, BLOCK_C))
    row0 = split.to(tl.int64) * rows
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_m = tl.arange(0, BLOCK_M)
    offs_t = tl.arange(0, TAPS)  # K * K, rounded up to a power of two
    mask_c = offs_c < C

    acc = tl.zeros((TAPS, BLOCK_C), ACC)
    for m in range(0, rows, BLOCK_M):
        row = row0 + m + offs_m
        mask_m = (m + offs_m < rows) & (row < M)
        n = row // (OH * OW)  # int64
        in_image = (row % (OH * OW)).to(tl.int32)
        iy = in_image // OW * stride - padding
        ix = in_image % OW * stride - padding
        mask = mask_m[:, None] & mask_c[None, :]
        offs = row[:, None] * C + offs_c[None, :]
        du = tl.load(g1_ptr + offs, mask=mask, other=0.0).to(ACC)
        if MID_NORM:
            u = tl.load(u_ptr + offs, mask=mask, other=0.0).to(ACC) if MID_BATCH else du
            du = norm_act_grad(du, u, mid_weight_ptr, mid_bias_ptr, mid_mean_ptr, mid_var_ptr, mid_sums_ptr, offs_c,
                               mask_c, mid_eps, inv_count, C, True, MID_AFFINE, MID_BATCH, "none", ACC)  # fmt: skip
            du = tl.where(mask, du, 0.0)
        base = n * H * W * C
        for ky in tl.range(0, K, num_stages=1, loop_unroll_factor=1):
            y = iy + ky * dilation
            mask_y = mask_m & (y >= 0) & (y < H)
            for kx in tl.static_range(K):
                col = ix + kx * dilation
                mask_t = (mask_y & (col >= 0) & (col < W))[:, None] & mask_c[None, :]
                offs_x = (base + (y * W + col) * C)[:, None] + offs_c[None, :]
                x = activate(tl.load(x_ptr + offs_x, mask=mask_t, other=0.0).to(ACC), PRE_ACT)
                tap = tl.sum(du * x, axis=0)
                acc += tl.where((offs_t == ky * K + kx)[:, None], tap[None, :], 0.0)
    offs = split.to(tl.int64) * C * K * K + offs_c[None, :] * (K * K) + offs_t[:, None]
    tl.store(ddw_ptr + offs, acc, mask=(offs_t < K * K)[:, None] & mask_c[None, :])


def separable_conv_bwd_pw_input(
    dy: Tensor, z: Tensor, u: Tensor, w: Weights, g: Geometry, acts: Acts, mid: Norm | None, post: Norm | None,
    post_sums: Tensor, *, sums: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dy, z (N, COUT, OH, OW), u (N, C, OH, OW) in NHWC memory -> g1 like u; mid sums (2, C), if asked for."""
    g1 = torch.empty_like(u)
    cfg = select("separable_conv_bwd_pw_input", size=g.pixels, device=u.device, C=g.C, COUT=g.COUT, dtype=u.dtype)
    tiles = cdiv(g.pixels, cfg.BLOCK_M)
    mid_sums = u.new_empty(tiles, 2, g.C, dtype=stats_dtype(u)) if sums else g1
    (*mid_vectors, mid_eps), mid_norm, mid_affine = norm_args(mid, u)
    (*post_vectors, post_eps), post_norm, post_affine = norm_args(post, u)
    launch(
        _separable_conv_bwd_pw_input_kernel, (tiles * cdiv(g.C, cfg.BLOCK_N),),
        dy, z, u, *post_vectors, post_sums, w.pw, *mid_vectors, g1, mid_sums,
        g.pixels, post_eps, mid_eps, 1 / g.pixels,
        C=g.C, COUT=g.COUT, POST_NORM=post_norm, POST_AFFINE=post_affine, POST_BATCH=post_norm and post.batch_stats,
        POST_ACT=acts.post, MID_NORM=mid_norm, MID_AFFINE=mid_affine, MID_ACT=acts.mid, SUMS=sums,
        ACC=acc_dtype(u), PRECISION=precision(u), **cfg.launch,
    )  # fmt: skip
    return g1, mid_sums.sum(0) if sums else g1


def separable_conv_bwd_pw_weight(
    dy: Tensor, z: Tensor, u: Tensor, g: Geometry, acts: Acts, mid: Norm | None, post: Norm | None, post_sums: Tensor
) -> Tensor:
    """dy, z (N, COUT, OH, OW), u (N, C, OH, OW) in NHWC memory -> (COUT, C, 1, 1) in the dtype of sums."""
    cfg = select("separable_conv_bwd_pw_weight", size=g.pixels, device=u.device, C=g.C, COUT=g.COUT, dtype=u.dtype)
    blocks = cdiv(g.COUT, cfg.BLOCK_N) * cdiv(g.C, cfg.BLOCK_K)
    rows = rows_per_program(g.pixels, cfg.BLOCK_M, blocks)
    splits = cdiv(g.pixels, rows)
    dpw = u.new_empty(splits, g.COUT, g.C, 1, 1, dtype=stats_dtype(u))
    (*mid_vectors, mid_eps), mid_norm, mid_affine = norm_args(mid, u)
    (*post_vectors, post_eps), post_norm, post_affine = norm_args(post, u)
    launch(
        _separable_conv_bwd_pw_weight_kernel, (splits * blocks,),
        dy, z, u, *post_vectors, post_sums, *mid_vectors, dpw,
        g.pixels, rows, post_eps, mid_eps, 1 / g.pixels,
        C=g.C, COUT=g.COUT, POST_NORM=post_norm, POST_AFFINE=post_affine, POST_BATCH=post_norm and post.batch_stats,
        POST_ACT=acts.post, MID_NORM=mid_norm, MID_AFFINE=mid_affine, MID_ACT=acts.mid,
        ACC=acc_dtype(u), PRECISION=precision(u), **cfg.launch,
    )  # fmt: skip
    return dpw.sum(0)


def separable_conv_bwd_dw_input(
    g1: Tensor, u: Tensor, x: Tensor, w: Weights, g: Geometry, pre_act: str, mid: Norm | None, mid_sums: Tensor
) -> Tensor:
    """g1, u (N, C, OH, OW), x (N, C, H, W) in NHWC memory -> dx like x."""
    dx = torch.empty_like(x)
    cfg = select("separable_conv_bwd_dw_input", size=g.N * g.H * g.W, device=x.device, C=g.C, K=g.K, dtype=x.dtype)
    tiles = g.N * cdiv(g.H, cfg.BLOCK_H) * cdiv(g.W, cfg.BLOCK_W)
    (*mid_vectors, mid_eps), mid_norm, mid_affine = norm_args(mid, x)
    launch(
        _separable_conv_bwd_dw_input_kernel, (tiles * cdiv(g.C, cfg.BLOCK_C),),
        g1, u, x, w.dw, *mid_vectors, mid_sums, dx,
        g.H, g.W, g.OH, g.OW, g.stride, g.padding, g.dilation, mid_eps, 1 / g.pixels,
        C=g.C, K=g.K, DW_C=w.dw.stride(0), DW_T=w.dw.stride(1), PRE_ACT=pre_act, ACC=acc_dtype(x),
        MID_NORM=mid_norm, MID_AFFINE=mid_affine, MID_BATCH=mid_norm and mid.batch_stats, PHASED=g.phased,
        **cfg.launch,
    )  # fmt: skip
    return dx


def separable_conv_bwd_dw_weight(
    g1: Tensor, u: Tensor, x: Tensor, g: Geometry, pre_act: str, mid: Norm | None, mid_sums: Tensor
) -> Tensor:
    """g1, u (N, C, OH, OW), x (N, C, H, W) in NHWC memory -> (C, 1, K, K) in the dtype of sums."""
    cfg = select("separable_conv_bwd_dw_weight", size=g.pixels, device=x.device, C=g.C, K=g.K, dtype=x.dtype)
    blocks = cdiv(g.C, cfg.BLOCK_C)
    rows = rows_per_program(g.pixels, cfg.BLOCK_M, blocks)
    splits = cdiv(g.pixels, rows)
    ddw = x.new_empty(splits, g.C, 1, g.K, g.K, dtype=stats_dtype(x))
    (*mid_vectors, mid_eps), mid_norm, mid_affine = norm_args(mid, x)
    launch(
        _separable_conv_bwd_dw_weight_kernel, (splits * blocks,),
        g1, u, x, *mid_vectors, mid_sums, ddw,
        g.pixels, rows, g.H, g.W, g.OH, g.OW, g.stride, g.padding, g.dilation, mid_eps, 1 / g.pixels,
        C=g.C, K=g.K, TAPS=next_power_of_2(g.K * g.K), PRE_ACT=pre_act, ACC=acc_dtype(x),
        MID_NORM=mid_norm, MID_AFFINE=mid_affine, MID_BATCH=mid_norm and mid.batch_stats, **cfg.launch,
    )  # fmt: skip
    return ddw.sum(0)
