"""3x3 convolutions with fewer multiplications, out of a library's matrix products, on a CPU: Winograd's F(4, 3).

Along one axis, four neighbouring outputs of a three-tap filter take six products, where written out they take twelve:

    y = A [(G g) * (B d)]        y: 4 outputs, g: 3 taps, d: the 6 inputs under them

with A, G and B by Toom and Cook from the points 0, 1, -1, 1/2, -2 and infinity. ``G g`` is made once. The products of
all pixels and channels, for each of the six, are a matrix product: one grouped convolution of oneDNN does all six.

    lines   F(4, 3) along x; the three filter rows stay a 3 x 1 convolution. 1/2 of the multiplications.
    tiles   F(4x4, 3x3) along both. 1/4 of them, of which the transforms take a larger part back.

A strip of the map goes through all three steps while it is in the cache. Transforms are batches of small matrix
products straight from the map and straight into the result: nothing is padded, an outermost tile takes the columns of
B that lie inside. A bias rides on the product of point 1, whose column in A is all ones.

Rounding: differences to the exact result are about 1e-5 of outputs of size 4 in fp32, a few times those of the
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
LINES, TILES = "lines", "tiles"


class Matrices(NamedTuple):
    a: Tensor  # (4, 6)
    g: Tensor  # (6, 3)
    b: Tensor  # (6, 6)
    b_first: Tensor  # (6, 5): of a tile whose first input lies in the padding
    b_last: Tensor  # (6, 5)


@functools.cache
def matrices(dtype: torch.dtype) -> Matrices:
    """A, G and B of F(4, 3)."""
    a = [[p**i for p in POINTS] + [Fraction(i == OUT - 1)] for i in range(OUT)]
    g = [[p**k / _product(p - q for q in POINTS if q != p) for k in range(TAPS)] for p in POINTS]
    g.append([Fraction(k == TAPS - 1) for k in range(TAPS)])
    b = [[*_with_roots([q for q in POINTS if q != p]), Fraction(0)] for p in POINTS] + [_with_roots(POINTS)]
    with torch.inference_mode(False), torch.device("cpu"):
        a, g, b = (torch.tensor([[float(v) for v in row] for row in rows], dtype=torch.float64) for rows in (a, g, b))
        return Matrices(*(t.to(dtype).contiguous() for t in (a, g, b, b[:, 1:], b[:, :-1])))


def _product(factors) -> Fraction:
    return functools.reduce(lambda x, y: x * y, factors, Fraction(1))


def _with_roots(roots) -> list[Fraction]:
    """Coefficients of the polynomial with these roots and leading coefficient 1, from the constant up."""
    out = [Fraction(1)]
    for root in roots:
        out = [low - root * high for low, high in zip([Fraction(0), *out], [*out, Fraction(0)], strict=True)]
    return out


class Plan(NamedTuple):
    """How a map is convolved: along which axes, and in strips of how many rows of pixels, or of tiles."""

    form: str
    strip: int


# By times of 15 layers on one thread of an AVX-512 machine where oneDNN's own convolution makes 250 GFLOP/s: tiles took
# 0.32 to 0.45 of its time from 256 channels on, 0.6 at 128, 0.73 from 128 to 64, and 1.0 at 64, where lines took 0.86.
STRIP_LINES, STRIP_TILES = 16, 256  # rows; tiles


def plan(C: int, COUT: int, H: int, W: int, threads: int) -> Plan | None:
    """The form that is fast for x (*, C, H, W), or None: the library's convolution. A fixed rule: trials are noise."""
    down, across = -(-H // OUT), -(-W // OUT)
    few = threads > 1 and min(C, COUT) < 128 and down * across < 4096  # for several threads
    if min(C, COUT) < 64 or min(H, W) < 8 or few:
        return None
    if C * COUT >= 128 * 64:
        if down * across < 36:
            return None
        strips = min(down, -(-down * across // STRIP_TILES))
        return Plan(TILES, -(-down // strips))
    return None if H * W < 16384 else Plan(LINES, -(-H // -(-H // STRIP_LINES)))


class Filters(NamedTuple):
    """``G g``, packed for strips of one shape: one convolution, or with tiles one for each of the six along y."""

    plan: Plan
    packed: tuple[Packed, ...]
    channels: int


def transformed_bytes(weight: Tensor, form: str) -> int:
    """Bytes of the transformed filters."""
    return weight.numel() // TAPS**2 * weight.element_size() * IN * (IN if form == TILES else TAPS)


def transform(weight: Tensor, bias: Tensor | None, plan: Plan, W: int) -> Filters:
    """weight (COUT, C, 3, 3), for maps of width ``W``."""
    COUT, C = weight.shape[:2]
    g, across, wide = matrices(torch.float64).g, -(-W // OUT), weight.detach().double()
    along_x = torch.einsum("jb,kcab->ajkc", g, wide)  # (3, 6, COUT, C)
    biases = None
    if bias is not None:
        biases = bias.new_zeros(IN, COUT)
        biases[ONES] = bias.detach()
    geometry = ((1, 1), (0, 0), (1, 1), IN)
    if plan.form == LINES:
        filters = along_x.permute(1, 2, 3, 0).reshape(IN * COUT, C, TAPS, 1).to(weight.dtype)
        shape = (1, IN * C, plan.strip + TAPS - 1, across)
        return Filters(plan, (pack(filters, None if biases is None else biases.view(-1), *geometry, shape),), COUT)
    shape = (1, IN * C, 1, plan.strip * across)
    packed = []
    for i in range(IN):
        filters = torch.einsum("a,ajkc->jkc", g[i], along_x).reshape(IN * COUT, C, 1, 1).to(weight.dtype)
        packed.append(pack(filters, biases.view(-1) if biases is not None and i == ONES else None, *geometry, shape))
    return Filters(plan, tuple(packed), COUT)


def winograd_conv2d(x: Tensor, filters: Filters, relu: bool) -> Tensor:
    """conv2d(x, weight, bias, padding=1), and a ReLU: (N, C, H, W) -> (N, COUT, H, W), dense in channels_last."""
    H, W = x.shape[2:]
    tiles = filters.plan.form == TILES
    down, right = -H % OUT if tiles else 0, -W % OUT
    if down or right:
        x = F.pad(x, (0, right, 0, down))
    x = x.contiguous(memory_format=torch.channels_last)
    y = (_tiles if tiles else _lines)(x, filters, relu)
    return y[:, :, :H, :W].contiguous(memory_format=torch.channels_last)


def _apply(matrix: Tensor, maps: Tensor, out: Tensor) -> None:
    """out[i] = matrix @ maps[i]."""
    torch.bmm(matrix.expand(maps.shape[0], -1, -1), maps, out=out)


def _along_x(m: Matrices, lines: Tensor, at: int, rows: int, W: int, C: int, out: Tensor) -> None:
    """B over the tiles of ``rows`` dense lines of W pixels from offset ``at``, into out (rows * W / 4, 6, C)."""
    tiles, line = rows * W // OUT, W * C
    if tiles > 2:  # all but the very first and last; at the ends of lines they read a neighbouring line: see below
        inner = lines.as_strided((tiles - 2, IN, C), (OUT * C, C, 1), at + (OUT - 1) * C)
        _apply(m.b, inner, out[1:-1])
    ends = out.unflatten(0, (rows, W // OUT))
    _apply(m.b_first, lines.as_strided((rows, IN - 1, C), (line, C, 1), at), ends[:, 0])
    _apply(m.b_last, lines.as_strided((rows, IN - 1, C), (line, C, 1), at + (W - IN + 1) * C), ends[:, -1])


def _strips(length: int, strip: int) -> tuple[int, ...]:
    """Starts of strips of one length: the last may begin inside the one before it."""
    return (*range(0, length - strip, strip), length - strip)


def _lines(x: Tensor, filters: Filters, relu: bool) -> Tensor:
    N, C, H, W = x.shape
    m, rows, COUT, across = matrices(x.dtype), filters.plan.strip, filters.channels, W // OUT
    y, pixels = x.new_empty(N, H, W, COUT), x.permute(0, 2, 3, 1)
    v = x.new_empty(rows + 2, across, IN, C)
    for n in range(N):
        for top in _strips(H, rows):
            first, last = max(top - 1, 0), min(top + rows + 1, H)
            above, inside = first - top + 1, last - first
            source = pixels[n, first:last]
            out = v[above : above + inside].view(inside * across, IN, C)
            _along_x(m, source, source.storage_offset(), inside, W, C, out)
            v[:above].zero_()
            v[above + inside :].zero_()
            products = filters.packed[0](v.view(1, rows + 2, across, IN * C).permute(0, 3, 1, 2))
            strip = y[n, top : top + rows]
            _apply(m.a, _nhwc(products).view(-1, IN, COUT), strip.view(-1, OUT, COUT))
            if relu:
                strip.clamp_min_(0)
    return y.permute(0, 3, 1, 2)


def _tiles(x: Tensor, filters: Filters, relu: bool) -> Tensor:
    N, C, H, W = x.shape
    m, S, COUT = matrices(x.dtype), filters.plan.strip, filters.channels
    across, down, line = W // OUT, H // OUT, W * C
    y, pixels = x.new_empty(N, H, W, COUT), x.permute(0, 2, 3, 1)
    r, v, z = x.new_empty(IN, S, line), x.new_empty(S * across, IN, C), x.new_empty(IN, S, W * COUT)
    along_y = r.transpose(0, 1)
    for n in range(N):
        at = pixels[n].storage_offset()
        for top in _strips(down, S):
            first, last = int(top == 0), S - int(top + S == down)
            if first:
                _apply(m.b_first, x.as_strided((1, IN - 1, line), (0, line, 1), at), along_y[:1])
            if last < S:
                _apply(m.b_last, x.as_strided((1, IN - 1, line), (0, line, 1), at + (H - IN + 1) * line), along_y[-1:])
            if last > first:
                start = at + (OUT * (top + first) - 1) * line
                inner = x.as_strided((last - first, IN, line), (OUT * line, line, 1), start)
                _apply(m.b, inner, along_y[first:last])
            for i in range(IN):
                _along_x(m, r, i * S * line, S, W, C, v)
                products = filters.packed[i](v.view(1, 1, S * across, IN * C).permute(0, 3, 1, 2))
                _apply(m.a, _nhwc(products).view(-1, IN, COUT), z[i].view(-1, OUT, COUT))
            strip = y[n, OUT * top : OUT * (top + S)]
            for s in range(S):
                torch.mm(m.a, z[:, s], out=strip[OUT * s : OUT * (s + 1)].view(OUT, -1))
            if relu:
                strip.clamp_min_(0)
    return y.permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)
