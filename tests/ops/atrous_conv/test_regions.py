"""The planner of the atrous convolution against brute force: which taps, which pixels, how much work, what order."""

import itertools
import math
from fractions import Fraction

import pytest

from benchmarks.roofline.useful_macs import aspp_fraction, region_fraction
from fastseg.kernels.atrous_conv.cost import plan
from fastseg.kernels.atrous_conv.regions import (
    Branch,
    Region,
    by_pixels,
    dense,
    distance,
    executed,
    executed_fraction,
    forward_regions,
    input_regions,
    valid,
    work_items,
)

torch = pytest.importorskip("torch")

ASPP = lambda *rates: (Branch(1, 1), *(Branch(3, rate) for rate in rates))
# H, W, branches: an ASPP; odd map; rates at half the map, at the map and past it; cuts that coincide; 5x5; one pixel.
GEOMETRIES = [
    (8, 8, ASPP(2, 3, 5)),
    (9, 7, ASPP(1, 4, 6)),
    (6, 8, ASPP(3, 4)),
    (5, 4, ASPP(5, 9)),
    (7, 11, (Branch(3, 2),)),
    (7, 6, (Branch(5, 2), Branch(3, 4))),
    (1, 1, ASPP(6)),
    (4, 1, (Branch(3, 1), Branch(3, 3))),
]


def valid_taps(y: int, x: int, H: int, W: int, branch: Branch, sign: int) -> set[tuple[int, int]]:
    """Brute force: the taps of an output pixel (sign 1), or of an input pixel's gradient (-1), that lie in the map."""
    reads = lambda p, tap: p + sign * distance(branch, tap)
    inside = lambda ky, kx: 0 <= reads(y, ky) < H and 0 <= reads(x, kx) < W
    return {(ky, kx) for ky, kx in itertools.product(range(branch.K), repeat=2) if inside(ky, kx)}


def taps_of(region: Region, i: int) -> set[tuple[int, int]]:
    taps = region.taps[i]
    rows, columns = range(taps.ky, taps.ky + taps.ny), range(taps.kx, taps.kx + taps.nx)
    return set(itertools.product(rows, columns))


@pytest.mark.parametrize("H, W, branches", GEOMETRIES, ids=str)
@pytest.mark.parametrize("mirrored", [False, True], ids=["forward", "input"])
def test_rectangles_hold_exactly_the_taps_that_meet_the_map(H, W, branches, mirrored):
    regions = (input_regions if mirrored else forward_regions)(H, W, branches)
    seen = set()
    for region in regions:
        assert region.h > 0 and region.w > 0
        for y, x in itertools.product(range(region.y, region.y + region.h), range(region.x, region.x + region.w)):
            for i in range(len(region.taps)):
                b = region.first + i
                assert (b, y, x) not in seen
                seen.add((b, y, x))
                assert taps_of(region, i) == valid_taps(y, x, H, W, branches[b], -1 if mirrored else 1)
    assert seen == set(itertools.product(range(len(branches)), range(H), range(W)))


def test_number_of_rectangles():
    assert len(forward_regions(32, 32, (Branch(3, 6),))) == 9
    assert len(forward_regions(32, 32, (Branch(3, 40),))) == 1  # a rate past the map: the centre alone
    assert len(forward_regions(32, 32, (Branch(3, 16),))) == 4  # both cuts fall together
    assert len(forward_regions(32, 32, ASPP(6, 12, 18))) == 1 + 9 * 3
    assert len(input_regions(32, 32, ASPP(6, 12, 18))) == 49


