"""Sums over the pixels of bilinearly upsampled logits, for losses of regions; the full-size logits are never stored.

    S_nck = sum over pixels of m f_k(v_c, y_c)            f_k: the columns of ``fastseg/ops/core/loss_columns.py``
    dv_c  = m h_c - p_c D,  D = sum_j m h_j               softmax; h_c = sum_k (dL / dS_nck) df_k / d log p_c
    dv_c  = m h_c                                         sigmoid; h_c = sum_k (dL / dS_nck) df_k / dv_c
    dx    = the transpose of the interpolation, applied to dv

Forward, softmax: ``cross_entropy_fwd`` leaves the log-sum of each pixel, of which labels of each class, probabilities
among them, read nothing; then, as for sigmoid at once, a program owns a
block of classes and BLOCK_W columns of a segment of cell rows, keeps its sums in registers while the pixels pass by,
and writes each once. Parts are added in fp64. No atomics, a fixed order: two runs give the same bits.

Backward, softmax: one walk over all classes leaves D, one number a pixel; ``cross_entropy_bwd`` then gathers, with dv
as here in place of its own.

Traffic in elements: forward reads N C h w logits, the labels and N H W log-sums, writes N C K sums for each segment and
block of columns (softmax: and what ``cross_entropy_fwd`` has; with labels of each class N C h w read, N H W written).
Backward reads the three and N C K slopes, writes N H W of D, reads all again and D, writes N C h w. Sums and D were not
kept in one launch with the log-sum: a class's sums need the log-sum of all, and in registers they would cost K numbers
for each class and thread.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.common.bilinear import first_output, mix, source_coordinate, to_second, upsample_tile
from fastseg.kernels.runtime.config import candidates, heuristic, select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv, next_power_of_2
from fastseg.kernels.runtime.tensors import acc_dtype, stats_dtype
from fastseg.kernels.upsample.cross_entropy_fwd import _LOG2E, _along_x
from fastseg.kernels.upsample.loss_terms import activated, load_labels, load_slopes, share, total_slope
from fastseg.kernels.upsample.sizes import Upsampling, row_block, row_splits

Spec = tuple[tuple[int, float, float], ...]  # (code, gamma, threshold) of each column
PROGRAMS = 2048  # fill the SMs of an H200 several times; each writes its sums once


@triton.jit(
    do_not_specialize=["h", "w", "H", "segment", "segments", "blocks_c", "stride_n", "stride_y"],
    do_not_specialize_on_alignment=["stride_c", "stride_x"],
)
def _upsample_loss_sums_kernel(
    x_ptr, target_ptr, weight_ptr, lse_ptr, sums_ptr,
    h, w, H, W, scale_h, scale_w, inverse_h, segment, segments, blocks_c, stride_n, stride_c, stride_y, stride_x,
    ignore_index,
    C: tl.constexpr, SPEC: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, EACH: tl.constexpr,
    WEIGHTED: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    blocks_w = tl.cdiv(W, BLOCK_W)
    pid_w, tile = tile % blocks_w, tile // blocks_w
    pid_c, tile = tile % blocks_c, tile // blocks_c
    pid_s = tile % segments
    n = (tile // segments).to(tl.int64)
    x_ptr += n * stride_n
    lse_ptr += n * H * W
    weight_ptr += n * H * W
    target_ptr += n * (C if EACH else 1) * H * W
    offs_w = pid_w * BLOCK_W + tl.arange(0, BLOCK_W)
    x0, x1, w1 = source_coordinate(offs_w, w, scale_w, ALIGN_CORNERS, ACC)  # (BLOCK_W,)
    w0, w1 = (1 - w1) * _LOG2E, w1 * _LOG2E  # logits in units of log 2, as the log-sum
    left, right = x0 * stride_x, x1 * stride_x
    classes = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    planes, known = (classes * stride_c)[:, None], (classes < C)[:, None]
    a = tl.zeros((BLOCK_C, BLOCK_W), ACC)
    b = tl.zeros((BLOCK_C, BLOCK_W), ACC)
    c = tl.zeros((BLOCK_C, BLOCK_W), ACC)
    d = tl.zeros((BLOCK_C, BLOCK_W), ACC)
    e = tl.zeros((BLOCK_C, BLOCK_W), ACC)
    f = tl.zeros((BLOCK_C, BLOCK_W), ACC)
    y_first = pid_s * segment
    for step in range(0, tl.minimum(segment, h - y_first)):
        y = y_first + step
        row_first = first_output(y, h, H, scale_h, inverse_h, ALIGN_CORNERS, ACC)
        row_end = first_output(y + 1, h, H, scale_h, inverse_h, ALIGN_CORNERS, ACC)
        top_ptr = x_ptr + y * stride_y
        bottom_ptr = x_ptr + tl.minimum(y + to_second(scale_h, 0.0), h - 1) * stride_y
        top = _along_x(top_ptr + planes, left, right, known, w0, w1)  # (BLOCK_C, BLOCK_W)
        bottom = _along_x(bottom_ptr + planes, left, right, known, w0, w1)
        for row in range(row_first, row_end, BLOCK_H):
            offs_h = row + tl.arange(0, BLOCK_H)
            h1 = source_coordinate(offs_h, h, scale_h, ALIGN_CORNERS, ACC)[2][:, None]
            v = mix((1 - h1)[None], top[:, None, :], h1[None], bottom[:, None, :])  # (BLOCK_C, BLOCK_H, BLOCK_W)
            mask = (offs_h < row_end)[:, None] & (offs_w < W)[None, :]
            offs = offs_h[:, None] * W + offs_w[None, :]
            label, m = load_labels(target_ptr, weight_ptr, offs, classes, mask, H * W, ignore_index,
                                   C, EACH, WEIGHTED, ACC)  # fmt: skip
            lse = v
            if not SIGMOID:
                lse = tl.load(lse_ptr + offs, mask=mask, other=0.0)[None]
            p, aux = activated(v, lse, SIGMOID)
            a += _added(SPEC[0][0], SPEC[0][1], SPEC[0][2], p, aux, label, m)
            if K > 1:
                b += _added(SPEC[1][0], SPEC[1][1], SPEC[1][2], p, aux, label, m)
            if K > 2:
                c += _added(SPEC[2][0], SPEC[2][1], SPEC[2][2], p, aux, label, m)
            if K > 3:
                d += _added(SPEC[3][0], SPEC[3][1], SPEC[3][2], p, aux, label, m)
            if K > 4:
                e += _added(SPEC[4][0], SPEC[4][1], SPEC[4][2], p, aux, label, m)
            if K > 5:
                f += _added(SPEC[5][0], SPEC[5][1], SPEC[5][2], p, aux, label, m)
    part = (n * segments + pid_s) * blocks_w + pid_w
    sums_ptr += part * (C * K) + classes * K
    known = classes < C
    tl.store(sums_ptr, tl.sum(a, axis=1), mask=known)
    if K > 1:
        tl.store(sums_ptr + 1, tl.sum(b, axis=1), mask=known)
    if K > 2:
        tl.store(sums_ptr + 2, tl.sum(c, axis=1), mask=known)
    if K > 3:
        tl.store(sums_ptr + 3, tl.sum(d, axis=1), mask=known)
    if K > 4:
        tl.store(sums_ptr + 4, tl.sum(e, axis=1), mask=known)
    if K > 5:
        tl.store(sums_ptr + 5, tl.sum(f, axis=1), mask=known)


@triton.jit
def _added(CODE: tl.constexpr, GAMMA: tl.constexpr, THRESHOLD: tl.constexpr, p, aux, y, m):
    """What the rows of a tile add to a sum: -> (BLOCK_C, BLOCK_W). No NaN of a pixel that does not count."""
    f = share(CODE, GAMMA, THRESHOLD, p, aux, y)
    return tl.sum(tl.where(m == 0, 0.0, m * f), axis=1)


@triton.jit(
    do_not_specialize=["h", "w", "H", "splits", "stride_n", "stride_y"],
    do_not_specialize_on_alignment=["stride_c", "stride_x"],
)
def _upsample_loss_inner_kernel(
    x_ptr, target_ptr, weight_ptr, lse_ptr, slopes_ptr, inner_ptr,
    h, w, H, W, scale_h, scale_w, inverse_h, splits, stride_n, stride_c, stride_y, stride_x, ignore_index,
    C: tl.constexpr, SPEC: tl.constexpr, K: tl.constexpr, EACH: tl.constexpr, WEIGHTED: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n, y0, row_first, row_end, column = upsample_tile(tl.program_id(0), h, H, W, scale_h, inverse_h, splits,
                                                      ALIGN_CORNERS, ACC, BLOCK_H, BLOCK_W)  # fmt: skip
    offs_w = column + tl.arange(0, BLOCK_W)
    x0, x1, w1 = source_coordinate(offs_w, w, scale_w, ALIGN_CORNERS, ACC)  # (BLOCK_W,)
    w0, w1 = (1 - w1) * _LOG2E, w1 * _LOG2E
    left, right = x0 * stride_x, x1 * stride_x
    top_ptr = x_ptr + n * stride_n + y0 * stride_y
    bottom_ptr = top_ptr + (tl.minimum(y0 + to_second(scale_h, 0.0), h - 1) - y0) * stride_y
    image = n * H * W
    for row in range(row_first, row_end, BLOCK_H * splits):
        offs_h = row + tl.arange(0, BLOCK_H)
        h1 = source_coordinate(offs_h, h, scale_h, ALIGN_CORNERS, ACC)[2][:, None]
        mask = (offs_h < row_end)[:, None] & (offs_w < W)[None, :]
        offs = offs_h[:, None] * W + offs_w[None, :]
        lse = tl.load(lse_ptr + image + offs, mask=mask, other=0.0)[None]
        inner = tl.zeros((BLOCK_H, BLOCK_W), ACC)
        for first in tl.range(0, C, BLOCK_C, num_stages=1):
            classes = first + tl.arange(0, BLOCK_C)
            planes, known = (classes * stride_c)[:, None], (classes < C)[:, None]
            top = _along_x(top_ptr + planes, left, right, known, w0, w1)  # (BLOCK_C, BLOCK_W)
            bottom = _along_x(bottom_ptr + planes, left, right, known, w0, w1)
            v = mix((1 - h1)[None], top[:, None, :], h1[None], bottom[:, None, :])
            label, m = load_labels(target_ptr + image * (C if EACH else 1), weight_ptr + image, offs, classes, mask,
                                   H * W, ignore_index, C, EACH, WEIGHTED, ACC)  # fmt: skip
            p, aux = activated(v, lse, False)
            a, b, c, d, e, f = load_slopes(slopes_ptr, n, classes, C, K, ACC)
            h_ = total_slope(a, b, c, d, e, f, p, aux, label, SPEC, K, False)
            inner += tl.sum(tl.where((m == 0) | (classes >= C)[:, None, None], 0.0, m * h_), axis=0)
        tl.store(inner_ptr + image + offs, inner, mask=mask)


def upsample_loss_sums(
    x: Tensor, target: Tensor, pixel_weight: Tensor | None, lse: Tensor | None, up: Upsampling, spec: Spec,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    """x (N, C, h, w), target (N, H, W) or (N, C, H, W), pixel_weight and lse (N, H, W) -> sums (N, C, columns), fp64.

    ``lse``: of ``upsample_cross_entropy_fwd`` or ``upsample_log_sum``; None for sigmoid. Targets and factors are
    contiguous.
    """
    N, C, h, _ = x.shape
    cfg = select("upsample_loss_sums", size=up.pixels * N, device=x.device, C=C, dtype=x.dtype, factor=up.factor)
    blocks_w, blocks_c = cdiv(up.x.full, cfg.BLOCK_W), cdiv(C, cfg.BLOCK_C)
    segment = min(h, max(1, h * N * blocks_c * blocks_w // PROGRAMS))
    segments = cdiv(h, segment)
    sums = x.new_empty(N, segments * blocks_w, C, len(spec), dtype=stats_dtype(x))
    *sizes, _ = up.arguments()
    launch(
        _upsample_loss_sums_kernel, (N * segments * blocks_c * blocks_w,),
        x, target, sums if pixel_weight is None else pixel_weight, sums if lse is None else lse, sums,
        *sizes, segment, segments, blocks_c, *x.stride(), ignore_index,
        C=C, SPEC=spec, K=len(spec), SIGMOID=lse is None, EACH=target.dim() == 4, WEIGHTED=pixel_weight is not None,
        ALIGN_CORNERS=up.align_corners, ACC=acc_dtype(x), **cfg.launch,
    )  # fmt: skip
    return sums.sum(1, dtype=torch.float64)


def upsample_loss_inner(
    x: Tensor, target: Tensor, pixel_weight: Tensor | None, lse: Tensor, slopes: Tensor, up: Upsampling, spec: Spec,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    """The arguments of ``upsample_loss_sums`` and slopes (N, C, columns) -> D (N, H, W) of the header."""
    N, C, h, _ = x.shape
    inner = x.new_empty(lse.shape, dtype=stats_dtype(x))
    cfg = select("upsample_loss_inner", size=inner.numel(), device=x.device, C=C, dtype=x.dtype, factor=up.factor)
    splits = row_splits(up)
    *sizes, _ = up.arguments()
    launch(
        _upsample_loss_inner_kernel, (N * h * splits * cdiv(up.x.full, cfg.BLOCK_W),),
        x, target, inner if pixel_weight is None else pixel_weight, lse, slopes, inner, *sizes, splits, *x.stride(),
        ignore_index, C=C, SPEC=spec, K=len(spec), EACH=target.dim() == 4, WEIGHTED=pixel_weight is not None,
        ALIGN_CORNERS=up.align_corners, ACC=acc_dtype(x), **cfg.launch,
    )  # fmt: skip
    return inner


@heuristic("upsample_loss_sums")
def _sums_config(size: int, C: int, dtype: torch.dtype, factor: int) -> dict[str, int]:
    """One column a thread, four classes, the rows of a cell up to 4: 16 values at once beside 24 sums."""
    rows = min(4, row_block(factor))
    return {"BLOCK_H": rows, "BLOCK_W": 128, "BLOCK_C": min(4, next_power_of_2(C)), "num_warps": 4}


@candidates("upsample_loss_sums")
def _sums_candidates(size: int, C: int, dtype: torch.dtype, factor: int) -> list[dict[str, int]]:
    return [
        {"BLOCK_H": rows, "BLOCK_W": columns, "BLOCK_C": c, "num_warps": warps}
        for rows in dict.fromkeys((1, min(4, row_block(factor))))
        for columns, warps in ((64, 2), (128, 4), (256, 8))
        for c in (1, 2, 4, 8)
    ]


@heuristic("upsample_loss_inner")
def _inner_config(size: int, C: int, dtype: torch.dtype, factor: int) -> dict[str, int]:
    """As the forward of cross entropy: one column a thread, 32 values of it at once.

    The limit lets ptxas keep 128 to 140 registers; left to itself it took 128 and spilled, or 165 (sm_80, sm_90).
    """
    rows = row_block(factor)
    return {"BLOCK_H": rows, "BLOCK_W": 128, "BLOCK_C": min(next_power_of_2(C), max(2, 16 // rows)), "num_warps": 4,
            "maxnreg": 168}  # fmt: skip


@candidates("upsample_loss_inner")
def _inner_candidates(size: int, C: int, dtype: torch.dtype, factor: int) -> list[dict[str, int]]:
    return [
        {"BLOCK_H": rows, "BLOCK_W": columns, "BLOCK_C": c, "num_warps": warps}
        for rows in dict.fromkeys((row_block(factor), max(1, row_block(factor) // 2)))
        for columns, warps in ((64, 2), (128, 4), (256, 8))
        for c in (1, 2, 4, 8)
    ]
