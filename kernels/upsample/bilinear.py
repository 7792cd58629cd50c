"""Bilinear upsampling, and the transposed convolution with the bilinear kernel: two taps an axis, four an output pixel.

    y[o] = sum over i of w(o, i) x[i] along each axis, both axes; for the transposed convolution + bias + skip[o + crop]

    interpolation (torch's)     p = source_position(o), clamped to the input     w = max(0, 1 - |p - i|)
    transposed convolution      j = o + padding - i S,  K <= 2S                  w = max(0, 1 - |j - (K-1)/2| / f)

with f = (K+1)//2. The second pads with zeros where the first clamps, so the same taps give another border. Backward is
the transpose, dx[i] = sum over o of w(o, i) dy[o]. The outputs of an input pixel are a bounded run, so it gathers: no
atomics, sums in fp32, the same bits in every run. Both maps are linear: a backward's backward is the forward.

Layouts: NHWC, with 16-byte vectors of channels where they are aligned; otherwise a row's pixels and channels are one
run of elements (stores stay wide, taps are loaded one by one); NCHW is such a run of columns, with planes for images.
Traffic in elements, lo = N C IH IW, hi = N C OH OW: forward lo + hi (a skip adds hi), backward hi + lo. A program walks
down a strip of rows: forward keeps the two input rows, interpolated along x, for all outputs between them; backward
keeps the sums of the two input rows that an output row feeds. With one output element a thread, each tap would be
loaded again: 4 loads an element forward and 4 S^2 backward, which L1 and L2 cannot carry at the speed of memory.
"""

import ctypes
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.common.bilinear import source_taps
from fastseg.kernels.common.norm_act import where_all
from fastseg.kernels.runtime.config import candidates, heuristic, select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv, layout_of, memoized, next_power_of_2, source_scale
from fastseg.kernels.runtime.tensors import acc_dtype

LARGEST_SIDE = 2**22  # positions are fp32: a quarter of a pixel is left there