@pytest.mark.parametrize("H, W, branches", GEOMETRIES, ids=str)
@pytest.mark.parametrize("N, block_m", [(1, 1), (3, 1), (2, 16)])
def test_work_is_what_brute_force_counts(H, W, branches, N, block_m):
    pixels = list(itertools.product(range(H), range(W)))
    exact = N * sum(len(valid_taps(y, x, H, W, branch, 1)) for y, x in pixels for branch in branches)
    groups: dict[tuple, int] = {}  # pixels of a branch with the same taps: rectangles, for a 3x3
    for b, branch in enumerate(branches):
        for y, x in pixels:
            key = b, frozenset(valid_taps(y, x, H, W, branch, 1))
            groups[key] = groups.get(key, 0) + 1
    tiled = sum(len(taps) * -(-N * count // block_m) * block_m for (_, taps), count in groups.items())
    done = executed(forward_regions(H, W, branches), N, block_m)
    assert done == tiled if block_m > 1 and all(b.K < 5 for b in branches) else done >= exact
    if block_m == 1:
        assert done == exact == executed(input_regions(H, W, branches), N, 1)
    assert executed_fraction(H, W, branches, N, block_m) == Fraction(done, dense(H, W, branches, N))


@pytest.mark.parametrize("H, W, rates", [(32, 32, (6, 12, 18)), (64, 64, (12, 24, 36))])
def test_the_share_of_an_aspp(H, W, rates):
    """Two fifths of an ASPP's products are with padding; ragged tiles give little of that back."""
    share = executed_fraction(H, W, ASPP(*rates), 16, 128)
    assert aspp_fraction(H, W, rates) <= share <= Fraction(62, 100)
    assert share == region_fraction(H, W, rates, 16, 128)  # the benchmarks' figure is the planner's
    backward = Fraction(executed(input_regions(H, W, ASPP(*rates)), 16, 128), dense(H, W, ASPP(*rates), 16))
    assert share <= backward <= Fraction(68, 100)


def test_items_cover_every_row_long_ones_first():
    regions = forward_regions(9, 7, ASPP(2, 4))
    items = work_items(regions, 5, 16)
    for index, region in enumerate(regions):
        assert sorted(row for i, row in items if i == index) == list(range(0, 5 * region.h * region.w, 16))
    counts = [regions[i].count for i, _ in items]
    assert counts == sorted(counts, reverse=True)  # the last to begin are the shortest
    for count in set(counts):  # among equals: image by image
        images = [row // (regions[i].h * regions[i].w) for i, row in items if regions[i].count == count]
        assert images == sorted(images)


def test_taps_of_large_rectangles_come_first():
    """The 1x1 and the three centres, then edges and corners by their distance: 14 x 14 pixels at rate 18 are last."""
    branches = ASPP(6, 12, 18)
    order = by_pixels(branches)
    away = [(b, ky, kx) for b, branch in enumerate(branches) for ky in range(branch.K) for kx in range(branch.K)]
    size = lambda tap: math.prod(valid(branches[away[tap][0]], axis, 32)[1] for axis in away[tap][1:])
    assert sorted(order) == list(range(28)) and order[0] == 0
    sizes = [size(tap) for tap in order]
    assert sizes == sorted(sizes, reverse=True) and sizes[3] == 32 * 32 and sizes[-1] == 14 * 14


def test_the_cost_model_decides():
    """Rates that leave much padding pay; an undilated convolution stays with the library, whatever its size."""
    bf16 = torch.bfloat16
    for C, N in ((320, 1), (320, 16), (2048, 16)):
        assert plan(N, C, 32, 32, 256, ASPP(6, 12, 18), bf16, 1).pays, (C, N)
    assert plan(16, 2048, 64, 64, 256, ASPP(12, 24, 36), bf16, 1).pays
    assert plan(16, 2048, 64, 64, 256, ASPP(12, 24, 36), torch.float32, 1).pays
    assert not plan(16, 2048, 64, 64, 256, ASPP(12, 24, 36), torch.float32, 1, ieee=True).pays
    assert not plan(
        1, 2048, 32, 32, 256, ASPP(6, 12, 18), bf16, 1
    ).pays  # fewer programs than multiprocessors, and long
    assert not plan(16, 256, 64, 64, 256, (Branch(3, 1),), bf16, 0).pays
    assert not plan(16, 64, 9, 9, 64, (Branch(1, 1), Branch(3, 1)), bf16, 1).pays
    small_rate = plan(16, 512, 128, 128, 512, (Branch(3, 2),), bf16, 0)  # 0.98 of the products at 0.85 of the rate
    assert not small_rate.pays
    assert str(small_rate).startswith(
        "the library's dense convolution: 0.98 of the products are executed: model says own "
    )
