"""Sizes of a separable convolution, and the cost model that chooses between its two forms.

Fused: one kernel computes the depthwise tile and feeds it to the GEMM; the depthwise map never reaches memory, but it
is computed again for each block of output channels, and its arithmetic waits for the GEMM's. Split: one kernel writes
the depthwise map, a second is a plain GEMM. With U depthwise elements, e bytes each, and n = ceil(COUT / BLOCK_N):

    fused   max(e (A + Y) / BW,  n (2K^2 + 1) U / LANES + 2 U COUT / DOT)
    split   max(e (A + U) / BW,  (2K^2 + 1) U / LANES) + max(e (U + Y) / BW,  2 U COUT / DOT) + LAUNCH

In training with batch statistics between the halves, fused pays one more pass over the input, for the statistics, in a
launch of its own. LAUNCH is what decides on small maps. The
2K^2 + 1 lane operations per element are one multiply-add and one conversion a tap (counted in the SASS), and the store.
"""

import functools
from typing import NamedTuple

import torch

from fastseg.kernels.runtime.ceilings import BANDWIDTH, DOT, LANES, LAUNCH
from fastseg.kernels.runtime.conv_sizes import Geometry
from fastseg.kernels.runtime.sizes import cdiv, next_power_of_2


class Plan(NamedTuple):
    form: str  # "fused" or "split"
    fused_us: float
    split_us: float

    def __str__(self) -> str:
        return f"{self.form}: model says fused {self.fused_us:.1f} us, split {self.split_us:.1f} us on an H200"


def fused_block_n(COUT: int, dtype: torch.dtype) -> int:
    """Output channels of one fused program: all of them where the accumulator still fits into registers."""
    return min(256 if dtype.itemsize == 2 else 128, max(16, next_power_of_2(COUT)))


@functools.lru_cache(maxsize=4096)
def plan(g: Geometry, dtype: torch.dtype, *, mid_batch_stats: bool) -> Plan:
    """Which form is faster on these sizes, by the model in this file's header."""
    e = dtype.itemsize
    U, A, Y = g.pixels * g.C, g.N * g.H * g.W * g.C, g.pixels * g.COUT
    depthwise = (2 * g.K * g.K + 1) * U / LANES
    dot = 2 * U * g.COUT / DOT[dtype]
    recomputed = cdiv(g.COUT, fused_block_n(g.COUT, dtype)) * depthwise
    fused = max(e * (A + Y) / BANDWIDTH, recomputed + dot)
    split = max(e * (A + U) / BANDWIDTH, depthwise) + max(e * (U + Y) / BANDWIDTH, dot) + LAUNCH
    if mid_batch_stats:
        fused += max(e * A / BANDWIDTH, depthwise) + LAUNCH
    return Plan("fused" if fused <= split else "split", fused * 1e6, split * 1e6)
