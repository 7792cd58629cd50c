"""DRAM bytes of an ASPP's atrous convolution at its real size, by the order of its programs and of their loop.

Nothing is run: a unit is one row of one image and a block of its channels, or the weights of a tap, a block of channels
and a block of outputs; programs take a step each in turn, as many at once as an H200 holds, through an LRU cache.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice

import pytest

from fastseg.kernels.atrous_conv.regions import Branch, by_pixels, distance, forward_regions, valid, work_items

BRANCHES = (Branch(1, 1), Branch(3, 6), Branch(3, 12), Branch(3, 18))
N, C, SIDE, COUT, BLOCK_M, BLOCK_N, BLOCK_K = 16, 2048, 32, 256, 128, 128, 64
RESIDENT, L2 = 264, 60 << 20
WEIGHT_ROWS, WEIGHT_K = 64, 128  # of a step of the weight gradient, and of its programs


def steps(item: tuple[int, int], block_n: int, regions, taps_fastest: bool) -> Iterator[list[tuple[tuple, int]]]:
    """What a program reads in each step of its loop: units and their bytes."""
    index, row = item
    region, pixels = regions[index], regions[index].h * regions[index].w
    taps, branch = region.taps[0], BRANCHES[region.first]
    rows = {(i // pixels, region.y + i % pixels // region.w) for i in range(row, min(row + BLOCK_M, N * pixels))}
    each = [(ky, kx) for ky in range(taps.ky, taps.ky + taps.ny) for kx in range(taps.kx, taps.kx + taps.nx)]
    blocks = range(C // BLOCK_K)
    order = [(k, tap) for k in blocks for tap in each] if taps_fastest else [(k, tap) for tap in each for k in blocks]
    for k, (ky, kx) in order:
        down = (ky - branch.K // 2) * branch.dilation
        yield [
            *[((n, y + down, k), 2 * SIDE * BLOCK_K) for n, y in rows],
            (("weights", region.first, ky, kx, block_n, k), 2 * BLOCK_N * BLOCK_K),
        ]


def through(cache: int, programs: Iterable[Iterator[list[tuple[tuple, int]]]]) -> tuple[int, int]:
    """Bytes from DRAM, and of distinct units."""
    waiting = iter(programs)
    held: OrderedDict[tuple, int] = OrderedDict()
    running, total, read, ever = [], 0, 0, {}
    while True:
        running += islice(waiting, RESIDENT - len(running))
        if not running:
            return read, sum(ever.values())
        for program in list(running):
            units = next(program, None)
            if units is None:
                running.remove(program)
                continue
            for unit, size in units:
                if unit in held:
                    held.move_to_end(unit)
                    continue
                held[unit] = ever[unit] = size
                read, total = read + size, total + size
                while total > cache:
                    total -= held.popitem(last=False)[1]


def bytes_read(together: int | None, taps_fastest: bool, cache: int) -> tuple[int, int]:
    """Of the forward."""
    regions = forward_regions(SIDE, SIDE, BRANCHES)
    items = [(item, n) for item in work_items(regions, N, BLOCK_M, together) for n in range(COUT // BLOCK_N)]
    return through(cache, (steps(*program, regions, taps_fastest) for program in items))


@pytest.mark.long
@pytest.mark.parametrize(("together", "taps_fastest"), [(None, False), (None, True)])
def test_other_orders_read_more(together, taps_fastest):
    read, once = bytes_read(together, taps_fastest, L2)
    assert read > 2 * once


def test_x_and_weights_are_read_about_once():
    """An L2 of 60 MB holds a group of three images of 4 MB, 29 MB of weights, and what passes by."""
    together = L2 // 4 // (2 * C * SIDE**2)  # as `tables.images_together` has it
    read, once = bytes_read(together, True, L2)
    assert once == 2 * C * (N * SIDE**2 + COUT * 28) and read <= 1.2 * once


def weight_steps(branch: int, ky: int, kx: int, n: int, k: int) -> Iterator[list[tuple[tuple, int]]]:
    """What a program of the weight gradient reads in each step: rows of dy, and of x a tap away."""
    down, (y, h), (_, w) = distance(BRANCHES[branch], ky), *(valid(BRANCHES[branch], tap, SIDE) for tap in (ky, kx))
    for begin in range(0, N * h * w, WEIGHT_ROWS):
        rows = range(begin // w, (min(begin + WEIGHT_ROWS, N * h * w) - 1) // w + 1)
        yield [
            unit
            for image, at in (divmod(row, h) for row in rows)
            for unit in (
                (("dy", branch, image, y + at, n), 2 * SIDE * BLOCK_N),
                (("x", image, y + at + down, k), 2 * SIDE * WEIGHT_K),
            )
        ]


def weight_bytes(order: Iterable[int], cache: int) -> tuple[int, int]:
    """Of the weight gradient with its taps in an order."""
    taps = [(b, ky, kx) for b, branch in enumerate(BRANCHES) for ky in range(branch.K) for kx in range(branch.K)]
    programs = ((k, tap, n) for k in range(C // WEIGHT_K) for tap in order for n in range(COUT // BLOCK_N))
    return through(cache, (weight_steps(*taps[tap], n, k) for k, tap, n in programs))


def test_a_weight_gradient_reads_its_maps_about_once():
    """With an L2 of 48 MB too: taps of large rectangles together, then those of small ones."""
    for cache, most in ((L2, 1.01), (48 << 20, 1.15)):
        read, once = weight_bytes(by_pixels(BRANCHES), cache)
        assert once == 2 * N * SIDE**2 * (C + 4 * COUT) and read <= most * once


@pytest.mark.long
def test_taps_in_their_own_order_part():
    read, once = weight_bytes(range(28), 48 << 20)
    assert read > 1.6 * once
