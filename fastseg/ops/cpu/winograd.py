"""Winograd's F(4x4, 3x3) on a CPU: 3x3 convolutions with a quarter of the products, out of library calls.

Along one axis, four neighbouring outputs of a three-tap filter take six products; the direct form takes twelve:

    y = A [(G g) * (B d)]        y: 4 outputs, g: 3 taps, d: the 6 inputs under them

A, G and B are those of Winograd, Toom and Cook for the points 0, 1, -1, 1/2, -2 and infinity. Along both axes a tile of
4x4 outputs takes 36 products; the direct form takes 144. ``G g`` is computed once. For each of the 36, the products
over all pixels and channels are a matrix product; one grouped 1x1 convolution of oneDNN computes all of them. The bias
is added to the product of the points 1 and 1, whose columns in A are all ones.

A block of the map goes through all steps while it is in the cache. Each transform is a sum of a few pixels with fixed
weights, for all channels at once: torch's ``embedding_bag``, which FBGEMM compiles for the processor. In the cache it
moves 60 GB/s; batches of small matrix products move 16 to 30. Nothing is padded or cropped: the sums leave out pixels
outside the map.

Rounding: errors are about 2e-5 for outputs of size 4 in fp32, a few times those of the direct form. NaN and infinity
reach all outputs of their tiles, not only those under the filter.

Reference: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, arXiv:1509.09308.
"""

import functools
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg.ops.core.constants import constant
from fastseg.ops.cpu.onednn import Packed, pack

OUT, TAPS = 4, 3
IN = OUT + TAPS - 1
POINTS = (Fraction(0), Fraction(1), Fraction(-1), Fraction(1, 2), Fraction(-2))  # and infinity
ONES = 1  # the point whose column in A is all ones


class Matrices(NamedTuple):
    a: Tensor  # (4, 6)
    g: Tensor  # (6, 3)
    b: Tensor  # (6, 6)


@constant()
def matrices(dtype: torch.dtype) -> Matrices:
    """A, G and B of F(4, 3)."""
    a = [[p**i for p in POINTS] + [Fraction(i == OUT - 1)] for i in range(OUT)]
    g = [[p**k / _product(p - q for q in POINTS if q != p) for k in range(TAPS)] for p in POINTS]
    g.append([Fraction(k == TAPS - 1) for k in range(TAPS)])
    b = [[*_with_roots([q for q in POINTS if q != p]), Fraction(0)] for p in POINTS] + [_with_roots(POINTS)]
    exact = (torch.tensor([[float(v) for v in row] for row in rows], dtype=torch.float64) for rows in (a, g, b))
    return Matrices(*(t.to(dtype) for t in exact))


def _product(factors) -> Fraction:
    return functools.reduce(lambda x, y: x * y, factors, Fraction(1))


def _with_roots(roots) -> list[Fraction]:
    """Coefficients, from the constant up, of the polynomial with these roots and leading coefficient 1."""
    out = [Fraction(1)]
    for root in roots:
        out = [low - root * high for low, high in zip([Fraction(0), *out], [*out, Fraction(0)], strict=True)]
    return out


# Fitted to times of 35 layers on one thread of an AVX-512 machine where oneDNN's own convolution reaches 250 GFLOP/s.
# Winograd took 0.33 to 0.4 of its time from 256 channels on, 0.45 at 128, 0.65 at 64, 0.8 at 48 or from 32 to 64, 1.1
# at 32; 0.8 with 12 tiles. Blocks of 128 tiles were best or within 2 % of the best for all layers; blocks of 512 were
# slower by up to a half. Two rows of 64 tiles, which read fewer pixels twice, were 5 to 10 % faster than one row of
# 128. On two threads 256 took 0.82 of the time of 128 in a U-Net, as each thread has its own cache; with 16 tiles,
# Winograd took 0.65 of oneDNN's time at 256 and at 512 channels. More than 4 shares are not measured; for 512 channels
# they take 38 MB already. Below LEAST_PRODUCTS, in products per tap and block, calls cost more than they save: 64
# channels on 16x16.
MOST_TILES, MOST_ACROSS, MOST_SHARES = 128, 64, 4
LEAST_PRODUCTS = 2**21


