"""Weight gradient of atrous convolutions; ``fwd.py`` has the whole design.

    dw_b[o, ky, kx, c] = sum over the pixels p where the tap is valid of dy[p, b COUT + o] x[p + shift(b, ky, kx), c]

Each branch and tap is one GEMM whose sum runs over the rectangle of those pixels in all images. Its rows are cut into
parts, which are added in a fixed order: two runs give the same bits. Traffic in elements: A + Y + the partial sums;
taps and blocks of channels re-read A and Y from the cache.
"""

from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.atrous_conv.regions import Branch
from fastseg.kernels.atrous_conv.tables import FAR, chosen
from fastseg.kernels.common.tiles import clamp_index
from fastseg.kernels.runtime.config import select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv
from fastseg.kernels.runtime.tensors import acc_dtype, precision, stats_dtype

PROGRAMS = 264  # two for each multiprocessor of an H200: fewer, and the sums are split


@triton.jit(do_not_specialize=["N", "H", "W", "parts"])
def _atrous_conv_bwd_weight_kernel(
    dy_ptr, x_ptr,
    dw_ptr,
    N, H, W, parts, total,
    C: tl.constexpr, COUT: tl.constexpr, CY: tl.constexpr, KERNELS: tl.constexpr, DILATIONS: tl.constexpr,
    FIRST: tl.constexpr, BRANCHES: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw_ptr: (parts, total), in ACC. FIRST: how many taps the branches before have."""
    BLOCKS_N: tl.constexpr = (COUT + BLOCK_N - 1) // BLOCK_N
    part = tl.program_id(0) % parts
    tap = tl.program_id(0) // parts
    offs_n = tl.program_id(1) % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)  # output channels
    offs_k = tl.program_id(1) // BLOCKS_N * BLOCK_K + tl.arange(0, BLOCK_K)  # input channels
    mask_n, mask_k = offs_n < COUT, offs_k < C

    # Which tap of which branch, how far it reads in pixels, and the rectangle where it is valid. The clamps change
    # nothing: they are bounds that the check of offsets can follow.
    branch = tap * 0
    for b in tl.static_range(1, BRANCHES):
        branch += (tap >= FIRST[b]).to(tl.int32)
    K, dilation = chosen(branch, KERNELS, BRANCHES), chosen(branch, DILATIONS, BRANCHES)
    first = chosen(branch, FIRST, BRANCHES)
    away_y, away_x = ((tap - first) // K - K // 2) * dilation, ((tap - first) % K - K // 2) * dilation
    y0, x0 = clamp_index(-away_y, H - 1), clamp_index(-away_x, W - 1)
    h = H - tl.where(away_y < 0, -away_y, away_y)
    w = W - tl.where(away_x < 0, -away_x, away_x)
    known = (h > 0) & (w > 0)
    h, w = clamp_index(h - 1, H - 1) + 1, clamp_index(w - 1, W - 1) + 1
    shift = tl.where(known, away_y.to(tl.int64) * W + away_x, 0)
    place, stride = (first * COUT + tap - first).to(tl.int64) * C, (K * K).to(tl.int64) * C
    rows = N * h * w * known.to(tl.int32)  # 0 of a tap that is valid nowhere
    per_part = tl.cdiv(tl.cdiv(rows, parts), BLOCK_M) * BLOCK_M
    begin = tl.minimum(part * per_part, rows)
    end = tl.minimum(begin + per_part, rows)
    dy_ptr += branch.to(tl.int64) * COUT
    x_ptr += shift * C

    row = begin + tl.arange(0, BLOCK_M)
    n, at = row // (h * w), row % (h * w)
    v, u = at // w, at % w  # row and column within the rectangle
    step_n, step_at = BLOCK_M // (h * w), BLOCK_M % (h * w)
    step_v, step_u = step_at // w, step_at % w
    acc = tl.zeros((BLOCK_N, BLOCK_K), ACC)
    for m in range(begin, end, BLOCK_M):
        mask_m = m + tl.arange(0, BLOCK_M) < end
        pixel = tl.minimum(n, N - 1).to(tl.int64) * (H * W)
        pixel += tl.minimum(y0 + v, H - 1) * W + tl.minimum(x0 + u, W - 1)
        dy = tl.load(dy_ptr + pixel[:, None] * CY + offs_n[None, :], mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        x = tl.load(x_ptr + pixel[:, None] * C + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION, out_dtype=ACC)
        # BLOCK_M rows on, without a division: at most one carry from columns to rows, and one from rows to images.
        u += step_u
        carry = (u >= w).to(tl.int32)
        u -= carry * w
        v += step_v + carry
        carry = (v >= h).to(tl.int32)
        v -= carry * h
        n += step_n + carry
    offs = part.to(tl.int64) * total + place + offs_n.to(tl.int64)[:, None] * stride + offs_k[None, :]
    tl.store(dw_ptr + offs, acc, mask=mask_n[:, None] & mask_k[None, :])


def atrous_conv_bwd_weight(dy: Tensor, x: Tensor, kernels: list[int], dilations: list[int]) -> Tensor:
    """dy (N, B COUT, H, W), x (N, C, H, W), NHWC in memory -> B parts of COUT K K C, flat, in the dtype of sums."""
    branches = tuple(Branch(K, d) for K, d in zip(kernels, dilations, strict=True))
    (N, C, H, W), COUT = x.shape, dy.shape[1] // len(kernels)
    cfg = select("atrous_conv_bwd_weight", size=N * H * W, device=x.device, C=C, COUT=COUT, dtype=x.dtype)
    taps = [branch.K**2 for branch in branches]
    blocks = cdiv(COUT, cfg.BLOCK_N) * cdiv(C, cfg.BLOCK_K)
    parts = min(cdiv(PROGRAMS, sum(taps) * blocks), cdiv(N * H * W, cfg.BLOCK_M))
    total = sum(COUT * C * K * K for K in kernels)
    dw = x.new_empty(parts, total, dtype=stats_dtype(x))
    launch(
        _atrous_conv_bwd_weight_kernel, (sum(taps) * parts, blocks),
        dy, x, dw, N, H, W, parts, total,
        C=C, COUT=COUT, CY=dy.shape[1], KERNELS=tuple(kernels), DILATIONS=tuple(min(d, FAR) for d in dilations),
        FIRST=tuple(accumulate(taps[:-1], initial=0)), BRANCHES=len(kernels), ACC=acc_dtype(x),
        PRECISION=precision(x), **cfg.launch,
    )  # fmt: skip
    return dw.sum(0) if parts > 1 else dw[0]
