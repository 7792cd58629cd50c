"""3x3 convolutions with a quarter of the multiplications, out of a library's matrix products, on a CPU: F(4x4, 3x3).

Along one axis, four neighbouring outputs of a three-tap filter take six products, where written out they take twelve:

    y = A [(G g) * (B d)]        y: 4 outputs, g: 3 taps, d: the 6 inputs under them

with A, G and B by Winograd, Toom and Cook from the points 0, 1, -1, 1/2, -2 and infinity; along both axes a tile of 4x4
outputs takes 36 products, written out 144. ``G g`` is made once. The products of all pixels and channels, for each of
the 36, are a matrix product: one grouped 1x1 convolution of oneDNN does all of them. A bias rides on the product of the
point 1 and 1, whose columns in A are all ones.

A strip of the map goes through all steps while it is in the cache. Each transform adds up a few pixels with fixed
weights, all channels at once: torch's ``embedding_bag``, which FBGEMM compiles for the processor. In the cache it moves
60 GB/s, where batches of small matrix products move 16 to 30. Nothing is padded or cropped: pixels outside are not in
the sums.

Rounding: differences to the exact result are about 2e-5 of outputs of size 4 in fp32, a few times those of the
convolution written out. NaN and infinity reach the outputs of their tiles, not only those under the filter.

Reference: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, arXiv:1509.09308.
"""

import functools
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg.ops._onednn import Packed, pack

OUT, TAPS = 4, 3
IN = OUT + TAPS - 1
POINTS = (Fraction(0), Fraction(1), Fraction(-1), Fraction(1, 2), Fraction(-2))  # and infinity
ONES = 1  # the point whose column in A is all ones


class Matrices(NamedTuple):
    a: Tensor  # (4, 6)
    g: Tensor  # (6, 3)
    b: Tensor  # (6, 6)


@functools.cache
def matrices(dtype: torch.dtype) -> Matrices:
    """A, G and B of F(4, 3)."""
    a = [[p**i for p in POINTS] + [Fraction(i == OUT - 1)] for i in range(OUT)]
    g = [[p**k / _product(p - q for q in POINTS if q != p) for k in range(TAPS)] for p in POINTS]
    g.append([Fraction(k == TAPS - 1) for k in range(TAPS)])
    b = [[*_with_roots([q for q in POINTS if q != p]), Fraction(0)] for p in POINTS] + [_with_roots(POINTS)]
    with torch.inference_mode(False), torch.device("cpu"):
        exact = (torch.tensor([[float(v) for v in row] for row in rows], dtype=torch.float64) for rows in (a, g, b))
        return Matrices(*(t.to(dtype) for t in exact))


def _product(factors) -> Fraction:
    return functools.reduce(lambda x, y: x * y, factors, Fraction(1))


def _with_roots(roots) -> list[Fraction]:
    """Coefficients of the polynomial with these roots and leading coefficient 1, from the constant up."""
    out = [Fraction(1)]
    for root in roots:
        out = [low - root * high for low, high in zip([Fraction(0), *out], [*out, Fraction(0)], strict=True)]
    return out


# By times of 35 layers on one thread of an AVX-512 machine where oneDNN's own convolution makes 250 GFLOP/s: 0.33 to
# 0.4 of its time from 256 channels on, 0.45 at 128, 0.65 at 64, 0.8 at 48 or from 32 to 64, 1.1 at 32; 0.8 with 12
# tiles. Strips of 128 tiles were best or within 2 % of it for all, and of 512 slower by up to a half.
STRIP = 128  # tiles, or one row of them