@triton.jit
def hat(j, K: tl.constexpr, ACC: tl.constexpr):
    """Tap ``j`` of the bilinear kernel of size K; 0 outside it."""
    twice = 2 * j - (K - 1)  # from the centre, in half taps: exact
    w = 1.0 - tl.where(twice < 0, -twice, twice).to(ACC) * (0.5 / ((K + 1) // 2))
    return tl.where(w < 0, 0.0, w)


@triton.jit
def _taps(
    o, size, scale, scale_rest, padding,
    MODE: tl.constexpr, S: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """-> i0, i1, w0, w1 of output ``o``; a transposed convolution's i0 and i1 may lie outside the input."""
    if MODE == "kernel":
        i1 = (o + padding) // S
        j = o + padding - i1 * S
        return i1 - 1, i1, hat(j + S, K, ACC), hat(j, K, ACC)
    else:
        return source_taps(o, size, scale, scale_rest, MODE == "corners", ACC)


@triton.jit
def owned_tile(
    planes, H, W,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr,
    ROWS, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What this program owns of ``planes`` (H, W) maps of C channels: ROWS rows of a (columns, channels) tile.

    -> image (int64), first row, columns, channels, place in a row, which are inside. NCHW: an image is one channel's
    plane, and the tile is (images, columns). FLAT: the tile is one run of a row's elements.
    """
    pid = tl.program_id(0)
    strips = tl.cdiv(H, ROWS)
    if FLAT:
        tiles = tl.cdiv(W * C, BLOCK_W * BLOCK_C)
        place = (pid % tiles * (BLOCK_W * BLOCK_C) + tl.arange(0, BLOCK_W * BLOCK_C))[None, :]
        rest = pid // tiles
        x = place // C
        c = place - x * C
        n = (rest // strips).to(tl.int64)
        mask = place < W * C
    elif CHANNELS_LAST:
        blocks = tl.cdiv(C, BLOCK_C)
        tiles = tl.cdiv(W, BLOCK_W)
        c = (pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        x = (pid // blocks % tiles * BLOCK_W + tl.arange(0, BLOCK_W))[:, None]
        rest = pid // blocks // tiles
        place = x * C + c
        n = (rest // strips).to(tl.int64)
        mask = (x < W) & (c < C)
    else:
        tiles = tl.cdiv(W, BLOCK_W)
        x = (pid % tiles * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
        rest = pid // tiles
        n = ((rest // strips).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
        c = 0
        place = x
        mask = (x < W) & (n < planes)
    return n, rest % strips * ROWS, x, c, place, mask


@triton.jit
def held_at(n, pixels, C: tl.constexpr, HELD: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where image ``n`` (int64; NCHW: plane) of C channels begins in a map of HELD, which they are a slice of."""
    if CHANNELS_LAST or HELD == C:
        return n * (pixels * (HELD if CHANNELS_LAST else 1))
    else:
        return ((n // C) * HELD + n % C) * pixels


@triton.jit(do_not_specialize=["planes", "IH", "IW", "OH", "SH", "skip_crop"])
def _bilinear_fwd_kernel(
    x_ptr, skip_ptr, bias_ptr,
    y_ptr,
    planes, IH, IW, OH, OW, SH, SW, skip_crop, padding, scale_h, scale_h_rest, scale_w, scale_w_rest,
    C: tl.constexpr, MODE: tl.constexpr, S: tl.constexpr, K: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    FLAT: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, HELD: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    PIXEL: tl.constexpr = C if CHANNELS_LAST else 1  # elements from one pixel to the next
    Y_PIXEL: tl.constexpr = HELD if CHANNELS_LAST else 1
    n, row0, ox, c, place, mask = owned_tile(planes, OH, OW, C, CHANNELS_LAST, FLAT, ROWS, BLOCK_W, BLOCK_C)
    i0, i1, w0, w1 = _taps(ox, IW, scale_w, scale_w_rest, padding, MODE, S, K, ACC)
    mask0 = mask
    mask1 = mask
    if MODE == "kernel":  # what lies outside the map, or outside the kernel, is not there: it may be NaN
        mask0 = mask & (i0 >= 0) & (i0 < IW) & (w0 > 0)
        mask1 = mask & (i1 < IW) & (w1 > 0)
    x0_ptr = x_ptr + n * (IH * IW * PIXEL) + (i0 * PIXEL + c)
    x1_ptr = x_ptr + n * (IH * IW * PIXEL) + (i1 * PIXEL + c)
    # `place` is ox * PIXEL + c, in a form that shows runs of elements
    y_ptr += held_at(n, OH * OW, C, HELD, CHANNELS_LAST) + (place if HELD == C else ox * Y_PIXEL + c)
    if HAS_SKIP:
        skip_ptr += n * (SH * SW * PIXEL) + (skip_crop * PIXEL + place)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + (c if CHANNELS_LAST else (n % C).to(tl.int32)), mask=mask, other=0.0).to(ACC)

    above = tl.zeros(mask.shape, ACC)
    below = tl.zeros(mask.shape, ACC)
    held = row0 * 0 - 2  # the input row in `above`
    for r in tl.range(0, tl.minimum(ROWS, OH - row0), num_stages=1):
        oy = row0 + r
        r0, r1, v0, v1 = _taps(oy, IH, scale_h, scale_h_rest, padding, MODE, S, K, ACC)
        if r0 != held:
            above0, above1, below0, below1 = mask0, mask1, mask0, mask1
            if MODE == "kernel":
                inside = (r0 >= 0) & (r0 < IH)
                above0, above1 = where_all(mask0, inside), where_all(mask1, inside)
                below0, below1 = where_all(mask0, r1 < IH), where_all(mask1, r1 < IH)
            a = tl.load(x0_ptr + r0 * IW * PIXEL, mask=above0, other=0.0).to(ACC)
            b = tl.load(x1_ptr + r0 * IW * PIXEL, mask=above1, other=0.0).to(ACC)
            above = w0 * a + w1 * b
            a = tl.load(x0_ptr + r1 * IW * PIXEL, mask=below0, other=0.0).to(ACC)
            b = tl.load(x1_ptr + r1 * IW * PIXEL, mask=below1, other=0.0).to(ACC)
            below = w0 * a + w1 * b
            held = r0
        y = v0 * above + v1 * below
        if MODE == "kernel":
            y = tl.where(v0 > 0, y, v1 * below)
            y = tl.where(v1 > 0, y, v0 * above)
        if HAS_BIAS:
            y += bias
        if HAS_SKIP:
            y += tl.load(skip_ptr + (oy + skip_crop) * SW * PIXEL, mask=mask, other=0.0).to(ACC)
        tl.store(y_ptr + oy * OW * Y_PIXEL, y.to(y_ptr.dtype.element_ty), mask=mask)


class Taps(NamedTuple):
    """How output pixels take from input pixels, along both axes.

    Attributes:
        mode: "centres" or "corners" (``align_corners``) to interpolate, "kernel" for the transposed convolution.
        scale: input pixels per output pixel along y and x; unused by "kernel".
        stride, kernel, padding: of the transposed convolution, kernel <= 2 stride; unused by the others.
    """

    mode: str
    scale: tuple[float, float] = (0.0, 0.0)
    stride: int = 1
    kernel: int = 1
    padding: int = 0

    def reach(self, size: int, out: int, axis: int) -> int:
        """The most outputs that one of ``size`` inputs contributes to."""
        if self.mode == "kernel":
            return 2 * self.stride
        scale = self.scale[axis]
        if scale == 0:  # corners, from or to one pixel
            return out
        exact = 2 / scale
        return max(1, min(out, round(exact) if abs(exact - round(exact)) < 1e-9 * exact else int(exact) + 1))


@memoized
def interpolation(size: tuple[int, int], out: tuple[int, int], align_corners: bool, factors: tuple) -> Taps:
    """``interpolate``'s: (IH, IW) -> (OH, OW); ``factors`` are the caller's scale factors, or None each."""
    scale = tuple(source_scale(i, o, align_corners, f) for i, o, f in zip(size, out, factors, strict=True))
    return Taps("corners" if align_corners else "centres", scale)


@memoized
def unsupported(C: int, size: tuple[int, int], out: tuple[int, int]) -> str:
    """Why the kernels cannot take these sizes, or "". A graph of any size is taken: its ops look at each size again."""
    if any(isinstance(n, torch.SymInt) for n in (C, *size, *out)):
        return ""
    if max(*size, *out) > LARGEST_SIDE:
        return f"a side of {max(*size, *out)} pixels; positions are fp32, good to {LARGEST_SIDE}"
    largest = max(C, 1) * max(size[0] * size[1], out[0] * out[1])
    if largest >= 2**31:
        return f"one image has {largest} elements; kernels address 2^31 within an image"
    return ""


def bilinear_fwd(
    x: Tensor, out: tuple[int, int], taps: Taps, channels_last: bool,
    skip: Tensor | None = None, skip_crop: int = 0, bias: Tensor | None = None, into: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x (N, C, IH, IW), skip (N, C, SH, SW) dense in one format, bias (C,) -> y (N, C, OH, OW) in that format.

    ``into``: y itself, a slice of the channels of a map that is dense in that format.
    """
    N, C, IH, IW = x.shape
    OH, OW = out
    y = into
    if y is None:
        y = torch.empty(N, C, OH, OW, dtype=x.dtype, device=x.device, memory_format=layout_of(channels_last))
    if y.numel() == 0:
        return y
    cfg = select_for("bilinear_fwd", y, channels_last)
    grid, planes, flat = grid_of(y, channels_last, cfg)
    dummy, held = x, held_channels(y, channels_last)
    by_channel = channels_last or bias is not None or held != C
    launch(
        _bilinear_fwd_kernel, grid,
        x, dummy if skip is None else skip, dummy if bias is None else bias, y,
        planes, IH, IW, OH, OW, *((1, 1) if skip is None else skip.shape[2:]), skip_crop, taps.padding,
        *scale_args(taps),
        C=C if by_channel else 1, MODE=taps.mode, S=taps.stride, K=taps.kernel,
        CHANNELS_LAST=channels_last, FLAT=flat, HAS_SKIP=skip is not None, HAS_BIAS=bias is not None,
        HELD=held if by_channel else 1, ACC=acc_dtype(x), **cfg.launch,
    )  # fmt: skip
    return y


def held_channels(x: Tensor, channels_last: bool) -> int:
    """Channels of the dense map that ``x`` (N, C, H, W) is a slice of: C where it is dense itself; 0 where neither."""
    N, C, H, W = x.shape
    if x.is_contiguous(memory_format=layout_of(channels_last)):
        return C
    per_image = x.stride(0) if N > 1 else x.stride(2) * H if channels_last and H > 1 else x.stride(3) * W * H
    held = per_image // max(H * W, 1) if channels_last or N > 1 else C
    dense = (held * H * W, 1, held * W, held) if channels_last else (held * H * W, H * W, W, 1)
    fits = all(size == 1 or have == want for size, have, want in zip(x.shape, x.stride(), dense, strict=True))
    return held if fits and held >= C else 0


@memoized
def scale_args(taps: Taps) -> tuple[float, ...]:
    """Each scale as fp32, which is what a kernel's float argument is, and the rest of it."""
    parts = []
    for scale in taps.scale:
        rounded = ctypes.c_float(scale).value
        parts += [rounded, scale - rounded]
    return tuple(parts)


def is_flat(C: int, dtype: torch.dtype) -> bool:
    """Whether NHWC pixels do not begin at multiples of 16 bytes."""
    return C * dtype.itemsize % 16 != 0


def select_for(kernel: str, owned: Tensor, channels_last: bool):
    """``owned``: the map whose elements the programs own."""
    C, W = owned.shape[1], owned.shape[3]
    width = min(1024, next_power_of_2(W * C if channels_last and is_flat(C, owned.dtype) else W))
    C = C if channels_last else 0
    return select(kernel, size=owned.numel(), device=owned.device, C=C, W=width, dtype=owned.dtype)


def grid_of(owned: Tensor, channels_last: bool, cfg) -> tuple[tuple[int], int, bool]:
    """-> the grid over tiles of ``owned``, its images (NCHW: planes), and whether tiles are runs of elements."""
    N, C, H, W = owned.shape
    flat = channels_last and is_flat(C, owned.dtype)
    planes = N if channels_last else N * C
    if flat:
        tiles = planes * cdiv(W * C, cfg.BLOCK_W * cfg.BLOCK_C)
    elif channels_last:
        tiles = planes * cdiv(W, cfg.BLOCK_W) * cdiv(C, cfg.BLOCK_C)
    else:
        tiles = cdiv(planes, cfg.BLOCK_C) * cdiv(W, cfg.BLOCK_W)
    return (tiles * cdiv(H, cfg.ROWS),), planes, flat


def _tile(elements: int, C: int, W: int, dtype: torch.dtype) -> tuple[int, int]:
    """(BLOCK_W, BLOCK_C) of ``elements``: C = 0 for NCHW, where the second counts planes."""
    if C == 0 or is_flat(C, dtype):
        block_w = min(elements, max(W, 16))
        return block_w, 1 if C else elements // block_w
    block_c = min(64, next_power_of_2(C))
    return min(elements // block_c, max(W, 4)), block_c


def tile_config(elements: int, per_thread: int, rows: int, C: int, W: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of about ``elements``, fewer on small maps, with ``per_thread`` in each thread."""
    block_w, block_c = _tile(elements, C, W, dtype)
    warps = max(1, min(8, block_w * block_c // (32 * per_thread)))
    return {"ROWS": rows, "BLOCK_W": block_w, "BLOCK_C": block_c, "num_warps": warps}


def rows_of(size: int, elements: int, programs: int) -> int:
    """Rows of a strip, a power of 2 up to 8: longer ones load less twice, shorter ones keep ``programs`` in flight."""
    return 2 ** max(0, min(3, (size // (elements * programs)).bit_length() - 1))


@heuristic("bilinear_fwd")
def _fwd_config(size: int, C: int, W: int, dtype: torch.dtype) -> dict[str, int]:
    """32 bytes a thread for vectors of channels: two loads of each tap in flight (one on AMD, whose warps are twice as
    wide). Single taps: 8 elements, one store of 16 bits each. 2048 programs fill an H200 twice."""
    per_thread = 8 if C == 0 or is_flat(C, dtype) else 32 // dtype.itemsize
    return tile_config(1024, per_thread, rows_of(size, 1024, 2048), C, W, dtype)


@candidates("bilinear_fwd")
def _fwd_candidates(size: int, C: int, W: int, dtype: torch.dtype) -> list[dict[str, int]]:
    tiles = [(512, 8), (1024, 8), (1024, 16), (2048, 16)]
    return [tile_config(*tile, rows, C, W, dtype) for tile in tiles for rows in (1, 2, 4, 8, 16)]
