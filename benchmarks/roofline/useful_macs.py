"""How many of the multiplications of an atrous convolution meet the image, and how many each tiling executes.

A 3x3 tap at rate r reads y + dy r, x + dx r with dy, dx in {-1, 0, 1}; outside the map it multiplies padding. Per axis
the three taps have ``H + 2 max(0, H - r)`` valid positions, so the useful share of a rate is

    (H + 2 max(0, H - r)) (W + 2 max(0, W - r)) / (9 H W).

Everything here is a share of the nominal work, padding included. An ASPP is one 1x1 and three 3x3 branches, 1 + 27
units a pixel, and its shares are taken over those 28; a scheme pays for its ragged tiles whole, also in the 1x1 branch.
"""

from fractions import Fraction
from math import ceil

from fastseg.kernels.atrous_conv.regions import Branch, executed_fraction, valid

TAPS = 9


def axis_taps(size: int, rate: int) -> int:
    """Valid (position, tap) pairs of a 3-tap axis: ``size`` for the centre, ``size - rate`` for each neighbour."""
    return sum(valid(Branch(3, rate), tap, size)[1] for tap in range(3))


def useful_fraction(height: int, width: int, rate: int) -> Fraction:
    """Share of the MACs of one 3x3 convolution (stride 1, padding = rate) that do not multiply padding."""
    return Fraction(axis_taps(height, rate) * axis_taps(width, rate), TAPS * height * width)


def aspp_fraction(height: int, width: int, rates: tuple[int, ...]) -> Fraction:
    """Useful share of an ASPP: the 1x1 branch and one 3x3 branch per rate."""
    useful = 1 + TAPS * sum(useful_fraction(height, width, rate) for rate in rates)
    return useful / (1 + TAPS * len(rates))


def tile_fraction(height: int, width: int, rates: tuple[int, ...], tile: tuple[int, int]) -> Fraction:
    """Share executed by rigid ``tile = (rows, columns)`` tiles that skip a tap only when it misses the map entirely."""
    rows, columns = tile
    executed = ceil(height / rows) * ceil(width / columns)  # in tiles; the 1x1 branch
    for rate in rates:
        executed += _tile_taps(height, rows, rate) * _tile_taps(width, columns, rate)
    return Fraction(executed * rows * columns, (1 + TAPS * len(rates)) * height * width)


def strip_shape(height: int, width: int, pixels: int = 128) -> tuple[int, int]:
    """Whole rows that hold about ``pixels`` pixels: the flattened tile of a GEMM over rows."""
    return min(height, max(1, pixels // width)), width


def region_fraction(height: int, width: int, rates: tuple[int, ...], batch: int, block_m: int) -> Fraction:
    """Share executed by the grouped GEMM over regions of constant taps, each region's rows rounded up to ``block_m``.

    Cutting both axes at r and size - r gives at most nine rectangles; inside one, a tap is valid everywhere or nowhere.
    A rectangle of all images is one GEMM of M = batch x its pixels. The 1x1 branch is one more GEMM.
    """
    branches = (Branch(1, 1), *(Branch(3, rate) for rate in rates))
    return executed_fraction(height, width, branches, batch, block_m)


def _tile_taps(size: int, tile: int, rate: int) -> int:
    """(tile, tap) pairs of one axis whose shifted tile touches the map."""
    return sum(
        start + shift < size and start + shift + tile > 0
        for start in range(0, size, tile)
        for shift in (-rate, 0, rate)
    )