def plan(C: int, COUT: int, H: int, W: int, threads: int) -> int | None:
    """Rows of tiles in a strip of x (*, C, H, W), or None where the library's convolution is faster.

    A fixed rule: trials are noise.
    """
    down, across = -(-H // OUT), -(-W // OUT)
    tiles = down * across
    few = threads > 1 and tiles < (4096 if min(C, COUT) < 128 else 36)  # for several threads
    if min(C, COUT) < 32 or C * COUT < 2048 or min(H, W) < 8 or H * W < 144 or few:
        return None
    strips = -(-down // max(1, STRIP // across))
    return -(-down // strips)


class Sums(NamedTuple):
    """Weighted sums of rows of a table, one after the other: which rows, where each sum begins, and the weights."""

    rows: Tensor
    starts: Tensor
    weights: Tensor

    def __call__(self, table: Tensor) -> Tensor:
        """(rows, C) -> (sums, C)."""
        rows, starts, weights = self
        return F.embedding_bag(
            rows, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
        )  # fmt: skip


def _sums(rows: Tensor, weights: Tensor, inside: Tensor | None = None) -> Sums:
    """``sum_k weights[..., k] table[rows[..., k]]``, of those ``inside``."""
    kept = weights != 0 if inside is None else inside & (weights != 0)
    rows, weights, kept = (t.flatten(0, -2) for t in torch.broadcast_tensors(rows, weights, kept))
    starts = F.pad(kept.sum(1).cumsum(0), (1, 0))
    return Sums(rows[kept].int(), starts.int(), weights[kept])


class Strip(NamedTuple):
    """Some rows of tiles: the rows of pixels under them and of their outputs, and the three transforms."""

    above: int
    below: int
    top: int
    bottom: int
    down: Sums  # B along y: pixels -> (S, 6, W)
    across: Sums  # B along x: -> (S, W / 4, 6, 6)
    back: Sums  # A along both: -> pixels


@functools.lru_cache(maxsize=32)  # layers of one size share them
def strips(H: int, W: int, S: int) -> tuple[Strip, ...]:
    """A map cut into strips of ``S`` rows of tiles; the last may begin inside the one before it."""
    with torch.inference_mode(False), torch.device("cpu"):
        return tuple(_strips(H, W, S))


def _strips(H: int, W: int, S: int):
    tiles, columns, six = -(-H // OUT), -(-W // OUT), torch.arange(IN)
    m, x = matrices(torch.float32), torch.arange(W)
    window = lambda count, first: first + OUT * torch.arange(count).unsqueeze(1) + six

    @functools.cache
    def down(first: int, height: int) -> Sums:
        y = window(S, first).view(S, 1, 1, IN)
        return _sums(y * W + x.view(W, 1), m.b.unsqueeze(1), (y >= 0) & (y < height))

    @functools.cache
    def back(height: int) -> Sums:
        y = torch.arange(height).unsqueeze(1)
        tile = (y // OUT * columns + x // OUT).view(height, W, 1)
        weights = torch.einsum("yi,xj->yxij", m.a[torch.arange(height) % OUT], m.a[x % OUT])
        return _sums(tile * IN**2 + torch.arange(IN**2), weights.flatten(2))

    at = window(columns, -1).view(columns, 1, 1, IN)
    lines = (torch.arange(S).view(S, 1, 1, 1, 1) * IN + six.view(IN, 1, 1)) * W
    across = _sums(lines + at, m.b, (at >= 0) & (at < W))
    for tile in (*range(0, tiles - S, S), tiles - S):
        top, bottom = OUT * tile, min(OUT * (tile + S), H)
        above, below = max(top - 1, 0), min(OUT * (tile + S) + 1, H)
        yield Strip(above, below, top, bottom, down(top - 1 - above, below - above), across, back(bottom - top))


class Filters(NamedTuple):
    """``G g``, packed for strips of one shape."""

    packed: Packed
    strips: tuple[Strip, ...]
    channels: int


def transformed_bytes(weight: Tensor) -> int:
    """Bytes of the transformed filters."""
    return weight.numel() // TAPS**2 * weight.element_size() * IN**2


def transform(weight: Tensor, bias: Tensor | None, S: int, H: int, W: int) -> Filters:
    """weight (COUT, C, 3, 3), for maps of (H, W) in strips of ``S`` rows of tiles."""
    COUT, C = weight.shape[:2]
    g = matrices(torch.float64).g
    filters = torch.einsum("ia,jb,kcab->ijkc", g, g, weight.detach().double()).reshape(-1, C, 1, 1).to(weight.dtype)
    if bias is not None:
        wide = bias.new_zeros(IN, IN, COUT)
        wide[ONES, ONES] = bias.detach()
        bias = wide.view(-1)
    shape = (1, IN**2 * C, 1, S * -(-W // OUT))
    return Filters(pack(filters, bias, (1, 1), (0, 0), (1, 1), IN**2, shape), strips(H, W, S), COUT)


def winograd_conv2d(x: Tensor, filters: Filters, relu: bool) -> Tensor:
    """conv2d(x, weight, bias, padding=1), and a ReLU: (N, C, H, W) -> (N, COUT, H, W), dense in channels_last."""
    (N, C, H, W), COUT = x.shape, filters.channels
    pixels, y = _nhwc(x).contiguous(), x.new_empty(N, H, W, COUT)
    for n in range(N):
        for strip in filters.strips:
            v = strip.across(strip.down(pixels[n, strip.above : strip.below].view(-1, C)))
            products = filters.packed(v.view(1, 1, -1, IN**2 * C).permute(0, 3, 1, 2))
            result = strip.back(_nhwc(products).view(-1, COUT))
            out = y[n, strip.top : strip.bottom].view(-1, COUT)
            torch.clamp_min(result, 0, out=out) if relu else out.copy_(result)
    return y.permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)
