"""Sizes of a bilinear upsampling, and how the heads' kernels divide it into programs.

A cell is the square between four low-resolution pixels; its outputs read the same four corners. A cell row is all
cells between two rows of low-resolution pixels; the one below the last row has no height but may have outputs.
"""

from typing import NamedTuple

from fastseg.kernels.runtime.sizes import next_power_of_2


class Axis(NamedTuple):
    """One axis of an upsampling: ``low`` elements in, ``full`` out, ``scale`` = input elements per output element."""

    low: int
    full: int
    scale: float

    @property
    def inverse(self) -> float:
        """Outputs per input element; where every output reads the first element, all outputs belong to its cell."""
        return 1.0 / self.scale if self.scale > 0 else float(self.full)

    @property
    def outputs(self) -> float:
        """Outputs of an inner cell, on average."""
        return min(self.inverse, float(self.full))


class Upsampling(NamedTuple):
    """Both axes, and which formula places the outputs."""

    y: Axis
    x: Axis
    align_corners: bool

    @property
    def pixels(self) -> int:
        return self.y.full * self.x.full

    @property
    def factor(self) -> int:
        """Outputs per low-resolution row, a whole number from 1 on: what configurations are chosen by."""
        return max(1, round(self.y.outputs))

    def arguments(self) -> tuple[int, int, int, int, float, float, float, float]:
        """What the kernels take: h, w, H, W, scale_h, scale_w, inverse_h, inverse_w."""
        y, x = self.y, self.x
        return y.low, x.low, y.full, x.full, float(y.scale), float(x.scale), float(y.inverse), float(x.inverse)


ROWS = 16  # of output that one program walks: enough to share what it knows of a cell row, few enough to fill a GPU


def row_splits(up: Upsampling) -> int:
    """Programs that share one cell row of output rows."""
    return max(1, int(up.y.outputs) // ROWS)


def row_block(factor: int) -> int:
    """Output rows of one tile: those of a cell row, up to 8 (the registers of a thread hold a tile's column)."""
    return min(8, next_power_of_2(factor))


class Loss(NamedTuple):
    """What a cross entropy counts: the ignored target, and the share of each target spread over all classes."""

    ignore_index: int
    label_smoothing: float
