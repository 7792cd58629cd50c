"""Kernels and launchers of the separable convolution's forward; ``launch.py`` has the whole design."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.batch_norm.stats import batch_stats
from fastseg.kernels.common.bilinear import float_of
from fastseg.kernels.common.norm_act import activate, load_scale, norm_act, scaled_act, store_tile_stats
from fastseg.kernels.common.norm_args import Norm, norm_args
from fastseg.kernels.common.tiles import dilated_tile_pixels, tile_and_block
from fastseg.kernels.runtime.config import Config, select
from fastseg.kernels.runtime.conv_sizes import Geometry
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import bits_of, cdiv, unit_of
from fastseg.kernels.runtime.tensors import acc_dtype, empty_nhwc, precision, stats_dtype
from fastseg.kernels.separable_conv.taps import depthwise_tile, nine_taps, sum_of_taps


@triton.jit
def finish_tile(
    z, z_ptr, y_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, tile_stats_ptr, counts_ptr,
    rows, mask_m, offs_n, eps, tile, pid_n, COUT,
    NORM: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    STATS: tl.constexpr, SAVE_Z: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The epilogue of both GEMM forms. z: (BLOCK_M, BLOCK_N) convolution output, in ACC; rows: int64 pixel numbers.

    STATS: z and its tile statistics are stored, norm and activation wait for them. Else y is stored, and z with SAVE_Z.
    RESIDUAL: "none", or on which side of the activation it is added, "before" or "after".
    """
    mask_n = offs_n < COUT
    mask = mask_m[:, None] & mask_n[None, :]
    offs = rows[:, None] * COUT + offs_n[None, :]
    z = z.to(y_ptr.dtype.element_ty).to(ACC)  # as torch rounds a convolution's output: both forms give the same
    if STATS or SAVE_Z:  # before the statistics: they need the registers
        tl.store(z_ptr + offs, z.to(z_ptr.dtype.element_ty), mask=mask)
    if STATS:
        count = store_tile_stats(z, mask_m, tile, tile_stats_ptr, offs_n, mask_n, COUT, ACC)
        if pid_n == 0:
            tl.store(counts_ptr + tile, count)
    else:
        FIRST: tl.constexpr = "none" if RESIDUAL == "before" else ACT
        y = norm_act(z, weight_ptr, bias_ptr, mean_ptr, var_ptr, offs_n, mask_n, eps, NORM, AFFINE, FIRST, ACC)
        if RESIDUAL != "none":
            y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(ACC)
        if RESIDUAL == "before":
            y = activate(y, ACT)
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["H", "W", "OH", "OW", "mid_bits", "post_bits"])
def _separable_conv_fwd_fused_kernel(
    x_ptr, dw_ptr, dw_bias_ptr, mid_weight_ptr, mid_bias_ptr, mid_mean_ptr, mid_var_ptr,
    pw_ptr, pw_bias_ptr, post_weight_ptr, post_bias_ptr, post_mean_ptr, post_var_ptr, residual_ptr,
    H, W, OH, OW, stride, padding, dilation, mid_bits, post_bits,
    z_ptr, y_ptr, tile_stats_ptr, counts_ptr,
    C: tl.constexpr, COUT: tl.constexpr, K: tl.constexpr, DW_C: tl.constexpr, DW_T: tl.constexpr,
    PRE_ACT: tl.constexpr, DW_BIAS: tl.constexpr,
    MID_NORM: tl.constexpr, MID_AFFINE: tl.constexpr, MID_ACT: tl.constexpr, PW_BIAS: tl.constexpr,
    POST_NORM: tl.constexpr, POST_AFFINE: tl.constexpr, POST_ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    STATS: tl.constexpr, SAVE_Z: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    PHASED: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    mid_eps, post_eps = float_of(mid_bits, ACC), float_of(post_bits, ACC)  # as constants they cost 2 spills on sm_90
    BLOCK_M: tl.constexpr = BLOCK_H * BLOCK_W
    tile, pid_n = tile_and_block(tl.cdiv(COUT, BLOCK_N))
    n, oy, ox, mask_m = dilated_tile_pixels(tile, OH, OW, dilation, PHASED, BLOCK_H, BLOCK_W)
    iy = oy * stride - padding
    ix = ox * stride - padding
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_w = offs_n[None, :] * C + tl.arange(0, BLOCK_K)[:, None]  # one for all k: 24 spills less
    x_ptr += n * H * W * C

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    dtype = y_ptr.dtype.element_ty
    mask_n = (offs_n < COUT)[None, :]
    if UNROLL and (BLOCK_M >= 64 or DW_C == 1):  # smaller tiles hold them in registers that other blocks could use
        offs_k = tl.arange(0, BLOCK_K)
        taps = nine_taps(x_ptr, iy, ix, mask_m, offs_k, offs_k < C, H, W, dilation, C)
        w = tl.load(pw_ptr + offs_w, mask=(offs_k < C)[:, None] & mask_n, other=0.0)
        for k in tl.range(0, C, BLOCK_K, num_stages=1, loop_unroll_factor=1):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < C
            mean, scale, bias = load_scale(mid_weight_ptr, mid_bias_ptr, mid_mean_ptr, mid_var_ptr, offs_k, mask_k,
                                           mid_eps, MID_NORM, MID_AFFINE, ACC)  # fmt: skip
            a = sum_of_taps(taps, dw_ptr, dw_bias_ptr, offs_k, mask_k, DW_C, DW_T, PRE_ACT, DW_BIAS, ACC)
            a = scaled_act(a.to(dtype).to(ACC), mean, scale, bias, MID_NORM, MID_ACT)  # rounded as torch rounds u
            # The next step's pixels and weights, asked for before the product: it is multiplied while they come.
            offs_k += BLOCK_K
            here = w
            w = tl.load(pw_ptr + (k + BLOCK_K) + offs_w, mask=(offs_k < C)[:, None] & mask_n, other=0.0)
            taps = nine_taps(x_ptr, iy, ix, mask_m, offs_k, offs_k < C, H, W, dilation, C)
            acc = tl.dot(a.to(dtype), here.to(dtype), acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        for k in tl.range(0, C, BLOCK_K, num_stages=1, loop_unroll_factor=1):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < C
            w = tl.load(pw_ptr + k + offs_w, mask=mask_k[:, None] & mask_n, other=0.0)  # they wait with the taps
            mean, scale, bias = load_scale(mid_weight_ptr, mid_bias_ptr, mid_mean_ptr, mid_var_ptr, offs_k, mask_k,
                                           mid_eps, MID_NORM, MID_AFFINE, ACC)  # fmt: skip
            a = depthwise_tile(x_ptr, dw_ptr, dw_bias_ptr, iy, ix, mask_m, offs_k, mask_k, H, W, dilation,
                               C, K, DW_C, DW_T, PRE_ACT, DW_BIAS, ACC, BLOCK_M, BLOCK_K, UNROLL)  # fmt: skip
            a = scaled_act(a.to(dtype).to(ACC), mean, scale, bias, MID_NORM, MID_ACT)  # rounded as torch rounds u
            acc = tl.dot(a.to(dtype), w.to(dtype), acc, input_precision=PRECISION, out_dtype=ACC)
    if PW_BIAS:
        acc += tl.load(pw_bias_ptr + offs_n, mask=offs_n < COUT, other=0.0).to(ACC)[None, :]

    rows = n * OH * OW + oy * OW + ox
    finish_tile(acc, z_ptr, y_ptr, residual_ptr, post_weight_ptr, post_bias_ptr, post_mean_ptr, post_var_ptr,
                tile_stats_ptr, counts_ptr, rows, mask_m, offs_n, post_eps, tile, pid_n,
                COUT, POST_NORM, POST_AFFINE, POST_ACT, RESIDUAL, STATS, SAVE_Z, ACC)  # fmt: skip


@triton.jit(do_not_specialize=["H", "W", "OH", "OW"])
def _separable_conv_fwd_dw_kernel(
    x_ptr, dw_ptr, dw_bias_ptr, mid_weight_ptr, mid_bias_ptr, mid_mean_ptr, mid_var_ptr,
    H, W, OH, OW, stride, padding, dilation,
    u_ptr, tile_stats_ptr, counts_ptr,
    MID_EPS: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, DW_C: tl.constexpr, DW_T: tl.constexpr, PRE_ACT: tl.constexpr,
    DW_BIAS: tl.constexpr, MID_NORM: tl.constexpr, MID_AFFINE: tl.constexpr, MID_ACT: tl.constexpr,
    STATS: tl.constexpr, STORE: tl.constexpr, ACC: tl.constexpr,
    PHASED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = BLOCK_H * BLOCK_W
    tile, pid_c = tile_and_block(tl.cdiv(C, BLOCK_C))
    n, oy, ox, mask_m = dilated_tile_pixels(tile, OH, OW, dilation, PHASED, BLOCK_H, BLOCK_W)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    x_ptr += n * H * W * C

    u = depthwise_tile(x_ptr, dw_ptr, dw_bias_ptr, oy * stride - padding, ox * stride - padding, mask_m, offs_c, mask_c,
                       H, W, dilation, C, K, DW_C, DW_T, PRE_ACT, DW_BIAS, ACC, BLOCK_M, BLOCK_C, False)  # fmt: skip
    u = u.to(u_ptr.dtype.element_ty).to(ACC)  # statistics are of what torch would have stored
    if STORE:
        a = norm_act(u, mid_weight_ptr, mid_bias_ptr, mid_mean_ptr, mid_var_ptr, offs_c, mask_c, MID_EPS,
                     MID_NORM, MID_AFFINE, MID_ACT, ACC)  # fmt: skip
        offs = (n * OH * OW + oy * OW + ox)[:, None] * C + offs_c[None, :]
        tl.store(u_ptr + offs, a.to(u_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_c[None, :])
    if STATS:
        count = store_tile_stats(u, mask_m, tile, tile_stats_ptr, offs_c, mask_c, C, ACC)
        if pid_c == 0:
            tl.store(counts_ptr + tile, count)


@triton.jit(do_not_specialize=["M", "image_pixels", "inputs", "outputs", "mid_bits", "post_bits"])
def _separable_conv_fwd_pw_kernel(
    u_ptr, mid_weight_ptr, mid_bias_ptr, mid_mean_ptr, mid_var_ptr,
    pw_ptr, pw_bias_ptr, image_bias_ptr, post_weight_ptr, post_bias_ptr, post_mean_ptr, post_var_ptr, residual_ptr,
    M, image_pixels, inputs, outputs, mid_bits, post_bits,
    z_ptr, y_ptr, tile_stats_ptr, counts_ptr,
    UNIT: tl.constexpr, UNIT_OUT: tl.constexpr,
    MID_NORM: tl.constexpr, MID_AFFINE: tl.constexpr, MID_ACT: tl.constexpr, PW_BIAS: tl.constexpr,
    IMAGE_BIAS: tl.constexpr, POST_NORM: tl.constexpr, POST_AFFINE: tl.constexpr, POST_ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, STATS: tl.constexpr, SAVE_Z: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    C, COUT = inputs * UNIT, outputs * UNIT_OUT
    # As constants they cost hundreds of spills on gfx942.
    mid_eps, post_eps = float_of(mid_bits, ACC), float_of(post_bits, ACC)
    tile, pid_n = tile_and_block(tl.cdiv(COUT, BLOCK_N))
    row0 = tile.to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = row0 + offs_m < M
    u_ptr += row0 * C

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for k in range(0, C, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < C
        a = tl.load(u_ptr + offs_m[:, None] * C + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if MID_NORM or MID_ACT != "none":
            a = norm_act(a.to(ACC), mid_weight_ptr, mid_bias_ptr, mid_mean_ptr, mid_var_ptr, offs_k, mask_k, mid_eps,
                         MID_NORM, MID_AFFINE, MID_ACT, ACC).to(u_ptr.dtype.element_ty)  # fmt: skip
        mask_w = mask_k[:, None] & (offs_n < COUT)[None, :]
        w = tl.load(pw_ptr + offs_n[None, :] * C + offs_k[:, None], mask=mask_w, other=0.0)
        acc = tl.dot(a, w.to(u_ptr.dtype.element_ty), acc, input_precision=PRECISION, out_dtype=ACC)
    if PW_BIAS:
        acc += tl.load(pw_bias_ptr + offs_n, mask=offs_n < COUT, other=0.0).to(ACC)[None, :]
    if IMAGE_BIAS:
        offs = ((row0 + offs_m) // image_pixels * COUT)[:, None] + offs_n[None, :]
        acc += tl.load(image_bias_ptr + offs, mask=mask_m[:, None] & (offs_n < COUT)[None, :], other=0.0).to(ACC)

    finish_tile(acc, z_ptr, y_ptr, residual_ptr, post_weight_ptr, post_bias_ptr, post_mean_ptr, post_var_ptr,
                tile_stats_ptr, counts_ptr, row0 + offs_m, mask_m, offs_n, post_eps, tile, pid_n,
                COUT, POST_NORM, POST_AFFINE, POST_ACT, RESIDUAL, STATS, SAVE_Z, ACC)  # fmt: skip


class Weights(NamedTuple):
    """Any float dtype; ``dw`` as ``tap_weights`` gives it, the others contiguous."""

    dw: Tensor  # (C, K * K)
    pw: Tensor  # (COUT, C, 1, 1)
    dw_bias: Tensor | None  # (C,)
    pw_bias: Tensor | None  # (COUT,)


def tap_weights(dw: Tensor, g: Geometry) -> Tensor:
    """(C, 1, K, K) -> (C, K*K), with the channels innermost in memory where that is worth a launch.

    A thread holds 8 channels. Taps innermost, it loads their weights one by one, twice the L1 traffic of the pixels;
    channels innermost, in one 16-byte load. By estimate (a wavefront a cycle, 2 us a launch), that saves more than the
    copy costs from about 4 M depthwise elements on.
    """
    taps = dw.reshape(g.C, g.K * g.K)
    if taps.t().is_contiguous():  # given so, as inside ``frozen``
        return taps
    return taps.t().contiguous().t() if g.N * g.OH * g.OW * g.C >= 2**22 else taps.contiguous()


class Acts(NamedTuple):
    """Names of the activations: on the input, between the halves, on the output before or after the residual.

    One of ``post`` and ``out`` is "none".
    """

    pre: str
    mid: str
    post: str
    out: str = "none"

    def ending(self, residual: Tensor | None) -> tuple[str, str]:
        """On which side of the last activation the residual is added, "none" without one; and that activation."""
        last = self.post if self.out == "none" else self.out
        return "none" if residual is None else "after" if self.out == "none" else "before", last


def _stats_buffers(x: Tensor, tiles: int, channels: int) -> tuple[Tensor, Tensor]:
    dtype = stats_dtype(x)
    return x.new_empty(tiles, 2, channels, dtype=dtype), x.new_empty(tiles, dtype=dtype)


def separable_conv_fwd_dw(
    x: Tensor, w: Weights, g: Geometry, pre_act: str, mid: Norm | None, mid_act: str, *, stats: bool, store: bool
) -> tuple[Tensor | None, Tensor | None]:
    """x (N, C, H, W) in NHWC memory -> (u (N, C, OH, OW) the same, or None; stats (3, C) of the raw u, or None)."""
    cfg = select("separable_conv_fwd_dw", size=g.pixels, device=x.device, C=g.C, K=g.K, dtype=x.dtype)
    tiles = g.N * cdiv(g.OH, cfg.BLOCK_H) * cdiv(g.OW, cfg.BLOCK_W)
    u = empty_nhwc(x, g, g.C) if store else None
    tile_stats, counts = _stats_buffers(x, tiles, g.C) if stats else (x, x)
    (*vectors, eps), norm, affine = norm_args(mid, x)
    launch(
        _separable_conv_fwd_dw_kernel, (tiles * cdiv(g.C, cfg.BLOCK_C),),
        x, w.dw, x if w.dw_bias is None else w.dw_bias, *vectors,
        g.H, g.W, g.OH, g.OW, g.stride, g.padding, g.dilation, u if store else x, tile_stats, counts,
        MID_EPS=eps,
        C=g.C, K=g.K, DW_C=w.dw.stride(0), DW_T=w.dw.stride(1), PRE_ACT=pre_act,
        DW_BIAS=w.dw_bias is not None, MID_NORM=norm, MID_AFFINE=affine, MID_ACT=mid_act,
        STATS=stats, STORE=store, ACC=acc_dtype(x), PHASED=g.phased, **cfg.launch,
    )  # fmt: skip
    return u, batch_stats(tile_stats, counts) if stats else None


def separable_conv_fwd_fused(
    x: Tensor, w: Weights, g: Geometry, acts: Acts, mid: Norm | None, post: Norm | None, residual: Tensor | None,
    *, stats: bool, save_z: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """x (N, C, H, W) in NHWC memory -> (y, z, stats (3, COUT)): y, z (N, COUT, OH, OW) the same; or None."""
    side, act = acts.ending(residual)
    cfg = select("separable_conv_fwd_fused", size=g.pixels, device=x.device, C=g.C, COUT=g.COUT, K=g.K, dtype=x.dtype,
                 stats=stats)  # fmt: skip
    tiles = g.N * cdiv(g.OH, cfg.BLOCK_H) * cdiv(g.OW, cfg.BLOCK_W)
    y, z, tile_stats, counts = _outputs(x, g, tiles, stats, save_z)
    (*mid_vectors, mid_eps), mid_norm, mid_affine = norm_args(mid, x)
    (*post_vectors, post_eps), post_norm, post_affine = norm_args(post, x)
    dw_bias = x if w.dw_bias is None else w.dw_bias  # never read, as the next two
    pw_bias, skip = x if w.pw_bias is None else w.pw_bias, x if residual is None else residual
    launch(
        _separable_conv_fwd_fused_kernel, (tiles * cdiv(g.COUT, cfg.BLOCK_N),),
        x, w.dw, dw_bias, *mid_vectors, w.pw, pw_bias, *post_vectors, skip,
        g.H, g.W, g.OH, g.OW, g.stride, g.padding, g.dilation, bits_of(mid_eps), bits_of(post_eps),
        y if z is None else z, z if y is None else y, tile_stats, counts,
        C=g.C, COUT=g.COUT, K=g.K, DW_C=w.dw.stride(0), DW_T=w.dw.stride(1), PRE_ACT=acts.pre,
        DW_BIAS=w.dw_bias is not None, MID_NORM=mid_norm, MID_AFFINE=mid_affine, MID_ACT=acts.mid,
        PW_BIAS=w.pw_bias is not None,
        POST_NORM=post_norm, POST_AFFINE=post_affine, POST_ACT=act, RESIDUAL=side, STATS=stats, SAVE_Z=save_z,
        ACC=acc_dtype(x), PRECISION=precision(x), PHASED=g.phased, UNROLL=_all_taps_at_once(g.K, cfg, x.dtype),
        **cfg.launch,
    )  # fmt: skip
    return y, z, batch_stats(tile_stats, counts) if stats else None


def _all_taps_at_once(K: int, cfg: Config, dtype: torch.dtype) -> bool:
    """Whether registers hold nine tap tiles beside the accumulator: no chip's code spills with 100 for them
    (`make kernel-report`); with 104, 6 in fp32 on sm_80, and 128 -> 128 in blocks of 4 warps would need 136, and spills
    38. 5x5 taps are 25 tiles.

    By the static model that takes the decoder's 304 -> 256 from 465 to 302 us, and MobileNetV2's 960 -> 160 from 40 to
    15: three rows of taps wait for the L2 once, and the weights of neighbouring taps are one load.
    """
    rows, threads = cfg.BLOCK_H * cfg.BLOCK_W, 32 * cfg.num_warps
    fits = rows * (4 * cfg.BLOCK_N + 9 * dtype.itemsize * cfg.BLOCK_K) <= 100 * 4 * threads
    return K == 3 and fits and cfg.maxnreg == 255


def separable_conv_fwd_pw(
    u: Tensor, w: Weights, g: Geometry, acts: Acts, mid: Norm | None, post: Norm | None, residual: Tensor | None,
    *, stats: bool, save_z: bool, image_bias: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """u (N, C, OH, OW) in NHWC memory, before ``mid`` and ``acts.mid`` -> as ``separable_conv_fwd_fused``.

    image_bias (N, COUT) is added to z.
    """
    (side, act), pixels = acts.ending(residual), g.pixels
    cfg = select("separable_conv_fwd_pw", size=pixels, device=u.device, C=g.C, COUT=g.COUT, dtype=u.dtype)
    tiles = -(-pixels // cfg.BLOCK_M)
    y, z, tile_stats, counts = _outputs(u, g, tiles, stats, save_z)
    (*mid_vectors, mid_eps), mid_norm, mid_affine = norm_args(mid, u)
    (*post_vectors, post_eps), post_norm, post_affine = norm_args(post, u)
    pw_bias = u if w.pw_bias is None else w.pw_bias  # never read, as the next two
    own_bias, skip = u if image_bias is None else image_bias, u if residual is None else residual
    unit, unit_out = unit_of(g.C), unit_of(g.COUT)
    launch(
        _separable_conv_fwd_pw_kernel, (tiles * -(-g.COUT // cfg.BLOCK_N),),
        u, *mid_vectors, w.pw, pw_bias, own_bias, *post_vectors, skip,
        pixels, g.OH * g.OW, g.C // unit, g.COUT // unit_out, bits_of(mid_eps), bits_of(post_eps),
        y if z is None else z, z if y is None else y, tile_stats, counts,
        UNIT=unit, UNIT_OUT=unit_out, MID_NORM=mid_norm, MID_AFFINE=mid_affine, MID_ACT=acts.mid,
        PW_BIAS=w.pw_bias is not None, IMAGE_BIAS=image_bias is not None, POST_NORM=post_norm,
        POST_AFFINE=post_affine, POST_ACT=act, RESIDUAL=side, STATS=stats, SAVE_Z=save_z, ACC=acc_dtype(u),
        PRECISION=precision(u), **cfg.launch,
    )  # fmt: skip
    return y, z, batch_stats(tile_stats, counts) if stats else None


def _outputs(x: Tensor, g: Geometry, tiles: int, stats: bool, save_z: bool):
    """-> y, z, tile_stats, counts. With batch statistics to come, only z and its statistics can be written."""
    y = None if stats else empty_nhwc(x, g, g.COUT)
    z = empty_nhwc(x, g, g.COUT) if stats or save_z else None
    return y, z, *(_stats_buffers(x, tiles, g.COUT) if stats else (x, x))
