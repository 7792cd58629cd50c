"""Sum of a map and up to three bilinearly upsampled ones, with a norm, a bias and an activation.

    y[n, c, o] = act(scale[c] (base[n, c, o] + sum over maps of sum over i of w(o, i) m[n, c, i]) + bias[c])

with the bilinear weights w of two neighbours an axis (kernels/upsample/bilinear.py); ``scale`` and ``bias`` are those
of a norm with fixed statistics, or absent. It ends a decoder whose 1x1 convolutions ran at each level's own size.

Traffic in elements, hi = N C OH OW and lo_i that of each small map: base hi + sum of lo_i + y hi. Map by map, each
upsampling would write hi and each addition read 2 hi and write hi again: 4 hi more for each map. A program walks down a
strip of rows with the two input rows of each map, interpolated along x, in registers, as the upsampling does; a row
that was the lower one becomes the upper one. The backward needs no kernel of its own: the gradient at the base is dy,
that at each map the gather of kernels/upsample/bilinear_bwd.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.common.bilinear import source_taps, to_second
from fastseg.kernels.common.norm_act import activate
from fastseg.kernels.runtime.ceilings import H200, Chip
from fastseg.kernels.runtime.config import candidates, heuristic
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import layout_of
from fastseg.kernels.runtime.tensors import acc_dtype
from fastseg.kernels.runtime.verdict import Verdict
from fastseg.kernels.upsample.bilinear import (
    grid_of,
    interpolation,
    is_flat,
    owned_tile,
    rows_of,
    scale_args,
    select_for,
    tile_config,
)

MOST_MAPS = 3


@triton.jit
def _row(
    above, below, held, o, m_ptr, x0, x1, w0, w1, mask, IH, step, scale_h, scale_h_rest,
    CORNERS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Row ``o`` of an upsampled map: -> what is held for the next row, and the values. ``x0``, ``x1``: places in a row.

    ``held``: the input row in ``above``; ``below`` is the next one. ``step``: elements from an input row to the next.
    """
    r0, r1, v0, v1 = source_taps(o, IH, scale_h, scale_h_rest, CORNERS, ACC)
    if r0 != held:
        if r0 == held + to_second(scale_h, scale_h_rest):
            above = below
        else:
            a = tl.load(m_ptr + (r0 * step + x0), mask=mask, other=0.0).to(ACC)
            b = tl.load(m_ptr + (r0 * step + x1), mask=mask, other=0.0).to(ACC)
            above = w0 * a + w1 * b
        a = tl.load(m_ptr + (r1 * step + x0), mask=mask, other=0.0).to(ACC)
        b = tl.load(m_ptr + (r1 * step + x1), mask=mask, other=0.0).to(ACC)
        below = w0 * a + w1 * b
        held = r0
    return above, below, held, v0 * above + v1 * below


@triton.jit(do_not_specialize=["planes", "OH", "H1", "W1", "H2", "W2", "H3", "W3"])
def _upsample_sum_fwd_kernel(
    base_ptr, m1_ptr, m2_ptr, m3_ptr, scale_ptr, bias_ptr,
    y_ptr,
    planes, OH, OW, H1, W1, H2, W2, H3, W3,
    h1, h1_rest, w1, w1_rest, h2, h2_rest, w2, w2_rest, h3, h3_rest, w3, w3_rest,
    C: tl.constexpr, MAPS: tl.constexpr, CORNERS: tl.constexpr, CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    PIXEL: tl.constexpr = C if CHANNELS_LAST else 1  # elements from one pixel to the next
    n, row0, x, c, place, mask = owned_tile(planes, OH, OW, C, CHANNELS_LAST, FLAT, ROWS, BLOCK_W, BLOCK_C)
    a0, a1, aw0, aw1 = source_taps(x, W1, w1, w1_rest, CORNERS, ACC)
    m1_ptr += n * (H1 * W1 * PIXEL)
    a0, a1 = a0 * PIXEL + c, a1 * PIXEL + c
    above1 = tl.zeros(mask.shape, ACC)
    below1, above2, below2, above3, below3 = above1, above1, above1, above1, above1
    held1 = row0 * 0 - 9  # nothing is held
    held2, held3 = held1, held1
    if MAPS > 1:
        b0, b1, bw0, bw1 = source_taps(x, W2, w2, w2_rest, CORNERS, ACC)
        m2_ptr += n * (H2 * W2 * PIXEL)
        b0, b1 = b0 * PIXEL + c, b1 * PIXEL + c
    if MAPS > 2:
        c0, c1, cw0, cw1 = source_taps(x, W3, w3, w3_rest, CORNERS, ACC)
        m3_ptr += n * (H3 * W3 * PIXEL)
        c0, c1 = c0 * PIXEL + c, c1 * PIXEL + c
    base_ptr += n * (OH * OW * PIXEL) + place
    y_ptr += n * (OH * OW * PIXEL) + place
    channel = c if CHANNELS_LAST else (n % C).to(tl.int32)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + channel, mask=mask, other=0.0).to(ACC)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=mask, other=0.0).to(ACC)

    for r in tl.range(0, tl.minimum(ROWS, OH - row0), num_stages=1):
        o = row0 + r
        y = tl.load(base_ptr + o * OW * PIXEL, mask=mask, other=0.0).to(ACC)
        above1, below1, held1, more = _row(
            above1, below1, held1, o, m1_ptr, a0, a1, aw0, aw1, mask, H1, W1 * PIXEL, h1, h1_rest, CORNERS, ACC
        )
        y += more
        if MAPS > 1:
            above2, below2, held2, more = _row(
                above2, below2, held2, o, m2_ptr, b0, b1, bw0, bw1, mask, H2, W2 * PIXEL, h2, h2_rest, CORNERS, ACC
            )
            y += more
        if MAPS > 2:
            above3, below3, held3, more = _row(
                above3, below3, held3, o, m3_ptr, c0, c1, cw0, cw1, mask, H3, W3 * PIXEL, h3, h3_rest, CORNERS, ACC
            )
            y += more
        if HAS_SCALE:
            y *= scale
        if HAS_BIAS:
            y += bias
        tl.store(y_ptr + o * OW * PIXEL, activate(y, ACT).to(y_ptr.dtype.element_ty), mask=mask)


