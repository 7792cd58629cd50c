"""Device functions that say which pixels a tile holds."""

import triton
import triton.language as tl


@triton.jit
def tile_and_block(blocks):
    """This program's (tile, block of channels) in a grid on axis x alone, ``blocks`` to a tile: blocks run fastest.

    The hardware starts programs in the order of their numbers. All blocks of a tile then run at once and read the
    tile's rows from L2; tiles fastest, every block would sweep the whole map, and read it from DRAM anew.
    """
    pid = tl.program_id(0)
    return pid // blocks, pid % blocks


@triton.jit
def tile_pixels(tile, H, W, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Pixels of tile number ``tile`` over a batch of (H, W) maps: -> image (int64), rows, columns, which are inside."""
    tiles_w = tl.cdiv(W, BLOCK_W)
    tiles_image = tl.cdiv(H, BLOCK_H) * tiles_w
    n = (tile // tiles_image).to(tl.int64)
    in_image = tile % tiles_image
    offs_m = tl.arange(0, BLOCK_H * BLOCK_W)
    y = in_image // tiles_w * BLOCK_H + offs_m // BLOCK_W
    x = in_image % tiles_w * BLOCK_W + offs_m % BLOCK_W
    return n, y, x, (y < H) & (x < W)


@triton.jit
def in_phase_order(i, size, phases):
    """Position ``i`` of an axis ordered by position modulo ``phases``, then by position; for 0 <= i < size.

    What is ``phases`` apart on the map are neighbours in the order: space-to-batch, as an address. The first
    ``size % phases`` phases have one position more than the others.
    """
    short = size // phases
    longer = size - short * phases
    head = longer * (short + 1)
    j = i - head
    of = tl.where(short > 0, short, 1)
    at = tl.where(i < head, i // (short + 1) + i % (short + 1) * phases, longer + j // of + j % of * phases)
    return clamp_index(at, size - 1)


@triton.jit
def dilated_tile_pixels(tile, H, W, dilation, PHASED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """As ``tile_pixels``; with PHASED a tile's rows and columns are ``dilation`` apart, so that it holds its own taps.

    A contiguous tile of a convolution whose dilation is as large as the tile reads every input pixel once for each of
    its taps, from L2; one in phase order finds most of them where another of its pixels has just read them.
    """
    n, y, x, inside = tile_pixels(tile, H, W, BLOCK_H, BLOCK_W)
    if PHASED:
        y, x = in_phase_order(y, H, dilation), in_phase_order(x, W, dilation)
    return n, y, x, inside


@triton.jit
def clamp_index(i, last):
    """``i`` within [0, last], by minima alone (at the lower end, of the complement): bounds that the offset check can
    follow, and no maximum, which is banned for what it does to NaN."""
    return -1 - tl.minimum(-1 - tl.minimum(i, last), -1)
