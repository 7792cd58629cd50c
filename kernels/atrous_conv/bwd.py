"""Weight gradient of atrous convolutions; ``fwd.py`` has the whole design.

    dw_b[o, ky, kx, c] = sum over the pixels p where the tap is valid of dy[p, b COUT + o] x[p + shift(b, ky, kx), c]

Each branch and tap is one GEMM whose sum runs over the rectangle of those pixels in all images. The rows of all images
are cut into parts, the same for every tap, which are added in a fixed order: two runs give the same bits. Traffic in
elements: A + Y + the partial sums; taps and blocks of channels re-read A and Y from the cache.

A part's programs follow each other. In it blocks of output channels are fastest, then taps, those of larger rectangles
first: programs that run at one time then walk through the images at about one speed, and find in the L2 what another
has read. With an L2 of 48 MB an ASPP of 2048 channels at 16 x 32 x 32 reads A and Y 1.1 times; with the taps in their
own order, 1.7 times (`tests/kernels/test_order_of_work_atrous.py`). With 60 MB both orders read them once.
"""

from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.atrous_conv.regions import Branch, by_pixels
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
    FIRST: tl.constexpr, ORDER: tl.constexpr, BRANCHES: tl.constexpr, TAPS: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw_ptr: (parts, total), in ACC. FIRST: how many taps the branches before have; ORDER: of all taps."""
    BLOCKS_N: tl.constexpr = (COUT + BLOCK_N - 1) // BLOCK_N
    BLOCKS_K: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    offs_n = program % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)  # output channels
    tap = chosen(program // BLOCKS_N % TAPS, ORDER, TAPS)
    offs_k = program // (BLOCKS_N * TAPS) % BLOCKS_K * BLOCK_K + tl.arange(0, BLOCK_K)  # input channels
    part = program // (BLOCKS_N * TAPS * BLOCKS_K)
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
    # A part's rows of all images, N H of them; of those, the ones in the rectangle; its pixels in them. 0 of a tap that
    # is valid nowhere.
    per_part = tl.cdiv(N * H, parts)
    top, bottom = tl.minimum(part * per_part, N * H), tl.minimum((part + 1) * per_part, N * H)
    begin = (top // H * h + clamp_index(top % H - y0, h)) * w * known.to(tl.int32)
    end = (bottom // H * h + clamp_index(bottom % H - y0, h)) * w * known.to(tl.int32)
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
    programs = sum(taps) * cdiv(COUT, cfg.BLOCK_N) * cdiv(C, cfg.BLOCK_K)
    parts = min(cdiv(PROGRAMS, programs), cdiv(N * H * W, cfg.BLOCK_M), N * H)
    total = sum(COUT * C * K * K for K in kernels)
    dw = x.new_empty(parts, total, dtype=stats_dtype(x))
    launch(
        _atrous_conv_bwd_weight_kernel, (programs * parts,),
        dy, x, dw, N, H, W, parts, total,
        C=C, COUT=COUT, CY=dy.shape[1], KERNELS=tuple(kernels), DILATIONS=tuple(min(d, FAR) for d in dilations),
        FIRST=tuple(accumulate(taps[:-1], initial=0)), ORDER=by_pixels(branches), BRANCHES=len(kernels),
        TAPS=sum(taps), ACC=acc_dtype(x),
        PRECISION=precision(x), **cfg.launch,
    )  # fmt: skip
    return dw.sum(0) if parts > 1 else dw[0]