def upsample_sum_fwd(
    base: Tensor, maps: Sequence[Tensor], scale: Tensor | None, bias: Tensor | None, act: str, align_corners: bool,
    channels_last: bool,
) -> Tensor:  # fmt: skip
    """base (N, C, OH, OW), 1 to 3 maps (N, C, IH, IW), dense in one format and of one dtype, scale, bias (C,) -> y."""
    N, C, OH, OW = base.shape
    y = torch.empty(N, C, OH, OW, dtype=base.dtype, device=base.device, memory_format=layout_of(channels_last))
    if y.numel() == 0:
        return y
    cfg = select_for("upsample_sum_fwd", y, channels_last)
    grid, planes, flat = grid_of(y, channels_last, cfg)
    every = [*maps, *[maps[0]] * (MOST_MAPS - len(maps))]
    sizes = [(m.shape[2], m.shape[3]) for m in every]
    args = [scale_args(interpolation(size, (OH, OW), align_corners, (None, None))) for size in sizes]
    launch(
        _upsample_sum_fwd_kernel, grid,
        base, *every, base if scale is None else scale, base if bias is None else bias, y,
        planes, OH, OW, *(n for size in sizes for n in size), *(a for each in args for a in each),
        C=C, MAPS=len(maps), CORNERS=align_corners, CHANNELS_LAST=channels_last, FLAT=flat,
        HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, ACT=act, ACC=acc_dtype(base), **cfg.launch,
    )  # fmt: skip
    return y


def plan(elements: int, small: Sequence[int], dtype: torch.dtype, chip: Chip = H200) -> Verdict:
    """The time of both forms, bound by bytes: ``elements`` of the result, ``small`` those of each map."""
    time = lambda count: dtype.itemsize * count / chip.bandwidth * 1e6
    us, apart = time(2 * elements + sum(small)), time(sum(small) + 4 * elements * len(small))
    return Verdict(True, us, f"one pass: model says {us:.1f} us, map by map {apart:.1f} us on {chip.described}", apart)


@heuristic("upsample_sum_fwd")
def _config(size: int, C: int, W: int, dtype: torch.dtype) -> dict[str, int]:
    """32 bytes a thread for vectors of channels: one 16-byte vector on AMD, whose warps are twice as wide, else two.
    Three maps hold six rows of sums; three or four blocks of 128 threads fit on an H200's multiprocessor all the same.
    2048 programs fill an H200 twice."""
    per_thread = 8 if C == 0 or is_flat(C, dtype) else 32 // dtype.itemsize
    return tile_config(1024, per_thread, rows_of(size, 1024, 2048), C, W, dtype)


@candidates("upsample_sum_fwd")
def _candidates(size: int, C: int, W: int, dtype: torch.dtype) -> list[dict[str, int]]:
    tiles = [(512, 4), (512, 8), (1024, 4), (1024, 8), (2048, 16)]
    return [tile_config(*tile, rows, C, W, dtype) for tile in tiles for rows in (2, 4, 8)]
