"""Device functions of bilinear interpolation: source positions, taps, tiles."""

import triton
import triton.language as tl

from fastseg.kernels.common.tiles import clamp_index


@triton.jit
def float_of(bits, dtype: tl.constexpr):
    """The number whose bits an integer scalar holds, as ``runtime.sizes.bits_of`` makes it, in ``dtype``."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)


@triton.jit
def source_position(o, scale, scale_rest, ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr):
    """Where output pixel ``o`` lies in the input, in pixels: torch's rule in torch's order of operations, not clamped.

    torch's is compiled to one rounding: a weight of 0 and one of 1e-8 differ where the tap is infinite.

    ``scale`` is input pixels per output pixel, rounded to fp32; ``scale_rest`` what fp64 adds to it.
    """
    p = o.to(ACC)
    if not ALIGN_CORNERS:
        p += 0.5
    if ACC == tl.float64:  # noqa: SIM300
        p = p * scale + p * scale_rest
        return p if ALIGN_CORNERS else p - 0.5
    return p * scale if ALIGN_CORNERS else tl.fma(p, scale, -0.5)


@triton.jit
def to_second(scale, scale_rest):
    """Pixels from an output's first input pixel to its second: 0 on an axis that keeps its size, as torch has it."""
    return tl.where((scale == 1.0) & (scale_rest == 0.0), 0, 1)


@triton.jit
def source_taps(o, size, scale, scale_rest, ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr):
    """The two input pixels between which output pixel ``o`` lies, of ``size``, and their weights: -> i0, i1, w0, w1.

    Past the ends both are the end's pixel; both count then, as in torch: 0 * inf is NaN. On an axis that keeps its size
    both are the output's own pixel: a NaN reaches no other.
    """
    p = source_position(o, scale, scale_rest, ALIGN_CORNERS, ACC)
    p = tl.where(p < 0, 0.0, p)
    i0 = clamp_index(p.to(tl.int32), size - 1)
    i1 = tl.minimum(i0 + to_second(scale, scale_rest), size - 1)
    w1 = p - i0.to(ACC)
    w1 = tl.where(w1 > 1.0, 1.0, w1)
    return i0, i1, 1.0 - w1, w1


@triton.jit
def nan_blind_maximum(a, b):
    """The larger of two values; a NaN loses. For integers, and where NaN is looked for elsewhere."""
    return tl.maximum(a, b)


@triton.jit
def source_coordinate(dst, low, scale, ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr):
    """Where bilinear interpolation reads for output ``dst`` (int32) of an axis of ``low`` elements, as torch does.

    ``scale``: input elements per output element. -> first neighbour, second (the first again at the end), both int32;
    weight of the second, in ACC.
    """
    first, second, _, weight = source_taps(dst, low, tl.full((), scale, ACC), 0.0, ALIGN_CORNERS, ACC)
    return first, second, weight


@triton.jit
def mix(p, a, q, b):
    """``p a + q b`` with the same rounding everywhere, which the compiler's own choice of what to fuse would not be."""
    p, a = tl.broadcast(p, a)
    return tl.fma(p, a, q * b)


@triton.jit
def first_output(cell, low, full, scale, inverse, ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr):
    """The first of ``full`` outputs whose first neighbour is ``cell`` or later; ``full`` where there is none.

    A cell's outputs are those from its own ``first_output`` up to that of ``cell + 1``. ``inverse`` is 1 / scale.
    The inverse of ``source_coordinate`` is rounded differently, so its neighbours are tried.
    """
    guess = cell.to(ACC) * inverse if ALIGN_CORNERS else (cell.to(ACC) + 0.5) * inverse - 0.5
    dst = nan_blind_maximum(tl.minimum(tl.floor(tl.minimum(guess, full + 1.0)).to(tl.int32), full), 1) - 1
    for _ in tl.static_range(3):
        dst += (source_coordinate(dst, low, scale, ALIGN_CORNERS, ACC)[0] < cell).to(tl.int32)
    dst = tl.where(cell <= 0, 0, tl.minimum(dst, full))
    return tl.where(cell >= low, full, dst)


@triton.jit
def upsample_tile(
    tile, h, H, W, scale, inverse, splits,
    ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Output of program ``tile``: every ``splits``-th block of BLOCK_H rows of one cell row, and one block of columns.

    -> image (int64), cell row, first row, end of the cell row's rows, first column.
    """
    blocks_w = tl.cdiv(W, BLOCK_W)
    column = tile % blocks_w * BLOCK_W
    tile = tile // blocks_w
    split = tile % splits
    tile = tile // splits
    cell = tile % h
    row = first_output(cell, h, H, scale, inverse, ALIGN_CORNERS, ACC)
    end = first_output(cell + 1, h, H, scale, inverse, ALIGN_CORNERS, ACC)
    return (tile // h).to(tl.int64), cell, row + split * BLOCK_H, end, column
