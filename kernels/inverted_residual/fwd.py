"""A whole inverted residual block in one launch: 1x1 expansion, depthwise 3x3, 1x1 projection; evaluation, NHWC.

    e = act(expand x + expand_bias)              (N, HIDDEN, H, W), and 0 outside the image
    u = act(depthwise(e) + depthwise_bias)       (N, HIDDEN, OH, OW)
    y = project u + project_bias (+ x)           (N, COUT, OH, OW)

Batch norms are folded into weights and biases. e and u never reach memory: a program owns a tile of outputs and walks
the hidden channels in blocks. Triton cannot gather from shared memory, so e is recomputed where taps share it. A row of
the tile is GROUP neighbouring outputs, and e is computed once for each of the 3 (3 + (GROUP - 1) stride) positions that
the taps of a row touch. That is P = 9, 6 or 4.5 times e for each output at stride 1, and 9, 7.5 or 6.75 at stride 2;
sharing everything would take 1.3 to 1.6 (4.5 to 6 at stride 2). It is cheap while x is thin, since the expansion is on
the matrix units; ``cost.py`` has its cost on the lanes.

Traffic in elements: A + Y + weights; the residual is in the cache. Expansion and fused pair take A + 2E + Y, E = the
expanded map, 6A in MobileNetV2. e is not rounded on its way, u once: the result is nearer to exact than that of the
parts one by one.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.common.norm_act import clamp_keeping_nan
from fastseg.kernels.common.tiles import tile_pixels
from fastseg.kernels.inverted_residual.cost import group_of
from fastseg.kernels.runtime.config import candidates, heuristic, select
from fastseg.kernels.runtime.conv_sizes import Geometry
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv, next_power_of_2
from fastseg.kernels.runtime.tensors import acc_dtype, empty_nhwc, precision


@triton.jit
def _finish(
    u, acc, dw_bias, w, limit, dtype: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """acc + project act(u + dw_bias)."""
    a = clamp_keeping_nan(u + dw_bias[None, :], limit).to(dtype)
    return tl.dot(a, w, acc, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _store(
    acc, x_ptr, y_ptr, bias, at, mask_m, offs_n, C: tl.constexpr, COUT: tl.constexpr, RESIDUAL: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The output of pixels ``at`` (int32, within the image)."""
    mask = mask_m[:, None] & (offs_n < COUT)[None, :]
    y = acc + bias[None, :]
    if RESIDUAL:  # same size, same channels
        y = y.to(y_ptr.dtype.element_ty).to(ACC)  # as torch rounds a convolution's output
        y += tl.load(x_ptr + at[:, None] * C + offs_n[None, :], mask=mask, other=0.0).to(ACC)
    tl.store(y_ptr + at[:, None] * COUT + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["H", "W", "OH", "OW"])
