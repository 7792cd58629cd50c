"""Where tiles lie, and how their results become one image: weights, sums, and what is held for later tiles.

Tiles run row by row. A pixel is written once, when the last tile on it is done. So three things are held: the tile, its
columns that the next tile shares, and its rows that the next row shares. The rows are as wide as a panel of at most
``PANEL`` tiles. A wider image is processed in panels one after the other, each of which repeats the last tile column of
the one before.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Blend = Literal["gaussian", "linear", "constant", "crop"]
BLENDS = ("gaussian", "linear", "constant", "crop")
PANEL = 16  # tile columns; one more is computed for each panel after the first, 6 %


class Axis(NamedTuple):
    """Tiles along one side of the image: each gives ``core`` pixels from its ``start``, a multiple of the phase."""

    extent: int  # of the image
    side: int  # of the tile
    margin: int
    phase: int
    step: int  # at most

    @property
    def core(self) -> int:
        return self.side - 2 * self.margin

    @property
    def count(self) -> int:
        return 1 + math.ceil(max(0, self.extent - self.core) / self.step)

    def start(self, i: int) -> int:
        """Steps are equal up to the phase, and the last tile ends less than a phase beyond the image."""
        return 0 if i == 0 else i * math.ceil((self.extent - self.core) / self.phase) // (self.count - 1) * self.phase

    def end(self, i: int) -> int:
        """The end of the pixels that no later tile reaches."""
        return self.start(i + 1) if i + 1 < self.count else self.extent

    def source(self, i: int) -> tuple[int, int]:
        """The first pixel of the image that tile ``i`` reads, below 0 before the image, and one past the last."""
        return self.start(i) - self.margin, self.start(i) - self.margin + self.side

    def weights(self, i: int, blend: Blend) -> Tensor:
        """Weights (core,), fp64, of the pixels of tile ``i``; the weights of all tiles on a pixel sum to one."""
        pixels = torch.arange(self.core, dtype=torch.float64, device="cpu")
        if blend == "crop":
            low = 0 if i == 0 else (self.start(i - 1) + self.core - self.start(i)) // 2
            step = self.end(i) - self.start(i)
            high = self.core if i + 1 == self.count else step + (self.core - step) // 2
            return ((pixels >= low) & (pixels < high)).double()
        centre, deviation = (self.core - 1) / 2, self.core / 8
        if blend == "gaussian":
            profile = torch.exp(-(((pixels - centre) / deviation) ** 2) / 2)
        elif blend == "linear":  # one at the border: where two tiles overlap, one weight falls as the other rises
            profile = torch.minimum(pixels + 1, self.core - pixels)
        else:
            profile = torch.ones_like(pixels)
        total = profile.clone()
        for neighbours in (range(i - 1, -1, -1), range(i + 1, self.count)):
            for k in neighbours:
                shift = self.start(k) - self.start(i)
                if abs(shift) >= self.core:
                    break
                low, high = max(0, shift), min(self.core, self.core + shift)
                total[low:high] += profile[low - shift : high - shift]
        return profile / total


class Job(NamedTuple):
    """Tile (i, j) of image n, in the panel of columns from ``first`` on; columns from ``begin`` on are shared only."""

    n: int
    i: int
    j: int
    begin: int
    first: int


def jobs(images: int, rows: Axis, columns: Axis, blended: bool) -> Iterator[Job]:
    """All tiles in the order in which ``Stitcher.add`` takes them."""
    panel = PANEL if blended else columns.count
    for n, first in itertools.product(range(images), range(0, columns.count, panel)):
        begin = first
        while begin > 0 and columns.start(begin - 1) + columns.core > columns.start(first):
            begin -= 1
        for i, j in itertools.product(range(rows.count), range(begin, min(first + panel, columns.count))):
            yield Job(n, i, j, begin, first)


class Stitcher:
    """Sum weighted tiles, and write pixels that no later tile will touch.

    Tile (i, j) owns the pixels from its own start to that of the next tile. Columns beyond are kept in ``left`` for the
    next tile. Of the columns that it owns, rows beyond are kept in ``above`` for the next row.
    """

    def __init__(self, rows: Axis, columns: Axis, blend: Blend | None, argmax: bool, out: Tensor | np.ndarray):
        self.rows, self.columns, self.blend, self.argmax, self.out = rows, columns, blend, argmax, out
        self.shared = max((rows.core - (rows.end(i) - rows.start(i)) for i in range(rows.count - 1)), default=0)
        self.left = self.above = torch.empty(0, device="cpu")

    def add(self, job: Job, logits: Tensor) -> None:
        """``logits``: (K, core of the rows, core of the columns)."""
        top, left = self.rows.start(job.i), self.columns.start(job.j)
        height, width = self.rows.end(job.i) - top, self.columns.end(job.j) - left
        if self.blend is None:
            self._write(job.n, top, left, logits[:, :height, :width])
            return
        sums = logits.to(torch.promote_types(logits.dtype, torch.float32))
        down, across = self.rows.weights(job.i, self.blend), self.columns.weights(job.j, self.blend)
        sums = sums * down.to(sums)[:, None] * across.to(sums)
        if job.j > job.begin:
            sums[..., : self.left.shape[-1]] += self.left
        self.left = sums[..., width:].clone()
        if job.j < job.first:
            return
        sums = sums[..., :width]
        begin = self.columns.start(job.first)
        if job.i == 0 and job.j == job.first:
            last = min(job.first + PANEL, self.columns.count) - 1
            self.above = sums.new_zeros(len(sums), self.shared, self.columns.end(last) - begin)
        above = self.above[..., left - begin : left - begin + width]
        sums[:, : self.shared] += above
        self._write(job.n, top, left, sums[:, :height])
        if job.i + 1 < self.rows.count:
            beyond = self.rows.core - height
            above[:, :beyond] = sums[:, height:]
            above[:, beyond:] = 0

    def _write(self, n: int, top: int, left: int, block: Tensor) -> None:
        block = block.argmax(0) if self.argmax else block
        if isinstance(self.out, np.ndarray):
            block = (block.float() if block.dtype == torch.bfloat16 else block).cpu().numpy()
        self.out[n, ..., top : top + block.shape[-2], left : left + block.shape[-1]] = block
