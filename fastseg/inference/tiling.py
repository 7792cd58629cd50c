"""Images of any size, in tiles: U-Net's overlap-tile strategy, and blended tiles for nets that pad.

A net without padding returns the centre of a tile. Tiles are cut from the mirrored image so that their outputs abut, at
multiples of the net's phase, where every pooling window lies as in the whole image: the result equals that of the whole
image. A net that pads sees zeros around every tile. Its tiles overlap and are blended by weights that sum to one in
each pixel (``stitching.py``).
"""

import itertools

import numpy as np
import torch
from torch import Tensor, nn

from fastseg.inference.stitching import BLENDS, Axis, Blend, Stitcher, jobs
from fastseg.inference.tile_plan import PAD_MODES, PadMode, TilePlan, mirrored, output_for, plan_tiles
from fastseg.inference.tile_probe import placement
from fastseg.inference.volume_tiling import run_volume_tiles
from fastseg.io.progress import progress as progress_bar


def overlap_tile(
    model: nn.Module,
    image: Tensor | np.ndarray,
    *,
    tile: int,
    batch_size: int = 1,
    pad_mode: PadMode = "reflect",
    progress: bool = False,
    overlap: int | None = None,
    blend: Blend = "gaussian",
    argmax: bool = False,
    out: Tensor | np.ndarray | None = None,
) -> Tensor | np.ndarray:
    """Compute ``model(image)`` for an image of any size, tile by tile, at the size of the image.

    For a net without padding, such as ``UNet(padding="valid")``, the result is that of the whole image, mirrored by the
    net's margin, up to rounding. For a net that pads, tiles overlap and are blended, which is close but not equal.
    Margin and phase (2^depth) are found from the sizes of the model's maps.

    Memory depends on the tile, not on the image, which is read tile by tile: pass a memory-mapped array, and another as
    ``out``. ``out`` is written as tiles finish; if the model fails, part of it is written.

    Volumes (N, C, D, H, W) are cut into cubes. Where they are blended, the logits of one slab of tiles, ``tile`` slices
    of the volume, are held in fp32; without an overlap none are.

    Args:
        model: (B, C, h, w) -> logits (B, K, h - 2 margin, w - 2 margin), in eval mode. Tiles are moved to the device
            and dtype of its parameters; uint8 pixels keep their values, and the model must normalise them.
        image: (N, C, H, W) or (N, C, D, H, W), of any dtype; an array (H, W, C) is ``array.transpose(2, 0, 1)[None]``,
            without a copy.
        tile: side of the model's square input, margin included, in pixels. Small images get smaller tiles.
        batch_size: tiles per call of the model.
        pad_mode: padding beyond the image, as in ``torch.nn.functional.pad``: "reflect" (mirrored as often as needed),
            "replicate", or "constant" zeros.
        progress: show a bar on stderr.
        overlap: least overlap of the outputs of neighbouring tiles, in pixels. None means 0 for a net with a margin,
            else a quarter of the tile. With 0 nothing is blended.
        blend: weights in the overlap: "gaussian" (deviation an eighth of the tile), "linear" (the distance to the
            tile's border), "constant", or "crop", which takes each pixel from the tile whose border is farther. Where
            ``overlap`` is twice a net's reach, "crop" gives the result of the whole image.
        argmax: return class maps instead of logits.
        out: receives the result, and has its shape; integers with ``argmax``, else floating point.

    Returns:
        ``out``, or a new tensor on the image's device, or a new array for an array: logits (N, K, H, W) in the model's
        dtype (an array has no bfloat16, but float32), or class maps (N, H, W), uint8 up to 256 classes, else int64.

    Raises:
        ValueError: the model cannot take the tile (the nearest valid sizes are named), the overlap is too large, the
            image has no pixels, ``out`` does not fit, or the model is in training mode.
        TypeError: the image or the model's output has the wrong type.

    Reference: Ronneberger, Fischer and Brox, U-Net, arXiv:1505.04597, figure 2.

    Example:
        >>> model = fastseg.models.create("segnet", num_classes=12).eval()
        >>> overlap_tile(model, torch.rand(1, 3, 300, 500), tile=256).shape
        torch.Size([1, 12, 300, 500])
    """
    channels = check_image(image)
    plan = plan_tiles(model, tile, overlap, channels, dims=image.ndim - 2)
    return run_tiles(
        model,
        image,
        plan,
        batch_size=batch_size,
        pad_mode=pad_mode,
        progress=progress,
        blend=blend,
        argmax=argmax,
        out=out,
    )


