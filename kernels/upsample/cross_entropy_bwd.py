"""Backward of cross entropy of upsampled logits; ``cross_entropy.py`` has the whole design."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.common.bilinear import first_output, mix, nan_blind_maximum, source_coordinate, to_second
from fastseg.kernels.common.norm_act import where_all
from fastseg.kernels.runtime.config import candidates, heuristic, select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv, next_power_of_2
from fastseg.kernels.runtime.tensors import acc_dtype
from fastseg.kernels.upsample.cross_entropy_fwd import _LOG2E, factor_sign, load_target
from fastseg.kernels.upsample.loss_terms import activated, load_labels, load_slopes, total_slope
from fastseg.kernels.upsample.sizes import Loss, Upsampling, row_block


@triton.jit(
    do_not_specialize=["h", "w", "H", "segment", "tiles_x", "segments", "blocks_c", "stride_n", "stride_y"],
    do_not_specialize_on_alignment=["stride_c", "stride_x"],
)
def _upsample_cross_entropy_bwd_kernel(
    x_ptr, target_ptr, weight_ptr, lse_ptr, dy_ptr, slopes_ptr, dx_ptr,
    h, w, H, W, scale_h, scale_w, inverse_h, inverse_w, segment, tiles_x, segments, blocks_c,
    stride_n, stride_c, stride_y, stride_x, stride_dn, stride_dc, stride_dy, stride_dx, ignore_index, smoothing,
    C: tl.constexpr, ALIGN_CORNERS: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr,
    PER_PIXEL: tl.constexpr, ACC: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_X: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr,
    SPEC: tl.constexpr = (), K: tl.constexpr = 0, SIGMOID: tl.constexpr = False, EACH: tl.constexpr = False,
):  # fmt: skip
    # K > 0: of the K sums SPEC (``loss_sums.py``), whose D is dy, and whose factors of pixels are weight.
    BLOCK: tl.constexpr = BLOCK_X * LANES
    tile = tl.program_id(0)
    pid_x, tile = tile % tiles_x, tile // tiles_x
    pid_c, tile = tile % blocks_c, tile // blocks_c
    y_first = tile % segments * segment
    y_end = tl.minimum(y_first + segment, h)
    n = (tile // segments).to(tl.int64)
    x_ptr += n * stride_n
    dx_ptr += n * stride_dn
    target_ptr += n * (C if EACH else 1) * H * W
    lse_ptr += n * H * W

    # LANES neighbouring lanes share a cell: lane g takes its columns g, g + LANES, ...
    lane = tl.arange(0, BLOCK)
    cell = pid_x * (BLOCK_X - 1) - 1 + lane // LANES  # the first is the neighbour of the pixels before it
    column = first_output(cell, w, W, scale_w, inverse_w, ALIGN_CORNERS, ACC)
    column_end = first_output(cell + 1, w, W, scale_w, inverse_w, ALIGN_CORNERS, ACC)
    most = tl.minimum(tl.reduce(column_end - column, 0, nan_blind_maximum), W)
    column += lane % LANES
    left = nan_blind_maximum(tl.minimum(cell, w - 1), 0) * stride_x
    across, down = to_second(scale_w, 0.0), to_second(scale_h, 0.0)  # 0 on an axis that keeps its size
    right = tl.minimum(cell + across, w - 1) * stride_x
    class_first = pid_c * BLOCK_C
    classes = class_first + tl.arange(0, BLOCK_C)
    planes, known = (classes * stride_c)[:, None], (classes < C)[:, None]
    if SMOOTH:
        spread = smoothing / C + tl.zeros((BLOCK_C,), ACC)
        if WEIGHTED:
            spread *= tl.load(weight_ptr + classes, mask=classes < C, other=0.0).to(ACC)
    offs_x = tl.arange(0, BLOCK_X)
    pixel = pid_x * (BLOCK_X - 1) - 1 + offs_x
    before = tl.broadcast_to(nan_blind_maximum(offs_x - 1, 0)[None, :], (BLOCK_C, BLOCK_X))
    at_end = (pixel == w - 1)[None, :]
    owned = known & ((offs_x > 0) & (pixel < w))[None, :]
    if K > 0:
        sa, sb, sc, sd, se, sf = load_slopes(slopes_ptr, n, classes, C, K, ACC)
    # A scale that is not finite (a mean over weights of 0) makes the gradients of pixels that count NaN, and no others.
    scale, poison = 1.0, 0.0
    if not PER_PIXEL:
        scale = tl.load(dy_ptr).to(ACC)
        poison = scale * 0.0
        scale = tl.where(poison == 0.0, scale, 1.0)
    carry = tl.zeros((BLOCK_C, BLOCK_X), ACC)  # what the cell row above owes to the row of pixels below it
    for step_y in range(0, y_end - y_first + 1):
        y = y_first - 1 + step_y
        row_first = first_output(y, h, H, scale_h, inverse_h, ALIGN_CORNERS, ACC)
        row_end = first_output(y + 1, h, H, scale_h, inverse_h, ALIGN_CORNERS, ACC)
        # a cell without outputs is not read: a NaN in it reaches no gradient
        used = known & where_all(column_end > column, row_end > row_first)[None, :]
        top_ptr = x_ptr + nan_blind_maximum(y, 0) * stride_y
        bottom_ptr = x_ptr + tl.minimum(y + down, h - 1) * stride_y
        a = tl.load(top_ptr + planes + left, mask=used, other=0.0).to(ACC)  # (BLOCK_C, BLOCK)
        b = tl.load(top_ptr + planes + right, mask=used, other=0.0).to(ACC)
        c = tl.load(bottom_ptr + planes + left, mask=used, other=0.0).to(ACC)
        d = tl.load(bottom_ptr + planes + right, mask=used, other=0.0).to(ACC)
        da = tl.zeros((BLOCK_C, BLOCK), ACC)
        db = tl.zeros((BLOCK_C, BLOCK), ACC)
        dc = tl.zeros((BLOCK_C, BLOCK), ACC)
        dd = tl.zeros((BLOCK_C, BLOCK), ACC)
        for row in range(row_first, row_end, BLOCK_H):
            offs_h = row + tl.arange(0, BLOCK_H)
            h1 = source_coordinate(offs_h, h, scale_h, ALIGN_CORNERS, ACC)[2]
            h1 = h1[None, :, None]
            h0 = 1 - h1
            for step_x in range(0, most, LANES):
                offs_w = column + step_x
                w1 = source_coordinate(offs_w, w, scale_w, ALIGN_CORNERS, ACC)[2]
                w0 = 1 - w1
                t0, t1 = w0 * _LOG2E, w1 * _LOG2E  # as the forward has them: then v is the same to the bit
                mask = (offs_h < row_end)[:, None] & (offs_w < column_end)[None, :]
                offs = offs_h[:, None] * W + offs_w[None, :]
                top, bottom = mix(t0, a, t1, b), mix(t0, c, t1, d)
                v = mix(h0, top[:, None, :], h1, bottom[:, None, :])  # (BLOCK_C, BLOCK_H, BLOCK)
                if K > 0:
                    y_, m = load_labels(target_ptr, weight_ptr + n * H * W, offs, classes, mask, H * W, ignore_index,
                                        C, EACH, WEIGHTED, ACC)  # fmt: skip
                    lse = v
                    if not SIGMOID:
                        lse = tl.load(lse_ptr + offs, mask=mask, other=0.0)[None]
                    p, aux = activated(v, lse, SIGMOID)
                    g = m * total_slope(sa, sb, sc, sd, se, sf, p, aux, y_, SPEC, K, SIGMOID)
                    if EACH and not SIGMOID:  # a label that does not count leaves its class the others' share
                        g = tl.where(m == 0, 0.0, g)
                    if not SIGMOID:
                        g -= p * tl.load(dy_ptr + n * H * W + offs, mask=mask, other=0.0).to(ACC)[None]
                    g = tl.where(mask[None] if EACH and not SIGMOID else m != 0, g, 0.0)
                else:
                    lse = tl.load(lse_ptr + offs, mask=mask, other=float("inf"))  # (BLOCK_H, BLOCK)
                    target = load_target(target_ptr, offs, mask, ignore_index, C)[0]
                    if WEIGHTED:
                        sign = factor_sign(lse, ACC)
                    lse = tl.where(target >= 0, lse + poison, lse)
                    g = tl.exp2(v - lse[None])
                    if WEIGHTED:
                        g *= sign[None]
                    if SMOOTH:
                        g -= spread[:, None, None] * tl.where(target >= 0, 1.0, 0.0).to(ACC)[None]
                    named = (target >= class_first) & (target < class_first + BLOCK_C)
                    # most blocks of classes hold no target here
                    if tl.sum(tl.sum(named.to(tl.int32), axis=1), axis=0) > 0:
                        factor = tl.full((BLOCK_H, BLOCK), 1.0, ACC)
                        if WEIGHTED:
                            factor = tl.load(weight_ptr + target, mask=named, other=0.0).to(ACC)
                        g -= tl.where(classes[:, None, None] == target[None], (factor * (1 - smoothing))[None], 0.0)
                    if PER_PIXEL:
                        g *= tl.load(dy_ptr + n * H * W + offs, mask=target >= 0, other=0.0).to(ACC)[None]
                upper, lower = tl.sum(h0 * g, axis=1), tl.sum(h1 * g, axis=1)  # (BLOCK_C, BLOCK)
                da += w0 * upper
                db += w1 * upper
                dc += w0 * lower
                dd += w1 * lower
        da, db = _cells(da, BLOCK_C, BLOCK_X, LANES), _cells(db, BLOCK_C, BLOCK_X, LANES)
        dc, dd = _cells(dc, BLOCK_C, BLOCK_X, LANES), _cells(dd, BLOCK_C, BLOCK_X, LANES)
        upper = da + tl.where(at_end, db, 0.0) + tl.where(across == 0, 0.0, tl.gather(db, before, axis=1))
        lower = dc + tl.where(at_end, dd, 0.0) + tl.where(across == 0, 0.0, tl.gather(dd, before, axis=1))
        dx = carry + upper + (lower if y == h - 1 else tl.zeros_like(lower))
        carry = tl.where(down == 0, 0.0, lower)
        if C == 1 and not SIGMOID:  # one class is certain: 0, and no rounding
            dx *= 0.0
        if y >= y_first:
            offs = (classes * stride_dc)[:, None] + (y * stride_dy + pixel * stride_dx)[None, :]
            tl.store(dx_ptr + offs, (dx * scale).to(dx_ptr.dtype.element_ty), mask=owned)


@triton.jit
def _cells(lanes, BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr, LANES: tl.constexpr):
    """(BLOCK_C, BLOCK_X * LANES) -> sums over the lanes of each cell."""
    if LANES > 1:
        lanes = tl.sum(tl.reshape(lanes, (BLOCK_C, BLOCK_X, LANES)), axis=2)
    return lanes


PROGRAMS = 4096  # as many as fill the SMs of an H200 several times over with one warp each


class OfSums(NamedTuple):
    """What the backward of sums has in place of a cross entropy's; D is its ``dy``."""

    spec: tuple[tuple[int, float, float], ...]
    slopes: Tensor  # (N, C, columns)
    sigmoid: bool