def plan(C: int, COUT: int, H: int, W: int, threads: int) -> tuple[int, int] | None:
    """Tiles down and across in a block of x (*, C, H, W), or None if the library's convolution is faster.

    The rule is fixed, because timing trials are noisy.
    """
    down, across = -(-H // OUT), -(-W // OUT)
    least = 4096 if min(C, COUT) < 128 else 36 if min(C, COUT) < 256 else 16
    few = threads > 1 and down * across < least  # for several threads
    if min(C, COUT) < 32 or C * COUT < 2048 or min(H, W) < 8 or H * W < 144 or few:
        return None
    if C * COUT * H * W < LEAST_PRODUCTS:
        return None
    across = _even(across, MOST_ACROSS)
    return _even(down, MOST_TILES * min(threads, MOST_SHARES) // across), across


def _even(count: int, most: int) -> int:
    """The size of equal parts of ``count``, as few as possible, none larger than ``most``."""
    return -(-count // -(-count // most))


class Sums(NamedTuple):
    """Weighted sums of rows of a table: the rows, where each sum begins, and the weights."""

    rows: Tensor
    starts: Tensor
    weights: Tensor

    def __call__(self, table: Tensor) -> Tensor:
        """(rows, C) -> (sums, C)."""
        rows, starts, weights = self
        return F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _sums(rows: Tensor, weights: Tensor, inside: Tensor | None = None) -> Sums:
    """``sum_k weights[..., k] table[rows[..., k]]`` over the rows that are ``inside``."""
    kept = weights != 0 if inside is None else inside & (weights != 0)
    rows, weights, kept = (t.flatten(0, -2) for t in torch.broadcast_tensors(rows, weights, kept))
    starts = F.pad(kept.sum(1).cumsum(0), (1, 0))
    return Sums(rows[kept].int(), starts.int(), weights[kept])


class Span(NamedTuple):
    """Part of one axis: the inputs under its tiles, which begin at ``start - 1``, and its outputs."""

    first: int
    last: int
    start: int
    stop: int


class Block(NamedTuple):
    """Some tiles of a map, and their transforms."""

    y: Span
    x: Span
    down: Sums  # B along y: pixels -> (tiles down, 6, pixels across)
    across: Sums  # B along x: -> (tiles down, tiles across, 6, 6)
    back: Sums  # A along both: -> pixels


def _spans(length: int, tiles: int) -> list[Span]:
    """Cut an axis into parts of so many tiles; the last may begin inside the one before it."""
    final = -(-length // OUT) - tiles
    edges = [(OUT * first, OUT * (first + tiles)) for first in (*range(0, final, tiles), final)]
    return [Span(max(a - 1, 0), min(b + 1, length), a, min(b, length)) for a, b in edges]


@constant(32)  # shared by layers of one size
def blocks(H: int, W: int, tiles: tuple[int, int]) -> tuple[Block, ...]:
    """Cut a map into blocks of so many tiles down and across."""
    (rows, columns), six, m = tiles, torch.arange(IN), matrices(torch.float32)
    window = lambda count, lead: lead + OUT * torch.arange(count).view(-1, 1, 1, 1) + six

    @functools.cache
    def down(lead: int, height: int, width: int) -> Sums:
        y = window(rows, lead)
        return _sums(y * W + torch.arange(width).unsqueeze(1), m.b.unsqueeze(1), (y >= 0) & (y < height))

    @functools.cache
    def across(lead: int, width: int) -> Sums:
        x, lines = window(columns, lead), torch.arange(rows * IN).view(rows, 1, IN, 1, 1)
        return _sums(lines * width + x, m.b, (x >= 0) & (x < width))

    @functools.cache
    def back(height: int, width: int) -> Sums:
        y, x = torch.arange(height), torch.arange(width)
        tile = (y // OUT * columns).view(-1, 1, 1) + (x // OUT).unsqueeze(1)
        weights = torch.einsum("yi,xj->yxij", m.a[y % OUT], m.a[x % OUT]).flatten(2)
        return _sums(tile * IN**2 + torch.arange(IN**2), weights)

    def block(y: Span, x: Span) -> Block:
        height, width = y.last - y.first, x.last - x.first
        along_y, along_x = down(y.start - 1 - y.first, height, width), across(x.start - 1 - x.first, width)
        return Block(y, x, along_y, along_x, back(y.stop - y.start, x.stop - x.start))

    return tuple(block(y, x) for y in _spans(H, rows) for x in _spans(W, columns))


class Filters(NamedTuple):
    """Transformed filters ``G g``, packed for blocks of one shape."""

    packed: Packed
    blocks: tuple[Block, ...]
    channels: int


def transformed_bytes(weight: Tensor) -> int:
    """Size of the transformed filters, in bytes."""
    return weight.numel() // TAPS**2 * weight.element_size() * IN**2


def transform(weight: Tensor, bias: Tensor | None, tiles: tuple[int, int], H: int, W: int) -> Filters:
    """Transform weight (COUT, C, 3, 3) for maps of (H, W) in blocks of so many tiles down and across."""
    COUT, C = weight.shape[:2]
    g = matrices(torch.float64).g
    filters = torch.einsum("ia,jb,kcab->ijkc", g, g, weight.detach().double()).reshape(-1, C, 1, 1).to(weight.dtype)
    if bias is not None:
        wide = bias.new_zeros(IN, IN, COUT)
        wide[ONES, ONES] = bias.detach()
        bias = wide.view(-1)
    shape = (1, IN**2 * C, 1, tiles[0] * tiles[1])
    return Filters(pack(filters, bias, (1, 1), (0, 0), (1, 1), IN**2, shape), blocks(H, W, tiles), COUT)


def winograd_conv2d(x: Tensor, filters: Filters, relu: bool) -> Tensor:
    """conv2d(x, weight, bias, padding=1) and a ReLU: (N, C, H, W) -> (N, COUT, H, W), dense in channels_last."""
    (N, C, H, W), COUT = x.shape, filters.channels
    pixels, result = _nhwc(x).contiguous(), x.new_empty(N, H, W, COUT)
    for n in range(N):
        for rows, columns, down, across, back in filters.blocks:
            v = across(down(pixels[n, rows.first : rows.last].view(-1, C)[columns.first :]))
            products = filters.packed(v.view(1, 1, -1, IN**2 * C).permute(0, 3, 1, 2))
            out = result[n, rows.start : rows.stop, columns.start : columns.stop]
            values = back(_nhwc(products).view(-1, COUT)).view(out.shape)
            torch.clamp_min(values, 0, out=out) if relu else out.copy_(values)
    return result.permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)
