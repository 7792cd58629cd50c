"""The atrous convolution's work items and rectangles, written by a kernel in front of it, at each call.

What ``regions`` computes in Python, for K of 1 and 3. Kept tensors would outlive the call: CUDA graphs of
``torch.compile`` refuse them, a capture cannot copy them from the host, and each size would hold memory for good. The
programs of the convolution differ in length, and the longest must begin first; that order is why they read a table.

Every branch has three pieces an axis in the forward, all branches together 2 B + 1 in the gradient at the input; where
cuts fall together or outside the map, pieces are empty, and have no items.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.atrous_conv.regions import REGION, TAPS, Branch, forward_regions, input_regions
from fastseg.kernels.common.tiles import clamp_index
from fastseg.kernels.runtime.ceilings import chip_of
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv, next_power_of_2

FAR = 2**30  # pixels; past every map


@triton.jit
def chosen(i, VALUES: tl.constexpr, BRANCHES: tl.constexpr):
    """``VALUES[i]``, for i of any shape."""
    value = i * 0 + VALUES[0]
    for j in tl.static_range(1, BRANCHES):
        value = tl.where(i == j, VALUES[j], value)
    return value


@triton.jit
def _pieces(
    q, branch, size, KERNELS: tl.constexpr, DILATIONS: tl.constexpr, BRANCHES: tl.constexpr, BLOCK_J: tl.constexpr,
    MERGED: tl.constexpr,
):  # fmt: skip
    """Start and length of pieces number ``q`` of an axis: of each branch, or of all branches together."""
    if MERGED:  # start and stop are the cuts in order
        j = tl.arange(0, BLOCK_J)
        away = chosen(j // 2, DILATIONS, BRANCHES)
        is_cut = (j < 2 * BRANCHES) & (chosen(j // 2, KERNELS, BRANCHES) > 1) & (away < size)
        cut = tl.where(is_cut, tl.where(j % 2 == 0, away, size - away), 0)
        same, number = cut[None, :] == cut[:, None], j[None, :] < j[:, None]
        rank = tl.sum(((cut[None, :] < cut[:, None]) | (same & number)).to(tl.int32), 1)
        rank = clamp_index(rank, BLOCK_J) - (BLOCK_J - 2 * BRANCHES)  # the zeros that fill the block come first
        start = tl.sum(tl.where(rank[None, :] + 1 == q[:, None], cut[None, :], 0), 1)
        stop = tl.sum(tl.where(rank[None, :] == q[:, None], cut[None, :], 0), 1)
        stop = tl.where(q == 2 * BRANCHES, size, stop)
    else:
        away = chosen(branch, DILATIONS, BRANCHES)
        away = tl.where((chosen(branch, KERNELS, BRANCHES) > 1) & (away < size), away, 0)
        first = tl.minimum(away, size - away)
        second = tl.where(away > 0, size - first, 0)
        start = tl.where(q == 0, 0, tl.where(q == 1, first, second))
        stop = tl.where(q == 0, first, tl.where(q == 1, second, size))
    start = clamp_index(start, size)  # the clamps change nothing: they are bounds that the check of offsets can follow
    return start, clamp_index(clamp_index(stop, size) - start, size)


@triton.jit
def _valid(start, size, K, dilation, MIRRORED: tl.constexpr):
    """First valid tap of an axis and their number, for the positions of a piece."""
    low, high = (start >= dilation).to(tl.int32), (start + dilation < size).to(tl.int32)
    first, count = 1 - (high if MIRRORED else low), 1 + low + high
    return tl.where(K > 1, first, 0), tl.where(K > 1, count, 1)


@triton.jit(do_not_specialize=["N", "H", "W", "total", "ROWS", "together"])
def _atrous_conv_tables_kernel(
    items_ptr, regions_ptr,
    N, H, W, total, ROWS, together,
    KERNELS: tl.constexpr, DILATIONS: tl.constexpr, BRANCHES: tl.constexpr, MIRRORED: tl.constexpr,
    REGION: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr, REGIONS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_T of the items, the first one all rectangles too. ROWS: of a tile of the convolution.
    ``together``: images of a group."""
    PIECES: tl.constexpr = 2 * BRANCHES + 1 if MIRRORED else 3
    LISTED: tl.constexpr = BRANCHES if MIRRORED else 1
    i = tl.arange(0, BLOCK_R)
    group = i // (PIECES * PIECES)
    y, h = _pieces(i // PIECES % PIECES, group, H, KERNELS, DILATIONS, BRANCHES, BLOCK_J, MIRRORED)
    x, w = _pieces(i % PIECES, group, W, KERNELS, DILATIONS, BRANCHES, BLOCK_J, MIRRORED)
    pixels = tl.where(i < REGIONS, h * w, 0)
    count = i * 0  # of taps
    for j in tl.static_range(LISTED):
        b = i * 0 + j if MIRRORED else group
        K, dilation = chosen(b, KERNELS, BRANCHES), chosen(b, DILATIONS, BRANCHES)
        ky, ny = _valid(y, H, K, dilation, MIRRORED)
        kx, nx = _valid(x, W, K, dilation, MIRRORED)
        count += ny * nx
        if tl.program_id(0) == 0:
            step = -dilation if MIRRORED else dilation
            taps_ptr = regions_ptr + i * WIDTH + REGION + j * TAPS
            tl.store(taps_ptr, ((ky - K // 2) * W + (kx - K // 2)) * step, mask=i < REGIONS)
            tl.store(taps_ptr + 1, step * W, mask=i < REGIONS)
            tl.store(taps_ptr + 2, step, mask=i < REGIONS)
            tl.store(taps_ptr + 3, ny, mask=i < REGIONS)
            tl.store(taps_ptr + 4, nx, mask=i < REGIONS)
            tl.store(taps_ptr + 5, ky * K + kx, mask=i < REGIONS)
            tl.store(taps_ptr + 6, K, mask=i < REGIONS)
            tl.store(taps_ptr + 7, b if MIRRORED else b * 0, mask=i < REGIONS)
    if tl.program_id(0) == 0:
        row_ptr = regions_ptr + i * WIDTH
        tl.store(row_ptr, y, mask=i < REGIONS)
        tl.store(row_ptr + 1, x, mask=i < REGIONS)
        tl.store(row_ptr + 2, h - 1, mask=i < REGIONS)
        tl.store(row_ptr + 3, w - 1, mask=i < REGIONS)
        tl.store(row_ptr + 4, i * 0 if MIRRORED else group, mask=i < REGIONS)
        tl.store(row_ptr + 5, i * 0 + LISTED, mask=i < REGIONS)

    # Tiles, rectangle by rectangle: whose each is.
    tiles = tl.cdiv(N * pixels, ROWS)
    # The same again, where two branches made Triton 3.7 use the pixels in another layout before they were in it
    # (TritonGPURemoveLayoutConversions: "operand does not dominate this use").
    pixels = tl.where(tiles > 0, h * w, 0)
    ends = tl.cumsum(tiles, 0)
    tile = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    region = clamp_index(tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), 1), REGIONS)  # (BLOCK_T,)
    is_own = region[:, None] == i[None, :]
    own = tl.sum(tl.where(is_own, pixels[None, :], 0), 1)
    own = clamp_index(tl.where(own > 0, own, 1), H * W)
    taps = tl.sum(tl.where(is_own, count[None, :], 0), 1)
    before = clamp_index(tl.sum(tl.where(is_own, (clamp_index(ends, total) - tiles)[None, :], 0), 1), total)
    tile = clamp_index(tile - before, tl.cdiv(N * (H * W), ROWS))  # its number within its rectangle

    # Before it come all tiles of earlier groups of images; in its group those of more taps; of as many taps those of
    # earlier images, and in its image those of earlier rectangles.
    image = clamp_index(tile * ROWS // own, N - 1)
    first = image // together * together
    before_group = tl.cdiv(first[:, None] * pixels[None, :], ROWS)
    in_group = tl.cdiv(tl.minimum(first + together, N)[:, None] * pixels[None, :], ROWS) - before_group
    begun = tl.cdiv(image[:, None] * pixels[None, :], ROWS)
    here = tl.cdiv((image + 1)[:, None] * pixels[None, :], ROWS) - begun
    equals = begun - before_group + tl.where(i[None, :] < region[:, None], here, 0)
    equals = tl.where(count[None, :] == taps[:, None], equals, 0)
    place = tl.sum(before_group + tl.where(count[None, :] > taps[:, None], in_group, equals), 1)
    place = clamp_index(place, total) + tile - tl.cdiv(image * own, ROWS)
    mask = region < REGIONS
    item_ptr = items_ptr + 2 * clamp_index(place, total - 1)
    tl.store(item_ptr, region, mask=mask)
    tl.store(item_ptr + 1, tile * ROWS, mask=mask)


def images_together(x: Tensor) -> int:
    """Images of x that a quarter of the L2 holds: as much again is for weights and results, and half is not counted.

    Programs take them one group after the other. Of an ASPP of 2048 channels at 16 x 32 x 32, all images at once read
    327 MB of x and weights from an H200's DRAM in place of 96: `tests/kernels/test_order_of_work_atrous.py`.
    """
    return max(1, chip_of(x.device).l2_bytes // 4 // max(1, x[0].numel() * x.element_size()))


def tables(
    x: Tensor, branches: tuple[Branch, ...], block_m: int, *, mirrored: bool, together: int = 0
) -> tuple[Tensor, Tensor]:
    """Work items (items, 2) and rectangles (regions, WIDTH) for x (N, C, H, W), in memory of this call.

    ``mirrored``: of the gradient at the input; ``together``: images of a group, 0: ``images_together``.
    """
    N, _, H, W = x.shape
    together = min(together or images_together(x), N)
    items, grid, shape, options = _sizes(H, W, branches, N, block_m, mirrored)
    table = x.new_empty(items, 2, dtype=torch.int32), x.new_empty(shape, dtype=torch.int32)
    launch(_atrous_conv_tables_kernel, grid, *table, N, H, W, items, block_m, together, **options)
    return table


@functools.lru_cache(maxsize=4096)
def _sizes(
    H: int, W: int, branches: tuple[Branch, ...], N: int, block_m: int, mirrored: bool
) -> tuple[int, tuple[int], tuple[int, int], dict]:
    """Items, the grid, the shape of the rectangles' table, and the options of the launch."""
    B, items = len(branches), _items(H, W, branches, N, block_m, mirrored)
    regions, width = ((2 * B + 1) ** 2, REGION + B * TAPS) if mirrored else (9 * B, REGION + TAPS)
    sizes, dilations = _constants(branches)
    block_r = next_power_of_2(regions)
    block_t = max(2048 // block_r, 1)
    options = {
        "KERNELS": sizes, "DILATIONS": dilations, "BRANCHES": B, "MIRRORED": mirrored, "REGION": REGION, "TAPS": TAPS,
        "WIDTH": width, "REGIONS": regions, "BLOCK_R": block_r, "BLOCK_J": next_power_of_2(2 * B), "BLOCK_T": block_t,
        "num_warps": 8, "enable_fp_fusion": True,
    }  # fmt: skip
    return items, (cdiv(items, block_t),), (regions, width), options


@functools.lru_cache(maxsize=256)
def _constants(branches: tuple[Branch, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the kernel is compiled for: the size of each branch's kernel, and its dilation."""
    return tuple(b.K for b in branches), tuple(min(b.dilation, FAR) for b in branches)


def _items(H: int, W: int, branches: tuple[Branch, ...], N: int, block_m: int, mirrored: bool) -> int:
    regions = (input_regions if mirrored else forward_regions)(H, W, branches)
    return sum(cdiv(N * region.h * region.w, block_m) for region in regions)
