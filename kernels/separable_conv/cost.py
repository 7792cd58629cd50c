"""Sizes of a separable convolution, and the cost model that chooses between its two forms.

Fused: one kernel computes the depthwise tile and feeds it to the GEMM; the depthwise map never reaches memory, but it
is computed again for each block of output channels, and its arithmetic waits for the GEMM's. Split: one kernel writes
the depthwise map, a second is a plain GEMM. With U depthwise elements, e bytes each, n = ceil(COUT / BLOCK_N), and
spread(programs) >= 1 for launches that do not fill the chip:

    fused   max(e (A + Y) / BW,  (n (2K^2 + 1) U / LANES + 2 U COUT / DOT) spread)
    split   max(e (A + U) / BW,  (2K^2 + 1) U / LANES) + max(e (U + Y) / BW,  2 U COUT / DOT spread) + LAUNCH

``fused_tile`` and ``pw_tile`` choose the tiles by the same sums: where a map has few, smaller ones, whose programs
compute the depthwise half again, end sooner than a few long ones.

The static model of the compiled code (`make predict`) finds the fused form slower on an H200: a block of 8 warps fills
a multiprocessor's registers. It asks for the next step's taps before its product. The decoder takes 248 us so, 201 with
the norm folded into the taps, as on large maps and inside ``fastseg.frozen``, and 241 split. Neither is measured: the
stage `forms` of `make gpu` times both, and decides.

The GEMM's channels are not split between programs, with a second launch that adds their sums. At batch 1 the static
model gives the split form's GEMM 4.9 us for 960 -> 160 at 32x32 and 7.2 for 728 -> 728 on an H200, and with half of the
channels 3.9 and 4.6: what is saved is no more than the second launch takes, 2 us and the sums' traffic. 1536 -> 2048
has 512 programs without it. None of it is measured.

In training with batch statistics between the halves, fused pays one more pass over the input, for the statistics, in a
launch of its own. LAUNCH is what decides on small maps. The
2K^2 + 1 lane operations per element are one multiply-add and one conversion a tap (counted in the SASS), and the store.
"""

import functools
from typing import NamedTuple

import torch

from fastseg.kernels.runtime.ceilings import H200, Chip, spread
from fastseg.kernels.runtime.conv_sizes import Geometry
from fastseg.kernels.runtime.sizes import cdiv, next_power_of_2
from fastseg.kernels.runtime.verdict import Verdict, verdict

# How much faster split must be on maps too small to fill the chip by whole tiles: what a launch and few programs cost
# is an estimate, and one more launch is certain, where no graph is captured at several microseconds of the host.
SURE = 1.5


def fused_block_n(COUT: int, dtype: torch.dtype) -> int:
    """Output channels of one fused program: all of them where the accumulator still fits into registers."""
    return min(256 if dtype.itemsize == 2 else 128, max(16, next_power_of_2(COUT)))


class Tile(NamedTuple):
    """Rows (pixels) and output channels of one program."""

    H: int
    W: int
    N: int

    def programs(self, pixels: int, COUT: int) -> int:
        return cdiv(pixels, self.H * self.W) * cdiv(COUT, self.N)


def _arithmetic(tile: Tile, pixels: int, C: int, COUT: int, K: int, dtype: torch.dtype, chip: Chip) -> float:
    """Seconds of the fused kernel's arithmetic; fewer rows than wgmma takes go at half its rate."""
    U = pixels * C
    depthwise = cdiv(COUT, tile.N) * (2 * K * K + 1) * U / chip.lanes
    dot = 2 * U * COUT / chip.dot(dtype) * (1 if tile.H * tile.W >= 64 else 2)
    return (depthwise + dot) * spread(tile.programs(pixels, COUT), chip)


@functools.lru_cache(maxsize=4096)
def fused_tile(pixels: int, C: int, COUT: int, K: int, dtype: torch.dtype, chip: Chip = H200) -> Tile:
    """The tile of least arithmetic: 8x8 pixels with all output channels, unless their programs leave the chip idle.

    Two tiles, no more: pictures of another size compile what they have not met, which takes seconds. The small one
    takes half of the output channels, and at most 128. By the static model that is faster than a quarter of them:
    MobileNetV2's 960 -> 160 on 30x40 pixels takes 14 us in place of 17, and 960 -> 320 on 32x32 14 in place of 21.
    """
    widest = fused_block_n(COUT, dtype)
    tiles = [Tile(8, 8, widest), Tile(4, 4, min(widest, 128, max(32, widest // 2)))]
    return min(tiles, key=lambda tile: _arithmetic(tile, pixels, C, COUT, K, dtype, chip))


def pw_tile(pixels: int, COUT: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and output channels of one program of the pointwise half: large ones re-read less; 64 x 64 and 64 x 32 are
    taken until there is one for each multiprocessor of an H200. Three tiles, as above."""
    block_n = min(128, max(16, next_power_of_2(COUT)))
    large = (128, block_n) if dtype.itemsize == 2 else (64, min(64, block_n))
    tiles = dict.fromkeys((large, (64, min(64, block_n)), (64, min(32, block_n))))
    enough = (t for t in tiles if cdiv(pixels, t[0]) * cdiv(COUT, t[1]) >= H200.multiprocessors)
    return next(enough, (64, min(32, block_n)))


@functools.lru_cache(maxsize=4096)
def plan(g: Geometry, dtype: torch.dtype, *, mid_batch_stats: bool, chip: Chip = H200) -> Verdict:
    """The verdict on the fused form on these sizes, by the model in this file's header."""
    e = dtype.itemsize
    U, A, Y = g.pixels * g.C, g.N * g.H * g.W * g.C, g.pixels * g.COUT
    depthwise = (2 * g.K * g.K + 1) * U / chip.lanes
    block_m, block_n = pw_tile(g.pixels, g.COUT, dtype)
    programs = cdiv(g.pixels, block_m) * cdiv(g.COUT, block_n)
    dot = 2 * U * g.COUT / chip.dot(dtype) * spread(programs, chip)
    tile = fused_tile(g.pixels, g.C, g.COUT, g.K, dtype)
    fused = max(e * (A + Y) / chip.bandwidth, _arithmetic(tile, g.pixels, g.C, g.COUT, g.K, dtype, chip))
    split = max(e * (A + U) / chip.bandwidth, depthwise) + max(e * (U + Y) / chip.bandwidth, dot) + chip.launch
    if mid_batch_stats:
        fused += max(e * A / chip.bandwidth, depthwise) + chip.launch
    whole = Tile(8, 8, fused_block_n(g.COUT, dtype))
    small = spread(whole.programs(g.pixels, g.COUT), chip) > 1
    faster = fused <= split * (SURE if small else 1)
    return verdict(faster, "fused", fused, "split", split, "fused" if faster else "split", chip.described)