def check_image(image: Tensor | np.ndarray) -> int:
    """Return the channels of an image, after a check that ``overlap_tile`` can take it."""
    if not isinstance(image, (Tensor, np.ndarray)):
        raise TypeError(f"overlap_tile: image is a {type(image).__name__}; give a tensor or an array")
    if image.ndim not in (4, 5) or 0 in image.shape[1:]:
        raise ValueError(
            f"overlap_tile: image is {tuple(image.shape)}; give (N, C, H, W), none of C, H, W zero, or (N, C, D, H, W)"
        )
    return image.shape[1]


@torch.no_grad()
def run_tiles(
    model: nn.Module,
    image: Tensor | np.ndarray,
    plan: TilePlan,
    *,
    batch_size: int = 1,
    pad_mode: PadMode = "reflect",
    progress: bool = False,
    blend: Blend = "gaussian",
    argmax: bool = False,
    out: Tensor | np.ndarray | None = None,
) -> Tensor | np.ndarray:
    """``overlap_tile`` with a plan that was made before, for this model or one that wraps it."""
    check_image(image)
    for name, value, known in (("pad_mode", pad_mode, PAD_MODES), ("blend", blend, BLENDS)):
        if value not in known:
            raise ValueError(f"overlap_tile: {name} is {value!r}; use one of {', '.join(known)}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"overlap_tile: batch_size is {batch_size!r}; give an integer of at least 1")
    if image.ndim == 5:
        return run_volume_tiles(
            model, image, plan, batch_size=batch_size, pad_mode=pad_mode, progress=progress, blend=blend,
            argmax=argmax, out=out,
        )  # fmt: skip
    device, dtype = placement(model)
    out = output_for(image, plan.geometry.num_classes, dtype, argmax, out)
    rows, columns = _axes(plan, *image.shape[2:])
    blended = plan.overlap > 0
    stitcher = Stitcher(rows, columns, blend if blended else None, argmax, out)
    count = sum(1 for _ in jobs(image.shape[0], rows, columns, blended))
    order, batches = jobs(image.shape[0], rows, columns, blended), range(0, count, batch_size)
    for _ in progress_bar(batches, "tiles", unit="batch", leave=False) if progress else batches:
        batch = list(itertools.islice(order, batch_size))
        tiles = [_cut(image, job.n, rows.source(job.i), columns.source(job.j), pad_mode) for job in batch]
        logits = model(torch.stack(tiles).to(device, dtype))
        for job, tile in zip(batch, logits, strict=True):
            stitcher.add(job, tile)
    return out


def _axes(plan: TilePlan, height: int, width: int) -> tuple[Axis, Axis]:
    """The tiles of an image. A side shorter than a tile's output gets a smaller tile, if the model takes it."""
    geometry = plan.geometry
    tile, margin, phase, probe = geometry.tile, geometry.margin, geometry.phase, geometry.probe

    def fits(sides: tuple[int, int]) -> bool:
        return probe.output(*sides) == (sides[0] - 2 * margin, sides[1] - 2 * margin)

    def shortest(extent: int) -> int:
        sides = range(extent + 2 * margin, min(tile, extent + 2 * margin + phase))
        return next((side for side in sides if fits((side, tile))), tile)

    sides = shortest(height), shortest(width)
    sides = sides if fits(sides) else (tile, tile)
    return Axis(height, sides[0], margin, phase, plan.step), Axis(width, sides[1], margin, phase, plan.step)


def _cut(
    image: Tensor | np.ndarray, n: int, rows: tuple[int, int], columns: tuple[int, int], pad_mode: PadMode
) -> Tensor:
    """Copy (C, h, w) from image ``n``; pixels beyond it as ``pad_mode`` says."""
    (top, bottom, down), (left, right, across) = (
        mirrored(*span, extent, pad_mode) for span, extent in ((rows, image.shape[2]), (columns, image.shape[3]))
    )
    tile = image[n, :, top:bottom, left:right]
    if isinstance(tile, np.ndarray):
        tile = torch.from_numpy(tile.astype(tile.dtype.newbyteorder("=")))  # a copy: it may be read-only
    for dim, (begin, end), extent, index in ((1, rows, image.shape[2], down), (2, columns, image.shape[3], across)):
        if begin >= 0 and end <= extent:
            continue
        tile = tile.index_select(dim, index.to(tile.device))
        if pad_mode == "constant":
            outside = torch.arange(begin, end, device=tile.device)
            outside = (outside < 0) | (outside >= extent)
            tile = tile.masked_fill(outside[:, None] if dim == 1 else outside, 0)
    return tile
