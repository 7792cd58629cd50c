"""Nine taps of a small map, interpolated, shifted and added to the convolution of a large one; bias, activation.

    y[n, o, p] = act(base[n, o, p] + bias + sum over ky, kx of
                     sum over i, j of  Ay[o + ky - 1, i] Ax[p + kx - 1, j] taps[ky, n, i, j, kx])

with the bilinear weights Ay, Ax of two neighbours a position, zero outside the large map: the 3x3 convolution of a map
that is upsampled first, whose nine products with the small map are ``taps`` (3, N, h, w, 3, COUT); ``base`` is the
convolution of what is beside it. Channels are innermost everywhere, in vectors of 16 bytes where they are aligned.

Traffic in elements, lo = N COUT h w, hi = N COUT H W: 9 lo + base hi + y hi. What costs is the sum: 9 taps of 4
corners, 36 loads and multiplications an output, if each is taken as it stands. But a filter row's sum along x, six
loads, serves every output row between the same two input rows. A program walks down a strip of rows with those sums of
the two input rows in registers, for each of the three filter rows; an output then takes 6 multiplications, and an input
row entering takes 18 loads a column, 4.5 for each of the four outputs below it at factor 4. Along y first would gather
columns across threads.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.common.bilinear import source_taps, to_second
from fastseg.kernels.common.norm_act import activate, where_all
from fastseg.kernels.runtime.ceilings import H200, Chip
from fastseg.kernels.runtime.config import candidates, heuristic, select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv, next_power_of_2
from fastseg.kernels.runtime.tensors import acc_dtype
from fastseg.kernels.runtime.verdict import Verdict, verdict
from fastseg.kernels.upsample.bilinear import LARGEST_SIDE, interpolation, owned_tile, rows_of, scale_args


@triton.jit
def _along_x(
    taps_ptr, x, c, mask, OW, IW, scale_w, scale_w_rest, C: tl.constexpr, CORNERS: tl.constexpr, ACC: tl.constexpr
):
    """One filter row's sum of an input row for output columns ``x``; ``taps_ptr``: that row of taps."""
    total = tl.zeros(mask.shape, ACC)
    for kx in tl.static_range(3):
        p = x + (kx - 1)
        j0, j1, w0, w1 = source_taps(p, IW, scale_w, scale_w_rest, CORNERS, ACC)
        inside = mask & (p >= 0) & (p < OW)
        a = tl.load(taps_ptr + ((j0 * 3 + kx) * C + c), mask=inside, other=0.0).to(ACC)
        b = tl.load(taps_ptr + ((j1 * 3 + kx) * C + c), mask=inside, other=0.0).to(ACC)
        total += w0 * a + w1 * b
    return total


