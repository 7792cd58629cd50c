"""What is settled before the first tile: the plan of a model's tiles, what lies beyond the image, where results go."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastseg.inference.tile_probe import TileGeometry, tile_geometry

PadMode = Literal["reflect", "replicate", "constant"]
PAD_MODES = ("reflect", "replicate", "constant")


@dataclass(frozen=True)
class TilePlan:
    """What ``overlap_tile`` knows of a model before it sees an image, and the overlap of the tiles in pixels."""

    geometry: TileGeometry
    overlap: int

    @property
    def step(self) -> int:
        """The largest distance between neighbouring tiles, in pixels."""
        geometry = self.geometry
        return (geometry.tile - 2 * geometry.margin - self.overlap) // geometry.phase * geometry.phase


def plan_tiles(
    model: nn.Module, tile: int, overlap: int | None = None, channels: int = 3, *, dims: int = 2
) -> TilePlan:
    """Check model, tile and overlap without an image, once for several images. Arguments as ``overlap_tile``.

    ``dims`` is 3 for volumes.
    """
    if model.training:
        raise ValueError("overlap_tile: the model is in training mode, where tiles differ at random; call model.eval()")
    for name, value, least in (("tile", tile, 1), ("overlap", overlap or 0, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"overlap_tile: {name} is {value!r}; give pixels, an integer of at least {least}")
    geometry = tile_geometry(model, tile, channels, dims)
    room = tile - 2 * geometry.margin - geometry.phase
    if overlap is None:
        overlap = 0 if geometry.margin else min(tile // 4, room)
    if overlap > room:
        raise ValueError(
            f"overlap_tile: overlap is {overlap}; tiles of {tile} pixels with margin {geometry.margin} and phase "
            f"{geometry.phase} overlap by at most {room}"
        )
    return TilePlan(geometry, overlap)


def output_for(
    image: Tensor | np.ndarray, classes: int, dtype: torch.dtype, argmax: bool, out: Tensor | np.ndarray | None
) -> Tensor | np.ndarray:
    """``out``, checked, or a new one."""
    n, _, *sides = image.shape
    shape = (n, *sides) if argmax else (n, classes, *sides)
    if out is None:
        dtype = (torch.uint8 if classes <= 256 else torch.int64) if argmax else dtype
        if isinstance(image, Tensor):
            return torch.empty(shape, dtype=dtype, device=image.device)
        return torch.empty(shape, dtype=torch.float32 if dtype == torch.bfloat16 else dtype, device="cpu").numpy()
    if not isinstance(out, (Tensor, np.ndarray)):
        raise TypeError(f"overlap_tile: out is a {type(out).__name__}; give a tensor or an array")
    if tuple(out.shape) != shape:
        raise ValueError(f"overlap_tile: out is {tuple(out.shape)}; the result is {shape}")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError('overlap_tile: out is read-only; map a file with mode "r+" or "w+"')
    kind = out.new_empty(0) if isinstance(out, Tensor) else torch.from_numpy(np.empty(0, out.dtype))
    real = kind.is_floating_point()
    if real == argmax or kind.is_complex() or (argmax and torch.iinfo(kind.dtype).max < classes - 1):
        wanted = f"integers up to {classes - 1}" if argmax else "floating point"
        raise ValueError(f"overlap_tile: out is of {out.dtype}; the result is of {wanted}")
    return out


def mirrored(begin: int, end: int, extent: int, pad_mode: PadMode) -> tuple[int, int, Tensor]:
    """The pixels, of ``extent``, that stand at ``begin`` to ``end``: their range, and indices into that range."""
    index = torch.arange(begin, end, device="cpu")
    if pad_mode == "reflect":  # ... 2 1 0 1 2 ... n-2 n-1 n-2 ...: repeats after 2 (n - 1)
        period = max(1, 2 * (extent - 1))
        index = index % period
        index = torch.minimum(index, period - index) if extent > 1 else index
    else:
        index = index.clamp(0, extent - 1)
    low = int(index.min())
    return low, int(index.max()) + 1, index - low
