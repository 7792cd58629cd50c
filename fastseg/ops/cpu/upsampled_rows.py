"""Cut a bilinear upsampling on a CPU into strips of rows: shared by the losses that walk over them.

A strip interpolates its rows along x once (``along_x``); each block of output rows is then the product of a small
matrix with them. The gradient goes back through the transposes of both. ``upsampled_slabs.py`` does so with volumes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastseg.ops.core.upsample import along_x, neighbours
from fastseg.ops.cpu.threads import each

Result = TypeVar("Result")

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


class Rows:
    """The strips of maps, and how a walk over them reads logits and labels and leaves gradients.

    Args:
        x: logits (N, C, h, w).
        size: of the output, in pixels.
        align_corners: as in ``torch.nn.functional.interpolate``.
        kind: the dtype to compute in.
    """

    def __init__(self, x: Tensor, size: Sequence[int], align_corners: bool, kind: torch.dtype):
        H, W = size
        self.x, self.width, self.align_corners, self.kind = x.detach(), W, align_corners, kind
        self.strips = strips_of(x.shape, H, W, align_corners, kind)

    def results(self, function: Callable[[Strip], Result]) -> Iterator[tuple[Strip, Result]]:
        """Each strip with what ``function`` gives for it, computed on all threads, in the order of the strips."""
        yield from zip(self.strips, each(function, self.strips), strict=True)

    def blocks(self, strip: Strip) -> list[slice]:
        """The rows of a strip in blocks that stay in the cache, counted from its first."""
        rows, step = strip.stop - strip.start, max(1, BLOCK // (self.x.shape[1] * self.width))
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def of(self, t: Tensor, strip: Strip, rows: slice) -> Tensor:
        """What a block reads of ``t``: (rows, 1, W) of (N, H, W), or (rows, C, W) of (N, C, H, W)."""
        within = slice(strip.start + rows.start, strip.start + rows.stop)
        return t[strip.image, within, None] if t.dim() == 3 else t[strip.image, :, within].transpose(0, 1)

    def put(self, out: Tensor, strip: Strip, rows: slice, values: Tensor) -> None:
        """Write values (rows, 1, W) of a block into (N, H, W)."""
        out[strip.image, strip.start + rows.start : strip.start + rows.stop] = values[:, 0]

    def wide(self, strip: Strip) -> Tensor:
        """The strip's rows of logits, interpolated along x: (last - first, C * W)."""
        return along_x(self.x[strip.image, :, strip.first : strip.last].to(self.kind), self.width, self.align_corners)

    def up(self, wide: Tensor, strip: Strip, rows: slice) -> Tensor:
        """Upsampled logits of a block, (rows, C, W)."""
        return torch.mm(strip.matrix[rows], wide).view(-1, self.x.shape[1], self.width)

    def down(self, dwide: Tensor | None, dv: Tensor, strip: Strip, rows: slice) -> Tensor:
        """The gradient at ``wide`` of a gradient at a block, added to ``dwide``, that of the blocks before."""
        matrix, dv = strip.matrix[rows].t(), dv.view(dv.shape[0], -1)
        return torch.mm(matrix, dv) if dwide is None else dwide.addmm_(matrix, dv)

    def narrow(self, dwide: Tensor, strip: Strip) -> Tensor:
        """The gradient at the strip's logits, (last - first, C, w)."""
        C, w = self.x.shape[1], self.x.shape[3]
        return along_x_backward(dwide, (C, strip.last - strip.first, w), self.align_corners)

    def gradient(self) -> Tensor:
        """Zeros to ``add`` to."""
        N, C, h, w = self.x.shape
        return torch.zeros(N, h, C, w, dtype=self.kind, device="cpu")

    def add(self, dx: Tensor, strip: Strip, part: Tensor) -> None:
        """Add what ``narrow`` gave."""
        dx[strip.image, strip.first : strip.last] += part

    def finished(self, dx: Tensor) -> Tensor:
        """The gradient (N, C, h, w)."""
        return dx.permute(0, 2, 1, 3)