@triton.jit
def _rows_around(
    above, below, held, o,
    taps_ptr, x, c, mask, OH, OW, IH, IW, scale_h, scale_h_rest, scale_w, scale_w_rest,
    C: tl.constexpr, CORNERS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sums along x of the input rows above and below row ``o`` of the large map, and their weights.

    ``held``: which input row is in ``above``; -2 for the zeros around the map.
    """
    r0, r1, v0, v1 = source_taps(o, IH, scale_h, scale_h_rest, CORNERS, ACC)
    inside = (o >= 0) & (o < OH)
    row = tl.where(inside, r0, -2)
    if row != held:
        step = IW * 3 * C
        mask = where_all(mask, inside)
        if row == held + to_second(scale_h, scale_h_rest):
            above = below
        else:
            above = _along_x(taps_ptr + r0 * step, x, c, mask, OW, IW, scale_w, scale_w_rest, C, CORNERS, ACC)
        below = _along_x(taps_ptr + r1 * step, x, c, mask, OW, IW, scale_w, scale_w_rest, C, CORNERS, ACC)
        held = row
    return above, below, held, v0, v1


@triton.jit(do_not_specialize=["images", "IH", "IW", "OH", "OW", "ROWS"])
def _upsample_conv_fwd_kernel(
    taps_ptr, base_ptr, bias_ptr,
    y_ptr,
    images, IH, IW, OH, OW, scale_h, scale_h_rest, scale_w, scale_w_rest,
    C: tl.constexpr, CORNERS: tl.constexpr, HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr, ROWS, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n, row0, x, c, place, mask = owned_tile(images, OH, OW, C, True, False, ROWS, BLOCK_W, BLOCK_C)
    image = IH * IW * 3 * C
    taps0_ptr = taps_ptr + n * image
    taps1_ptr = taps_ptr + (n + images) * image
    taps2_ptr = taps_ptr + (n + 2 * images) * image
    base_ptr += n * (OH * OW * C) + place
    y_ptr += n * (OH * OW * C) + place
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(ACC)

    above0 = tl.zeros(mask.shape, ACC)
    below0, above1, below1, above2, below2 = above0, above0, above0, above0, above0
    held0 = row0 * 0 - 9  # nothing is held
    held1, held2 = held0, held0
    for r in tl.range(0, tl.minimum(ROWS, OH - row0), num_stages=1, loop_unroll_factor=1):
        o = row0 + r
        above0, below0, held0, v, u = _rows_around(
            above0, below0, held0, o - 1, taps0_ptr, x, c, mask, OH, OW, IH, IW,
            scale_h, scale_h_rest, scale_w, scale_w_rest, C, CORNERS, ACC,
        )  # fmt: skip
        y = v * above0 + u * below0
        above1, below1, held1, v, u = _rows_around(
            above1, below1, held1, o, taps1_ptr, x, c, mask, OH, OW, IH, IW,
            scale_h, scale_h_rest, scale_w, scale_w_rest, C, CORNERS, ACC,
        )  # fmt: skip
        y += v * above1 + u * below1
        above2, below2, held2, v, u = _rows_around(
            above2, below2, held2, o + 1, taps2_ptr, x, c, mask, OH, OW, IH, IW,
            scale_h, scale_h_rest, scale_w, scale_w_rest, C, CORNERS, ACC,
        )  # fmt: skip
        y += v * above2 + u * below2
        if HAS_BASE:
            y += tl.load(base_ptr + o * OW * C, mask=mask, other=0.0).to(ACC)
        if HAS_BIAS:
            y += bias
        tl.store(y_ptr + o * OW * C, activate(y, ACT).to(y_ptr.dtype.element_ty), mask=mask)


def upsample_conv_fwd(
    taps: Tensor, base: Tensor | None, bias: Tensor | None, act: str, out: tuple[int, int], align_corners: bool
) -> Tensor:
    """taps (3, N, h, w, 3, COUT) dense, base (N, COUT, H, W) NHWC, bias (COUT,) -> y (N, COUT, H, W) NHWC."""
    _, N, IH, IW, _, C = taps.shape
    OH, OW = out
    y = torch.empty((N, C, OH, OW), dtype=taps.dtype, device=taps.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    size = y.numel()
    cfg = select("upsample_conv_fwd", size=size, device=y.device, C=C, W=min(OW, 1024), dtype=y.dtype)
    tiles = N * cdiv(OH, cfg.ROWS) * cdiv(OW, cfg.BLOCK_W) * cdiv(C, cfg.BLOCK_C)
    launch(
        _upsample_conv_fwd_kernel, (tiles,),
        taps, taps if base is None else base, taps if bias is None else bias, y, N, IH, IW, OH, OW,
        *scale_args(interpolation((IH, IW), out, align_corners, (None, None))),
        C=C, CORNERS=align_corners, HAS_BASE=base is not None, HAS_BIAS=bias is not None, ACT=act,
        ACC=acc_dtype(taps), **cfg.launch,
    )  # fmt: skip
    return y


def unsupported(N: int, C: int, CL: int, COUT: int, h: int, w: int, H: int, W: int) -> str:
    """Why the kernel cannot take these sizes, or ""; ``C`` and ``CL`` do not matter to it."""
    if max(h, w, H, W) > LARGEST_SIDE:
        return f"a side of {max(h, w, H, W)} pixels; positions are fp32, good to {LARGEST_SIDE}"
    largest = max(COUT, 1) * max(3 * h * w, H * W)
    if largest >= 2**31:
        return f"one image has {largest} elements; kernels address 2^31 within an image"
    return ""


@functools.lru_cache(maxsize=4096)
def plan(
    N: int, C: int, CL: int, COUT: int, h: int, w: int, H: int, W: int, dtype: torch.dtype, chip: Chip = H200
) -> Verdict:
    """Whether the map is better left unwritten. Both forms are kernels one after another, each bound by bytes or work.

    taps    GEMM to the nine taps; convolution of ``low``; this kernel
    plain   one map of all channels written; its convolution
    """
    e, p, P = dtype.itemsize, N * h * w, N * H * W
    step = lambda elements, macs=0.0, lanes=0.0: max(
        e * elements / chip.bandwidth, 2 * macs / chip.dot(dtype), lanes / chip.lanes
    )
    entering = min(1.0, h / H + 2 / 8) * 18  # loads an output: of an input row entering, and at the top of a strip
    taps = step(p * (C + 9 * COUT), 9 * p * C * COUT)
    taps += step(P * (CL + COUT), 9 * P * CL * COUT)
    taps += step(9 * p * COUT + 2 * P * COUT, lanes=P * COUT * (2 * entering + 9))
    plain = step(p * C + P * (C + 2 * CL)) + step(P * (C + CL + COUT), 9 * P * (C + CL) * COUT)
    taken = "nine taps at low resolution" if taps < plain else "upsampling, then convolution"
    return verdict(taps < plain, "taps", taps, "plain", plain, taken, chip.described)


def _tile(elements: int, thread_bytes: int, rows: int, C: int, W: int, dtype: torch.dtype) -> dict[str, int]:
    """A tile of about ``elements``; up to 64 channels: pixels side by side share taps."""
    block_c = min(64, next_power_of_2(C))
    block_w = min(elements // block_c, max(4, next_power_of_2(W)))
    warps = max(1, min(8, block_w * block_c * dtype.itemsize // (32 * thread_bytes)))
    return {"ROWS": rows, "BLOCK_W": block_w, "BLOCK_C": block_c, "num_warps": warps}


@heuristic("upsample_conv_fwd")
def _config(size: int, C: int, W: int, dtype: torch.dtype) -> dict[str, int]:
    """32 bytes a thread: one 16-byte vector on AMD, whose warps are twice as wide, two elsewhere, where their six sums
    take 245 registers in bf16 (sm_90, Triton 3.6) and 8 warps fit; of one vector, 135 and 12: fewer loads in flight.
    2048 programs fill an H200 twice."""
    return _tile(1024, 32, rows_of(size, 1024, 2048), C, W, dtype)


@candidates("upsample_conv_fwd")
def _candidates(size: int, C: int, W: int, dtype: torch.dtype) -> list[dict[str, int]]:
    tiles = [(512, 16), (1024, 16), (1024, 32), (2048, 32)]
    return [_tile(*tile, rows, C, W, dtype) for tile in tiles for rows in (4, 8, 16)]