def _inverted_residual_fwd_kernel(
    x_ptr, expand_ptr, expand_bias_ptr, dw_ptr, dw_bias_ptr, project_ptr, project_bias_ptr,
    y_ptr,
    H, W, OH, OW, padding, dilation, limit,
    C: tl.constexpr, HIDDEN: tl.constexpr, COUT: tl.constexpr, STRIDE: tl.constexpr, RESIDUAL: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = BLOCK_H * BLOCK_W
    n, oy, group, mask_m = tile_pixels(tl.program_id(0), OH, tl.cdiv(OW, GROUP), BLOCK_H, BLOCK_W)
    ox = group * GROUP
    offs_c, offs_n = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    mask_c, mask_n = offs_c < C, offs_n < COUT
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    x_ptr += n * H * W * C
    y_ptr += n * OH * OW * COUT

    acc0 = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if GROUP > 1:
        acc1 = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if GROUP > 2:
        acc2 = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        acc3 = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for k in tl.range(0, HIDDEN, BLOCK_K, num_stages=1, loop_unroll_factor=1):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < HIDDEN
        expand = tl.load(expand_ptr + offs_k[None, :] * C + offs_c[:, None],
                         mask=mask_c[:, None] & mask_k[None, :], other=0.0)  # fmt: skip
        expand_bias = tl.load(expand_bias_ptr + offs_k, mask=mask_k, other=0.0).to(ACC)
        u0 = tl.zeros((BLOCK_M, BLOCK_K), ACC)
        if GROUP > 1:
            u1 = tl.zeros((BLOCK_M, BLOCK_K), ACC)
        if GROUP > 2:
            u2 = tl.zeros((BLOCK_M, BLOCK_K), ACC)
            u3 = tl.zeros((BLOCK_M, BLOCK_K), ACC)
        for ky in tl.range(0, 3, num_stages=1, loop_unroll_factor=1):  # unrolled, all positions' tiles are hoisted
            iy = oy * STRIDE - padding + ky * dilation
            mask_y = mask_m & (iy >= 0) & (iy < H)
            for col in tl.static_range(3 + (GROUP - 1) * STRIDE):
                ix = ox * STRIDE - padding + col * dilation
                inside = mask_y & (ix >= 0) & (ix < W)
                x = tl.load(x_ptr + (iy * W + ix)[:, None] * C + offs_c[None, :],
                            mask=inside[:, None] & mask_c[None, :], other=0.0)  # fmt: skip
                e = tl.dot(x, expand, input_precision=PRECISION, out_dtype=ACC) + expand_bias[None, :]
                upper = tl.where(inside, limit, 0.0)  # outside the image e is 0, not act(bias)
                e = clamp_keeping_nan(e, upper[:, None])
                taps = dw_ptr + offs_k * 9 + ky * 3 + col
                if col < 3:
                    u0 += e * tl.load(taps, mask=mask_k, other=0.0).to(ACC)[None, :]
                if GROUP > 1 and col >= STRIDE and col < STRIDE + 3:
                    u1 += e * tl.load(taps - STRIDE, mask=mask_k, other=0.0).to(ACC)[None, :]
                if GROUP > 2 and col >= 2 * STRIDE and col < 2 * STRIDE + 3:
                    u2 += e * tl.load(taps - 2 * STRIDE, mask=mask_k, other=0.0).to(ACC)[None, :]
                if GROUP > 2 and col >= 3 * STRIDE:
                    u3 += e * tl.load(taps - 3 * STRIDE, mask=mask_k, other=0.0).to(ACC)[None, :]
        dw_bias = tl.load(dw_bias_ptr + offs_k, mask=mask_k, other=0.0).to(ACC)
        project = tl.load(project_ptr + offs_n[None, :] * HIDDEN + offs_k[:, None],
                          mask=mask_k[:, None] & mask_n[None, :], other=0.0)  # fmt: skip
        acc0 = _finish(u0, acc0, dw_bias, project, limit, dtype, ACC, PRECISION)
        if GROUP > 1:
            acc1 = _finish(u1, acc1, dw_bias, project, limit, dtype, ACC, PRECISION)
        if GROUP > 2:
            acc2 = _finish(u2, acc2, dw_bias, project, limit, dtype, ACC, PRECISION)
            acc3 = _finish(u3, acc3, dw_bias, project, limit, dtype, ACC, PRECISION)

    bias = tl.load(project_bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    at = oy * OW + ox
    _store(acc0, x_ptr, y_ptr, bias, at, mask_m, offs_n, C, COUT, RESIDUAL, ACC)
    if GROUP > 1:
        _store(acc1, x_ptr, y_ptr, bias, at + 1, mask_m & (ox + 1 < OW), offs_n, C, COUT, RESIDUAL, ACC)
    if GROUP > 2:
        _store(acc2, x_ptr, y_ptr, bias, at + 2, mask_m & (ox + 2 < OW), offs_n, C, COUT, RESIDUAL, ACC)
        _store(acc3, x_ptr, y_ptr, bias, at + 3, mask_m & (ox + 3 < OW), offs_n, C, COUT, RESIDUAL, ACC)


class Weights(NamedTuple):
    """Folded and contiguous: weights in the dtype of x, biases in any float dtype."""

    expand: Tensor  # (HIDDEN, C, 1, 1)
    expand_bias: Tensor  # (HIDDEN,)
    depthwise: Tensor  # (HIDDEN, 1, 3, 3)
    depthwise_bias: Tensor  # (HIDDEN,)
    project: Tensor  # (COUT, HIDDEN, 1, 1)
    project_bias: Tensor  # (COUT,)


LIMITS = {"relu6": 6.0, "relu": float("inf")}  # upper ends of the activations


def inverted_residual_fwd(x: Tensor, w: Weights, act: str, stride: int, dilation: int, residual: bool) -> Tensor:
    """x (N, C, H, W) in NHWC memory -> y (N, COUT, ceil(H / stride), ceil(W / stride)), NHWC."""
    N, C, H, W = x.shape
    OH, OW = cdiv(H, stride), cdiv(W, stride)
    HIDDEN, COUT = w.expand.shape[0], w.project.shape[0]
    g = Geometry(N, C, H, W, COUT, OH, OW, 3, stride, dilation, dilation)
    y = empty_nhwc(x, g, COUT)
    if y.numel() == 0:
        return y
    cfg = select("inverted_residual_fwd", size=g.pixels, device=x.device, C=C, COUT=COUT, stride=stride,
                 dilation=dilation, dtype=x.dtype)  # fmt: skip
    assert cfg.GROUP == 1 or dilation == 1, "neighbouring outputs share positions only without dilation"
    tiles = N * cdiv(OH, cfg.BLOCK_H) * cdiv(cdiv(OW, cfg.GROUP), cfg.BLOCK_W)
    power = lambda n: max(16, next_power_of_2(n))
    launch(
        _inverted_residual_fwd_kernel, (tiles,), x, *w, y, H, W, OH, OW, dilation, dilation, LIMITS[act],
        C=C, HIDDEN=HIDDEN, COUT=COUT, STRIDE=stride, RESIDUAL=residual, ACC=acc_dtype(x), PRECISION=precision(x),
        BLOCK_C=power(C), BLOCK_N=power(COUT), **cfg.launch,
    )  # fmt: skip
    return y


@heuristic("inverted_residual_fwd")
def _config(size: int, C: int, COUT: int, stride: int, dilation: int, dtype: torch.dtype) -> dict[str, int]:
    """64 rows are what wgmma takes; GROUP as wide as its accumulators leave room for (``group_of``).

    32 hidden channels spill with four outputs a row, in fp32, and with 128 output channels (94, 4 and 16 on sm_80).
    """
    group = group_of(size, C, COUT, stride, dilation, dtype)
    narrow = group == 4 or dtype.itemsize > 2 or COUT > 64
    return {"BLOCK_H": 8, "BLOCK_W": 8, "GROUP": group, "BLOCK_K": 16 if narrow else 32,
            "num_warps": 4, "num_stages": 1, "maxnreg": 255}  # fmt: skip


@candidates("inverted_residual_fwd")
def _candidates(size: int, C: int, COUT: int, stride: int, dilation: int, dtype: torch.dtype) -> list[dict[str, int]]:
    return [
        {"BLOCK_H": h, "BLOCK_W": w, "GROUP": g, "BLOCK_K": k, "num_warps": warps, "num_stages": 1, "maxnreg": 255}
        for h, w, warps in ((8, 8, 4), (16, 4, 4), (4, 16, 4), (16, 8, 8), (8, 16, 8))
        for g in ((1,) if dilation > 1 else (1, 2, 4))
        for k in (16, 32, 64)
    ]
