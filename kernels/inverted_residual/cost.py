"""Cost model of an inverted residual block: one launch, or expansion and fused pair.

Whole: with M = HIDDEN elements after the stride, P positions for each output (``positions``), e bytes an element

    max(e (A + Y) / BW,  work spread(tiles)) + a launch
    work = M (P E_OPS + U_OPS) / LANES + 2 M (P C' + COUT') / DOT

C' and COUT' padded to powers of two as the kernel multiplies them; spread: how much longer few tiles take than a full
chip. Parts: the models of the 1x1 convolution (own kernel or library) and of the separable convolution (fused or
split), which spread likewise, and a launch each.

The cost of recomputing e, against the bytes saved: with 16 -> 96 -> 24 at stride 2, 256^2 and 16 images the expansion
is multiplied 6.75 times per output instead of 4, 5.4 GFLOP instead of 3.2: 3 us. On the lanes it is 64 operations per
element instead of the pair's 19: 34 us. Writing and reading the expanded map takes 94 us. At stride 1 e is computed 4.5
times instead of once, and the map is a quarter as large: expansion and pair stay faster.
"""

import functools

import torch

from fastseg.kernels.dense_conv.pointwise import plan as plan_pointwise
from fastseg.kernels.runtime.ceilings import H200, OWN_GEMM, Chip, spread
from fastseg.kernels.runtime.conv_sizes import Geometry
from fastseg.kernels.runtime.sizes import next_power_of_2
from fastseg.kernels.runtime.verdict import Verdict, verdict
from fastseg.kernels.separable_conv.cost import plan as plan_pair

# Lane operations, counted in the SASS for sm_90: for an element of the expanded map two bounds, the bias as the
# product's start, and its share of loads, addresses and barriers; for one of u nine multiply-adds, bias, bounds and
# conversion. With them 80, 59 and 48 for 1, 2 and 4 outputs a row at stride 1; counted 81, 54 and 51.
E_OPS, U_OPS = 7, 17
ROWS = 64  # of a tile
WIDEST = 128  # channels of x that one block of the kernel takes


def positions(group: int, stride: int) -> float:
    """Expanded pixels computed for each output."""
    return 3 * (3 + (group - 1) * stride) / group


def _power(n: int) -> int:
    return max(16, next_power_of_2(n))


def _work(group: int, C: int, COUT: int, stride: int, rate: float, chip: Chip) -> float:
    """Seconds of arithmetic for one element of u."""
    P = positions(group, stride)
    return (P * E_OPS + U_OPS) / chip.lanes + 2 * (P * _power(C) + _power(COUT)) / (rate * OWN_GEMM)


def group_of(pixels: int, C: int, COUT: int, stride: int, dilation: int, dtype: torch.dtype, chip: Chip = H200) -> int:
    """Outputs of one row: more share more of e, fewer give more tiles. Their accumulators, 32 channels of each in fp32,
    fill a quarter of the registers; neighbours share positions only without dilation."""
    wide = _power(COUT) * (2 if dtype.itemsize > 2 else 1)
    most = 1 if dilation > 1 or wide > 64 else 2 if wide > 32 else 4
    work = lambda group: _work(group, C, COUT, stride, chip.dot(dtype), chip)
    seconds = lambda group: work(group) * spread(pixels / (ROWS * group), chip)
    return min((group for group in (4, 2, 1) if group <= most), key=seconds)


@functools.lru_cache(maxsize=4096)
def plan(g: Geometry, HIDDEN: int, dtype: torch.dtype, *, tf32: bool, chip: Chip = H200) -> Verdict:
    """Which is faster by this file's header; ``g`` is of x and y."""
    e, M = dtype.itemsize, g.pixels * HIDDEN
    A, Y = g.N * g.H * g.W * g.C, g.pixels * g.COUT
    rate = chip.dot(dtype, tf32=tf32)
    group = group_of(g.pixels, g.C, g.COUT, g.stride, g.dilation, dtype)  # as the launcher asks
    work = M * _work(group, g.C, g.COUT, g.stride, rate, chip) * spread(g.pixels / (ROWS * group), chip)
    whole = max(e * (A + Y) / chip.bandwidth, work) + chip.launch

    first = plan_pointwise(g.N * g.H * g.W, g.C, HIDDEN, dtype, (2,), residual=False, tf32=tf32, chip=chip)
    pair = plan_pair(g._replace(C=HIDDEN), dtype, mid_batch_stats=False, chip=chip)
    second = (pair.microseconds if pair.pays else pair.other) * 1e-6 + chip.launch
    parts = min(first.microseconds, first.other) * 1e-6 + second
    pays = whole < parts and g.C <= WIDEST
    other = f"expansion and {'fused' if pair.pays else 'split'} pair"
    taken = "whole block" if pays else "expansion and pair"
    return verdict(pays, "whole", whole, other, parts, taken, chip.described)
