"""Forward of cross entropy of upsampled logits; ``cross_entropy.py`` has the whole design."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.common.bilinear import mix, nan_blind_maximum, source_coordinate, to_second, upsample_tile
from fastseg.kernels.runtime.config import candidates, heuristic, select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv, next_power_of_2
from fastseg.kernels.runtime.tensors import acc_dtype, stats_dtype
from fastseg.kernels.upsample.sizes import Loss, Upsampling, row_block, row_splits

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_target(target_ptr, offs, mask, ignore_index, C: tl.constexpr):
    """-> classes (int32) of the pixels that count, -1 elsewhere; which pixels name no class and are not ignored."""
    target = tl.load(target_ptr + offs, mask=mask, other=0).to(tl.int64)  # compared as int64: 2^32 + 3 is not 3
    counts = mask & (target != ignore_index)
    inside = (target >= 0) & (target < C)
    target = nan_blind_maximum(tl.minimum(target, C - 1), 0).to(tl.int32)
    return tl.where(counts & inside, target, -1), counts & ~inside


@triton.jit
def less_factor(lse, factor, ACC: tl.constexpr):
    """``lse - log2 |factor|``, whose lowest bit says whether the factor is negative."""
    BITS: tl.constexpr = tl.int64 if ACC == tl.float64 else tl.int32  # noqa: SIM300
    lse -= tl.log2(tl.abs(factor))
    bits = (lse.to(BITS, bitcast=True) & -2) | (factor < 0).to(BITS)
    return tl.where((factor == 0) | (lse != lse), lse, bits.to(ACC, bitcast=True))


@triton.jit
def factor_sign(lse, ACC: tl.constexpr):
    """-1 where ``less_factor`` found a negative one, else 1."""
    BITS: tl.constexpr = tl.int64 if ACC == tl.float64 else tl.int32  # noqa: SIM300
    return (1 - 2 * (lse.to(BITS, bitcast=True) & 1)).to(ACC)


@triton.jit
def _along_x(row_ptr, left, right, mask, w0, w1):
    """One low-resolution row interpolated along x."""
    a = tl.load(row_ptr + left, mask=mask, other=0.0).to(w0.dtype)
    b = tl.load(row_ptr + right, mask=mask, other=0.0).to(w0.dtype)
    return mix(w0, a, w1, b)


@triton.jit(
    do_not_specialize=["h", "w", "H", "splits", "stride_n", "stride_y"],
    do_not_specialize_on_alignment=["stride_c", "stride_x"],
)
def _upsample_cross_entropy_fwd_kernel(
    x_ptr, target_ptr, weight_ptr, loss_ptr, lse_ptr, sums_ptr,
    h, w, H, W, scale_h, scale_w, inverse_h, splits, stride_n, stride_c, stride_y, stride_x,
    ignore_index, smoothing,
    C: tl.constexpr, ALIGN_CORNERS: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr,
    STORE_LOSS: tl.constexpr, STORE_LSE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, NAMED: tl.constexpr = True,
):  # fmt: skip
    # not NAMED: there is no target, and only the log-sum of each pixel is left
    tile = tl.program_id(0)
    n, y0, row_first, row_end, column = upsample_tile(tile, h, H, W, scale_h, inverse_h, splits,
                                                      ALIGN_CORNERS, ACC, BLOCK_H, BLOCK_W)  # fmt: skip
    offs_w = column + tl.arange(0, BLOCK_W)
    x0, x1, w1 = source_coordinate(offs_w, w, scale_w, ALIGN_CORNERS, ACC)  # (BLOCK_W,)
    w0, w1 = (1 - w1) * _LOG2E, w1 * _LOG2E  # logits in units of log 2: the exponential is then one instruction
    left, right = x0 * stride_x, x1 * stride_x
    top_ptr = x_ptr + n * stride_n + y0 * stride_y
    bottom_ptr = top_ptr + (tl.minimum(y0 + to_second(scale_h, 0.0), h - 1) - y0) * stride_y
    loss_sum = tl.zeros((BLOCK_H, BLOCK_W), ACC)
    weight_sum = tl.zeros((BLOCK_H, BLOCK_W), ACC)
    outside = tl.zeros((BLOCK_H, BLOCK_W), tl.int32)
    for row in range(row_first, row_end, BLOCK_H * splits):
        offs_h = row + tl.arange(0, BLOCK_H)
        h1 = source_coordinate(offs_h, h, scale_h, ALIGN_CORNERS, ACC)[2]
        h1 = h1[:, None]
        h0 = 1 - h1
        # online softmax: s = sum of 2^(v - m) so far; m starts finite, so that -inf - m is no NaN
        m = tl.full((BLOCK_H, BLOCK_W), -3.0e38, ACC)
        s = tl.zeros((BLOCK_H, BLOCK_W), ACC)
        all_top = tl.zeros((BLOCK_W,), ACC)  # sums over classes of weight * logit, along the low-resolution rows
        all_bottom = tl.zeros((BLOCK_W,), ACC)
        all_weight = tl.zeros((BLOCK_C,), ACC)
        for c in tl.range(0, C, BLOCK_C, num_stages=1):
            classes = c + tl.arange(0, BLOCK_C)
            planes, known = (classes * stride_c)[:, None], (classes < C)[:, None]
            top = _along_x(top_ptr + planes, left, right, known, w0, w1)  # (BLOCK_C, BLOCK_W)
            bottom = _along_x(bottom_ptr + planes, left, right, known, w0, w1)
            if SMOOTH:
                factor = tl.full((BLOCK_C,), 1.0, ACC)
                if WEIGHTED:
                    factor = tl.load(weight_ptr + classes, mask=classes < C, other=0.0).to(ACC)
                    all_weight += factor
                all_top += tl.sum(factor[:, None] * top, axis=0)
                all_bottom += tl.sum(factor[:, None] * bottom, axis=0)
            if C % BLOCK_C != 0:
                top, bottom = tl.where(known, top, -2.0e38), tl.where(known, bottom, -2.0e38)
            v = mix(h0[None], top[:, None, :], h1[None], bottom[:, None, :])  # (BLOCK_C, BLOCK_H, BLOCK_W)
            largest = nan_blind_maximum(m, tl.reduce(v, 0, nan_blind_maximum))  # NaN reaches s below
            s = s * tl.exp2(m - largest) + tl.sum(tl.exp2(v - largest[None]), axis=0)
            m = largest

        mask = (offs_h < row_end)[:, None] & (offs_w < W)[None, :]
        offs = n * H * W + offs_h[:, None] * W + offs_w[None, :]
        if not NAMED:
            tl.store(lse_ptr + offs, m + tl.log2(s), mask=mask)
        else:
            target, bad = load_target(target_ptr, offs, mask, ignore_index, C)
            counts = target >= 0
            plane = target.to(tl.int64) * stride_c
            top = _along_x(top_ptr + plane, left, right, counts, w0, w1)  # (BLOCK_H, BLOCK_W)
            bottom = _along_x(bottom_ptr + plane, left, right, counts, w0, w1)
            log_s = tl.log2(s)
            loss = (m - mix(h0, top, h1, bottom)) + log_s  # of one class: the target's
            factor = tl.where(counts, 1.0, 0.0).to(ACC)
            if WEIGHTED:
                factor = tl.load(weight_ptr + target, mask=counts, other=0.0).to(ACC)
            weight_sum += factor
            lse = m + log_s
            if SMOOTH:
                total = tl.sum(all_weight, axis=0) if WEIGHTED else C * 1.0
                spread = total * lse - (h0 * all_top[None] + h1 * all_bottom[None])
                loss = factor * (1 - smoothing) * loss + smoothing / C * spread
                if WEIGHTED:
                    lse = less_factor(lse, tl.where(counts, factor * (1 - smoothing) + smoothing / C * total, 1.0), ACC)
            elif WEIGHTED:
                loss = factor * loss
                lse = less_factor(lse, tl.where(counts, factor, 1.0), ACC)
            loss = tl.where(counts, loss * _LN2, tl.where(bad, float("nan"), 0.0))
            if STORE_LOSS:
                tl.store(loss_ptr + offs, loss.to(loss_ptr.dtype.element_ty), mask=mask)
            if STORE_LSE:
                lse = tl.where(counts | (lse != lse), lse, float("inf"))  # 0 times a NaN is NaN, ignored or not
                tl.store(lse_ptr + offs, lse, mask=mask)
            loss_sum += loss
            outside += bad.to(tl.int32)
    if NAMED:
        sums_ptr += tile.to(tl.int64) * 3
        tl.store(sums_ptr, tl.sum(tl.sum(loss_sum, axis=1), axis=0))
        tl.store(sums_ptr + 1, tl.sum(tl.sum(weight_sum, axis=1), axis=0))
        tl.store(sums_ptr + 2, tl.sum(tl.sum(outside, axis=1), axis=0).to(ACC))


def upsample_cross_entropy_fwd(
    x: Tensor, target: Tensor, weight: Tensor | None, up: Upsampling, loss: Loss, *, losses: Tensor | None,
    save_lse: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """x (N, C, h, w), target (N, H, W) contiguous; losses (N, H, W) to be filled -> (losses, lse (N, H, W), sums (3,)).

    ``lse`` is what the backward reads: log2 of the sum over classes less log2 of the pixel's factor, as ``less_factor``
    has it; inf where ignored.
    ``sums``: of the losses, of the targets' weights, and the number of targets that name no class.
    """
    N, C, h, _ = x.shape
    kind = stats_dtype(x)
    lse = x.new_empty(target.shape, dtype=kind) if save_lse else None
    if target.numel() == 0:
        return losses, lse, x.new_zeros(3, dtype=kind)
    cfg = select("upsample_cross_entropy_fwd", size=target.numel(), device=x.device, C=C, dtype=x.dtype,
                 factor=up.factor)  # fmt: skip
    splits = row_splits(up)
    programs = N * h * splits * cdiv(up.x.full, cfg.BLOCK_W)
    sums = x.new_empty(programs, 3, dtype=kind)
    *sizes, _ = up.arguments()
    launch(
        _upsample_cross_entropy_fwd_kernel, (programs,),
        x, target, sums if weight is None else weight, sums if losses is None else losses, sums if lse is None else lse,
        sums, *sizes, splits, *x.stride(), loss.ignore_index, float(loss.label_smoothing),
        C=C, ALIGN_CORNERS=up.align_corners, WEIGHTED=weight is not None, SMOOTH=loss.label_smoothing > 0,
        STORE_LOSS=losses is not None, STORE_LSE=save_lse, ACC=acc_dtype(x), **cfg.launch,
    )  # fmt: skip
    return losses, lse, sums.sum(0)


def upsample_log_sum(x: Tensor, up: Upsampling) -> Tensor:
    """x (N, C, h, w) -> log2 of the sum over classes of exp(upsampled logits), (N, H, W)."""
    N, C, h, _ = x.shape
    lse = x.new_empty(N, up.y.full, up.x.full, dtype=stats_dtype(x))
    cfg = select("upsample_cross_entropy_fwd", size=lse.numel(), device=x.device, C=C, dtype=x.dtype, factor=up.factor)
    splits = row_splits(up)
    *sizes, _ = up.arguments()
    launch(
        _upsample_cross_entropy_fwd_kernel, (N * h * splits * cdiv(up.x.full, cfg.BLOCK_W),),
        x, lse, lse, lse, lse, lse, *sizes, splits, *x.stride(), 0, 0.0, C=C, ALIGN_CORNERS=up.align_corners,
        WEIGHTED=False, SMOOTH=False, STORE_LOSS=False, STORE_LSE=True, ACC=acc_dtype(x), NAMED=False, **cfg.launch,
    )  # fmt: skip
    return lse


@heuristic("upsample_cross_entropy_fwd")
def _fwd_config(size: int, C: int, dtype: torch.dtype, factor: int) -> dict[str, int]:
    """One column a thread; 32 values of it at once hide the exponentials' latency."""
    rows = row_block(factor)
    block_c = min(next_power_of_2(C), max(4, 32 // rows))
    return {"BLOCK_H": rows, "BLOCK_W": 128, "BLOCK_C": block_c, "num_warps": 4}


@candidates("upsample_cross_entropy_fwd")
def _fwd_candidates(size: int, C: int, dtype: torch.dtype, factor: int) -> list[dict[str, int]]:
    rows = row_block(factor)
    return [
        {"BLOCK_H": r, "BLOCK_W": columns, "BLOCK_C": c, "num_warps": warps}
        for r in dict.fromkeys((rows, max(1, rows // 2)))
        for columns, warps in ((64, 2), (128, 4), (256, 8))
        for c in (2, 4, 8, 16)
    ]
