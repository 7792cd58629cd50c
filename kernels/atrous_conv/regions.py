"""The products of an atrous convolution without its padding: rectangles, their taps, rows, work items.

This file needs neither Triton nor torch: kernels, cost model and benchmarks share plain numbers. Convolutions have
stride 1, an odd kernel and padding = dilation * (K // 2), so the map keeps its size. A tap at distance s reads position
p + s, and is valid if that lies in the map. Each axis is cut wherever the validity of some tap changes. Inside a piece
every tap is valid everywhere or nowhere; two axes make rectangles. A 3x3 convolution has at most nine. Several
convolutions together (the gradient at their common input) have at most 2 cuts each per axis: three atrous ones
make 7 x 7 = 49.

Along one axis the valid taps of one convolution are neighbours, so a rectangle's taps are a first row, a first column
and two counts. The rows of a rectangle's GEMM are its pixels in all images: (n, y, x) flattened.
"""

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple


class Branch(NamedTuple):
    """One convolution: K x K taps, ``dilation`` pixels apart."""

    K: int
    dilation: int


class Taps(NamedTuple):
    """The valid taps of one branch: rows ky .. ky + ny - 1 and columns kx .. kx + nx - 1 of its kernel."""

    ky: int
    ny: int
    kx: int
    nx: int

    @property
    def count(self) -> int:
        return self.ny * self.nx


class Region(NamedTuple):
    """A rectangle in pixels, and the valid taps of the branches ``first``, ``first + 1``, ..."""

    y: int
    x: int
    h: int
    w: int
    first: int
    taps: tuple[Taps, ...]

    @property
    def count(self) -> int:
        """Taps of all its branches: products per row and channel pair."""
        return sum(taps.count for taps in self.taps)


def distance(branch: Branch, tap: int) -> int:
    """Distance that tap number ``tap`` of an axis reads from its centre, in pixels."""
    return (tap - branch.K // 2) * branch.dilation


def valid(branch: Branch, tap: int, size: int) -> tuple[int, int]:
    """First position whose tap lies in an axis of ``size``, and their number."""
    away = distance(branch, tap)
    return (max(0, -away), size - abs(away)) if abs(away) < size else (0, 0)


def pieces(size: int, branches: tuple[Branch, ...], *, mirrored: bool = False) -> Iterator[tuple[int, int, list]]:
    """Cut an axis; return start, length and, for each branch, (first valid tap, number of valid taps) of each piece.

    ``mirrored``: a tap reads at minus its distance, as in the gradient at the input.
    """
    cuts = {0, size}
    for branch in branches:
        for tap in range(branch.K):
            start, count = valid(branch, tap, size)
            cuts |= {start, start + count} if count else set()
    for start, stop in pairwise(sorted(cuts)):  # a kernel's distances are symmetric, and so are its cuts
        taps = []
        for branch in branches:
            sign = -1 if mirrored else 1
            ok = [tap for tap in range(branch.K) if 0 <= start + sign * distance(branch, tap) < size]
            taps.append((ok[0], len(ok)))
        yield start, stop - start, taps


def _rectangles(H: int, W: int, branches: tuple[Branch, ...], first: int, mirrored: bool) -> Iterator[Region]:
    columns = list(pieces(W, branches, mirrored=mirrored))
    for y, h, rows in pieces(H, branches, mirrored=mirrored):
        for x, w, cols in columns:
            yield Region(y, x, h, w, first, tuple(Taps(*r, *c) for r, c in zip(rows, cols, strict=True)))


def forward_regions(H: int, W: int, branches: tuple[Branch, ...]) -> list[Region]:
    """The rectangles of each branch by itself, since each writes its own channels."""
    return [region for b, branch in enumerate(branches) for region in _rectangles(H, W, (branch,), b, False)]


def input_regions(H: int, W: int, branches: tuple[Branch, ...]) -> list[Region]:
    """The rectangles of the gradient at the input, to which all branches add."""
    return list(_rectangles(H, W, branches, 0, True))


def work_items(regions: list[Region], N: int, block_m: int, together: int | None = None) -> list[tuple[int, int]]:
    """(region, first row) of every row tile, in the order of the programs.

    Groups of images, ``together`` of them, come one after the other, None: all are one group. In a group tiles are
    sorted by falling number of taps: programs differ ninefold in length, a multiprocessor gets few of them, and the
    last to begin must be short. Among equals they go image by image, over all branches and rectangles: programs that
    run at one time read the same images, and find their rows in the cache. (The blocks of output channels of a tile,
    the kernel's fastest index, share its rows in any case.) The counts are at most 9, 6, 4, 3, 2, 1; a group is read
    from memory that often if it is too large for the cache.
    """
    items = []
    for index, region in enumerate(regions):
        pixels = region.h * region.w
        for row in range(0, N * pixels, block_m):
            image = row // pixels
            items.append((image // (together or N), -region.count, image, index, row))
    return [(index, row) for *_, index, row in sorted(items)]


def executed(regions: list[Region], N: int, block_m: int) -> int:
    """(row, tap) pairs that are multiplied, ragged row tiles counted whole."""
    return sum(region.count * -(-N * region.h * region.w // block_m) * block_m for region in regions)


def dense(H: int, W: int, branches: tuple[Branch, ...], N: int) -> int:
    """(pixel, tap) pairs of the convolutions as a library counts them, padding included."""
    return N * H * W * sum(branch.K**2 for branch in branches)


def executed_fraction(H: int, W: int, branches: tuple[Branch, ...], N: int, block_m: int) -> Fraction:
    """Fraction of the dense multiplications that the forward executes, ragged row tiles counted whole."""
    return Fraction(executed(forward_regions(H, W, branches), N, block_m), dense(H, W, branches, N))


# --- tables for the kernels: rows of integers

REGION = 6  # integers of a region before its taps: y, x, h - 1, w - 1, first branch, branches
TAPS = 8  # integers of one branch: shift, row step, column step (pixels), ny, nx, first weight, K, slice of channels


def region_rows(regions: list[Region], W: int, branches: tuple[Branch, ...], *, mirrored: bool) -> list[list[int]]:
    """One row for each region: where it is, then for each of its branches where the taps read and which weights.

    ``mirrored``: of the gradient at the input, which reads each branch's own slice of the channels.
    """
    sign = -1 if mirrored else 1
    rows = []
    for region in regions:
        row = [region.y, region.x, region.h - 1, region.w - 1, region.first, len(region.taps)]
        for b, taps in enumerate(region.taps, region.first):
            K, step = branches[b].K, sign * branches[b].dilation
            shift = sign * (distance(branches[b], taps.ky) * W + distance(branches[b], taps.kx))
            row += [shift, step * W, step, taps.ny, taps.nx, taps.ky * K + taps.kx, K, b * mirrored]
        rows.append(row)
    return rows


def by_pixels(branches: tuple[Branch, ...]) -> tuple[int, ...]:
    """The taps of all branches, numbered one branch after the other, by falling pixels where they are valid.

    For any square map larger than all distances: (S - a) (S - b) pixels at distances a and b.
    """
    away = [(abs(distance(b, ky)), abs(distance(b, kx))) for b in branches for ky in range(b.K) for kx in range(b.K)]
    return tuple(sorted(range(len(away)), key=lambda tap: (sum(away[tap]), -away[tap][0] * away[tap][1])))
