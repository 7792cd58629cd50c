"""Volumes of any size, in cubes: the overlap-tile strategy of ``tiling.py`` along three axes.

Tiles run slab by slab along the depth. The logits of one slab of tiles are held, summed in fp32 with their weights;
its slices that no later tile reaches are written, and the others begin the next slab.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fastseg.inference.stitching import Axis, Blend
from fastseg.inference.tile_plan import PadMode, TilePlan, mirrored, output_for
from fastseg.inference.tile_probe import placement
from fastseg.io.progress import progress as progress_bar


def run_volume_tiles(
    model: nn.Module,
    volume: Tensor | np.ndarray,
    plan: TilePlan,
    *,
    batch_size: int,
    pad_mode: PadMode,
    progress: bool,
    blend: Blend,
    argmax: bool,
    out: Tensor | np.ndarray | None,
) -> Tensor | np.ndarray:
    """``overlap_tile`` of volumes (N, C, D, H, W), with arguments that were checked."""
    device, dtype = placement(model)
    out = output_for(volume, plan.geometry.num_classes, dtype, argmax, out)
    axes = volume_axes(plan, tuple(volume.shape[2:]))
    weights = _weights(axes, blend) if plan.overlap else None
    held = _Slab(axes, weights, argmax, out)
    order = list(_jobs(volume.shape[0], axes, batch_size))
    for n, places in progress_bar(order, "tiles", unit="batch", leave=False) if progress else order:
        tiles = [_cut(volume, n, [axis.source(i) for axis, i in zip(axes, place, strict=True)], pad_mode)
                 for place in places]  # fmt: skip
        logits = model(torch.stack(tiles).to(device, dtype))
        for place, tile in zip(places, logits, strict=True):
            held.add(n, place, tile)
    return out


def volume_axes(plan: TilePlan, extents: tuple[int, ...]) -> list[Axis]:
    """The tiles along each axis. A side shorter than a tile's output gets a smaller tile, if the model takes it."""
    geometry = plan.geometry
    tile, margin, phase = geometry.tile, geometry.margin, geometry.phase

    def fits(sides: tuple[int, ...]) -> bool:
        return geometry.probe.output(*sides) == tuple(side - 2 * margin for side in sides)

    def shortest(extent: int) -> int:
        sides = range(extent + 2 * margin, min(tile, extent + 2 * margin + phase))
        return next((side for side in sides if fits((side, tile, tile))), tile)

    sides = tuple(map(shortest, extents))
    sides = sides if fits(sides) else (tile,) * len(extents)
    return [Axis(extent, side, margin, phase, plan.step) for extent, side in zip(extents, sides, strict=True)]


def _jobs(volumes: int, axes: list[Axis], batch_size: int) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
    """Batches of tiles (i, j, k) of one slab of one volume, in order."""
    depth, rows, columns = axes
    for n, i in itertools.product(range(volumes), range(depth.count)):
        places: list[tuple[int, ...]] = [
            (i, j, k) for j, k in itertools.product(range(rows.count), range(columns.count))
        ]
        for begin in range(0, len(places), batch_size):
            yield n, places[begin : begin + batch_size]


def _weights(axes: list[Axis], blend: Blend) -> list[list[Tensor]]:
    """Of each tile along each axis."""
    return [[axis.weights(i, blend) for i in range(axis.count)] for axis in axes]


class _Slab:
    """The sums of a slab of tiles; without weights each tile is written as it comes."""

    def __init__(
        self, axes: list[Axis], weights: list[list[Tensor]] | None, argmax: bool, out: Tensor | np.ndarray
    ) -> None:
        self.axes, self.weights, self.argmax, self.out = axes, weights, argmax, out
        self.sums: Tensor | None = None

    def add(self, n: int, place: tuple[int, ...], logits: Tensor) -> None:
        """``logits``: (K, core of each axis)."""
        starts = [axis.start(i) for axis, i in zip(self.axes, place, strict=True)]
        if self.weights is None:
            sizes = [axis.end(i) - start for axis, i, start in zip(self.axes, place, starts, strict=True)]
            self._write(n, starts, logits[:, : sizes[0], : sizes[1], : sizes[2]])
            return
        depth, rows, columns = self.axes
        if self.sums is None:
            kind = torch.promote_types(logits.dtype, torch.float32)
            shape = (len(logits), depth.core, rows.extent, columns.extent)
            self.sums = torch.zeros(shape, dtype=kind, device=logits.device)
        sums = self.sums
        down, across, along = (axis[i].to(sums) for axis, i in zip(self.weights, place, strict=True))
        part = logits.to(sums.dtype) * (down[:, None, None] * across[:, None] * along)
        high, wide = min(rows.core, rows.extent - starts[1]), min(columns.core, columns.extent - starts[2])
        sums[:, :, starts[1] : starts[1] + high, starts[2] : starts[2] + wide] += part[:, :, :high, :wide]
        if place[1:] == (rows.count - 1, columns.count - 1):
            self._finish(n, place[0], sums)

    def _finish(self, n: int, i: int, sums: Tensor) -> None:
        """Write the slices that no later tile reaches; the others begin the next slab."""
        depth = self.axes[0]
        done = depth.end(i) - depth.start(i)
        for z in range(done):
            self._write(n, [depth.start(i) + z, 0, 0], sums[:, z : z + 1])
        left = depth.core - done if i + 1 < depth.count else 0
        sums[:, :left] = sums[:, done : done + left].clone()
        sums[:, left:] = 0

    def _write(self, n: int, starts: list[int], block: Tensor) -> None:
        block = block.argmax(0) if self.argmax else block
        (z, y, x), (d, h, w) = starts, block.shape[-3:]
        place = (n, ..., slice(z, z + d), slice(y, y + h), slice(x, x + w))
        if isinstance(self.out, np.ndarray):
            self.out[place] = (block.float() if block.dtype == torch.bfloat16 else block).cpu().numpy()
        else:
            self.out[place] = block


def _cut(volume: Tensor | np.ndarray, n: int, spans: list[tuple[int, int]], pad_mode: PadMode) -> Tensor:
    """Copy (C, d, h, w) from volume ``n``; voxels beyond it as ``pad_mode`` says."""
    extents = volume.shape[2:]
    found = [mirrored(*span, extent, pad_mode) for span, extent in zip(spans, extents, strict=True)]
    (z0, z1, _), (y0, y1, _), (x0, x1, _) = found
    tile = volume[n, :, z0:z1, y0:y1, x0:x1]
    if isinstance(tile, np.ndarray):
        tile = torch.from_numpy(tile.astype(tile.dtype.newbyteorder("=")))  # a copy: it may be read-only
    for dim, ((begin, end), extent, (_, _, index)) in enumerate(zip(spans, extents, found, strict=True), 1):
        if begin >= 0 and end <= extent:
            continue
        tile = tile.index_select(dim, index.to(tile.device))
        if pad_mode == "constant":
            place = torch.arange(begin, end, device=tile.device)
            outside = ((place < 0) | (place >= extent)).view(-1, *[1] * (3 - dim))
            tile = tile.masked_fill(outside, 0)
    return tile
