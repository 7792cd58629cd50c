"""Heads of trilinearly upsampled logits that read all classes of a voxel: confidence and the most probable classes.

A CPU walks over blocks of a volume that stay in its cache; elsewhere the op on maps takes a few slices at a time.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastseg.ops.core.dispatch import followed, kernels_run, record_reference
from fastseg.ops.core.volume import Resize, interpolate
from fastseg.ops.cpu.threads import each
from fastseg.ops.cpu.upsampled_slabs import Slab, Slabs
from fastseg.ops.volume_argmax import all_finite, over_slices

_FEW = 2**15  # upsampled logits; below, torch's own steps are as fast on a CPU (``benchmarks.studies.volumes_cpu``)

Found = Callable[[Tensor], tuple[Tensor, ...]]


def of_volume(
    name: str, of_maps: Found, found: Found, logits: Tensor, to: Resize, dtypes: tuple[torch.dtype, ...],
    channels: tuple[tuple[int, ...], ...],
) -> tuple[Any, Any]:  # fmt: skip
    """What a head gives for each voxel, in slabs or blocks.

    Args:
        name: of the op, for ``explain``.
        of_maps: the op on maps (S, C, h, w), the slices of a slab.
        found: the same of logits (N, C, ...) at their final size.
        logits: (N, C, d, h, w).
        to: the interpolation.
        dtypes: of the results.
        channels: of each result, ``()`` or ``(k,)``.
    """
    kind = torch.promote_types(logits.dtype, torch.float32)
    on_cpu = logits.is_cpu and not followed(logits) and not kernels_run(logits)
    if followed(logits) or (on_cpu and 0 < logits.shape[0] * logits.shape[1] * math.prod(to.size) < _FEW):
        if on_cpu:
            record_reference(name, logits, "a volume of few voxels")
        full = found(interpolate(logits.to(kind), to))
        classes, values = (t.to(dtype) for t, dtype in zip(full, dtypes, strict=True))
        return classes, values
    outs = tuple(
        torch.empty(logits.shape[0], *k, *to.size, dtype=dtype, device=logits.device)
        for dtype, k in zip(dtypes, channels, strict=True)
    )
    if on_cpu and all_finite(logits):
        record_reference(name, logits, "a volume: blocks of it")
        _by_blocks(found, logits, to, outs, kind)
    else:
        record_reference(name, logits, "a volume: its slices are the op's own calls")
        over_slices(of_maps, logits, to, outs)
    classes, values = outs
    return classes, values


def _by_blocks(found: Found, logits: Tensor, to: Resize, outs: tuple[Tensor, ...], kind: torch.dtype) -> None:
    """Fill ``outs`` with what ``found`` gives for blocks (rows, C, voxels) of finite logits on a CPU."""
    over = Slabs(logits, to.size, to.align_corners, kind, to.factors)

    def fill(strip: Slab) -> None:
        (rows,) = over.blocks(strip)
        for out, block in zip(outs, found(over.up(over.wide(strip), strip, rows)), strict=True):
            over.put(out, strip, rows, block if block.dim() == 3 else block[:, None])

    each(fill, over.strips)
