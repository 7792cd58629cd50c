"""Cut a bilinear upsampling on a CPU into strips of rows: shared by the losses that walk over them.

A strip interpolates its rows along x once (``along_x``); each block of output rows is then the product of a small
matrix with them. The gradient goes back through the transposes of both.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.ops.core.upsample import neighbours

BLOCK = 2**17  # values in a block: 512 KiB of fp32
_STRIP, _LEAST_ROWS = 2**17, 32  # values in a strip, and its least number of rows


class Strip(NamedTuple):
    """Output rows [start, stop) of an image, which lie between its input rows [first, last)."""

    image: int
    start: int
    stop: int
    first: int
    last: int
    matrix: Tensor  # (stop - start, last - first): the interpolation along y


def strips_of(
    shape: tuple[int, ...], H: int, W: int, align_corners: bool, kind: torch.dtype, factor: float = 0.0
) -> list[Strip]:
    """The strips of logits of ``shape`` (N, C, h, w), upsampled to H x W; ``factor``: of the height, if given."""
    N, C, h, _ = shape
    first, second, weight = neighbours(h, H, align_corners, kind, factor)
    matrix = torch.zeros(H, h, dtype=kind, device="cpu").scatter_(1, first[:, None], (1 - weight)[:, None])
    matrix.scatter_add_(1, second[:, None], weight[:, None])
    rows, firsts, seconds = max(_LEAST_ROWS, _STRIP // (W * C)), first.tolist(), second.tolist()
    strips = []
    for start in range(0, H, rows):
        stop = min(start + rows, H)
        low = (firsts[start], seconds[stop - 1] + 1)
        strips.append((start, stop, *low, matrix[start:stop, low[0] : low[1]]))
    return [Strip(n, *strip) for n in range(N) for strip in strips]


def along_x_backward(dwide: Tensor, shape: tuple[int, ...], align_corners: bool) -> Tensor:
    """The transpose of ``along_x``: (rows, C * W) -> (rows, C, w), for x of ``shape`` (C, rows, w)."""
    C, rows, w = shape
    lines = dwide.view(rows * C, -1).t().contiguous()[None, None].permute(0, 3, 1, 2)
    back = torch.ops.aten.upsample_bilinear2d_backward
    dx = back(lines, lines.shape[2:], [1, rows * C, 1, w], align_corners, None, None)
    return dx.reshape(rows, C, w)