def upsample_cross_entropy_bwd(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, up: Upsampling, loss: Loss,
    sums: OfSums | None = None,
) -> Tensor:  # fmt: skip
    """dy () or (N, H, W), already divided by what a mean divides by; x, target, lse as the forward's -> dx like x.

    Of ``sums``: dy (N, H, W) is D, target may be (N, C, H, W), and weight (N, H, W) is of the pixels.
    """
    N, C, h, w = x.shape
    dx = torch.empty_like(x)
    if target.numel() == 0:
        return dx.zero_()
    name = "upsample_cross_entropy_bwd" if sums is None else "upsample_loss_bwd"
    cfg = select(name, size=target.numel(), device=x.device, C=C, dtype=x.dtype,
                 factor=up.factor)  # fmt: skip
    tiles_x = cdiv(w, cfg.BLOCK_X - 1)
    blocks_c = cdiv(C, cfg.BLOCK_C)
    # every segment of low-resolution rows computes one cell row more than it has
    segment = min(32, max(2, h * N * blocks_c * tiles_x // PROGRAMS), h)
    segments = cdiv(h, segment)
    *sizes, inverse_w = up.arguments()
    slopes, more = lse, {}
    if sums is not None:
        slopes, each = sums.slopes, target.dim() == 4
        more = {"SPEC": sums.spec, "K": len(sums.spec), "SIGMOID": sums.sigmoid, "EACH": each}
    launch(
        _upsample_cross_entropy_bwd_kernel, (N * segments * blocks_c * tiles_x,),
        x, target, lse if weight is None else weight, lse, dy, slopes, dx, *sizes, inverse_w, segment, tiles_x,
        segments, blocks_c, *x.stride(), *dx.stride(), loss.ignore_index, float(loss.label_smoothing),
        C=C, ALIGN_CORNERS=up.align_corners, WEIGHTED=weight is not None, SMOOTH=loss.label_smoothing > 0,
        PER_PIXEL=dy.dim() > 0, ACC=acc_dtype(x), **more, **cfg.launch,
    )  # fmt: skip
    return dx


@heuristic("upsample_cross_entropy_bwd")
def _bwd_config(size: int, C: int, dtype: torch.dtype, factor: int) -> dict[str, int]:
    """A thread holds one cell's four corners and their gradients for BLOCK_C classes, 8 values each, and 4 rows.

    Wide cells are shared by lanes, so that neighbouring lanes read neighbouring pixels; up to about 4 columns apart
    they share cache lines without.
    """
    lanes = min(8, max(1, next_power_of_2(factor) // 4))
    return {"BLOCK_H": min(4, row_block(factor)), "BLOCK_X": 32, "LANES": lanes,
            "BLOCK_C": min(8, next_power_of_2(C)), "num_warps": lanes, "maxnreg": 255}  # fmt: skip


@heuristic("upsample_loss_bwd")
def _sums_config(size: int, C: int, dtype: torch.dtype, factor: int) -> dict[str, int]:
    """As above, with half the rows and classes: six slopes and up to six terms share the registers."""
    lanes = min(8, max(1, next_power_of_2(factor) // 4))
    return {"BLOCK_H": min(2, row_block(factor)), "BLOCK_X": 32, "LANES": lanes,
            "BLOCK_C": min(4, next_power_of_2(C)), "num_warps": lanes, "maxnreg": 255}  # fmt: skip


@candidates("upsample_loss_bwd")
@candidates("upsample_cross_entropy_bwd")
def _bwd_candidates(size: int, C: int, dtype: torch.dtype, factor: int) -> list[dict[str, int]]:
    return [
        {"BLOCK_H": rows, "BLOCK_X": cells, "LANES": lanes, "BLOCK_C": c, "num_warps": max(1, cells * lanes // 32),
         "maxnreg": registers}
        for rows in (2, 4, 8)
        for cells in (16, 32, 64)
        for lanes in (1, 2, 4, 8)
        for c, registers in ((2, 128), (4, 168), (8, 255))
    ]  # fmt: skip
