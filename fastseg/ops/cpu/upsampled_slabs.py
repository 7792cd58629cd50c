"""Cut a trilinear upsampling on a CPU into strips, some rows of some slices each: for the walks of losses over volumes.

A strip is one block that stays in the cache: (rows, C, S * W) of S slices. Its logits are interpolated along the depth
and along x first, on few values; then all rows are one product of a small matrix with them, as ``upsampled_rows.py``
has it for maps. Torch's trilinear interpolation takes 2 to 6 times as long forward, and 3 to 12 times backward (1 to
118 classes, 16^3 to 128^3, one thread). The gradient goes back through the transposes. No strip is larger than a block,
and parts of the gradient are added up as they come, so memory does not grow with the volume.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastseg.ops.core.constants import constant
from fastseg.ops.core.upsample import matrix_along, neighbours
from fastseg.ops.cpu.threads import each

Result = TypeVar("Result")

BLOCK = 2**17  # values in a strip: 512 KiB of fp32
_DENSE = 128  # columns of logits up to which a product along x is faster than torch's op
_AT_ONCE = 16  # strips of each thread whose results wait to be read


class Part(NamedTuple):
    """Outputs [start, stop) along one axis, which lie between its inputs [first, last)."""

    start: int
    stop: int
    first: int
    last: int
    matrix: Tensor | None  # (stop - start, last - first); None: each output is its input


class Slab(NamedTuple):
    """A strip of a volume: some rows of some slices."""

    image: int
    slices: Part
    rows: Part


class Slabs:
    """The strips of volumes; see ``upsampled_rows.Rows``, whose methods these are.

    Args:
        x: logits (N, C, d, h, w).
        size: of the output, in voxels.
        align_corners: as in ``torch.nn.functional.interpolate``.
        kind: the dtype to compute in.
        factors: of the interpolation where they were given, else zeros.
    """

    def __init__(
        self, x: Tensor, size: Sequence[int], align_corners: bool, kind: torch.dtype,
        factors: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ):  # fmt: skip
        self.x, self.size, self.align_corners, self.kind = x.detach(), tuple(size), align_corners, kind
        N, C, d, h, w = x.shape
        D, H, W = size
        deep, high = _cuts(D, H, max(1, BLOCK // (C * W)))
        slices = _parts(d, D, deep, align_corners, kind, factors[0])
        rows = _parts(h, H, high, align_corners, kind, factors[1])
        self.strips = [Slab(n, z, y) for n in range(N) for z in slices for y in rows]
        self.across = matrix_along(w, W, align_corners, kind, factors[2]) if w != W and w <= _DENSE else None
        self.factor = factors[2] or None

    def results(self, function: Callable[[Slab], Result]) -> Iterator[tuple[Slab, Result]]:
        """Each strip with what ``function`` gives for it, computed on all threads, in the order of the strips."""
        step = _AT_ONCE * torch.get_num_threads()
        for start in range(0, len(self.strips), step):
            strips = self.strips[start : start + step]
            yield from zip(strips, each(function, strips), strict=True)

    def blocks(self, strip: Slab) -> list[slice]:
        """All rows of a strip: it is one block."""
        return [slice(0, strip.rows.stop - strip.rows.start)]

    def of(self, t: Tensor, strip: Slab, rows: slice) -> Tensor:
        """What a block reads of ``t``: (rows, 1, S * W) of (N, D, H, W), or (rows, C, S * W) of (N, C, D, H, W)."""
        there = _within(t[strip.image], strip)
        there = there[None] if t.dim() == 4 else there
        return there.permute(2, 0, 1, 3).flatten(2)

    def put(self, out: Tensor, strip: Slab, rows: slice, values: Tensor) -> None:
        """Write values (rows, 1, S * W) of a block into (N, D, H, W), or (rows, k, S * W) into (N, k, D, H, W)."""
        there = _within(out[strip.image], strip)
        there = there[None] if out.dim() == 4 else there
        there.copy_(values.unflatten(2, (there.shape[1], there.shape[3])).permute(1, 2, 0, 3))

    def wide(self, strip: Slab) -> Tensor:
        """The strip's logits, interpolated along the depth and along x: (last - first, C * S * W), in own memory."""
        w, W, z, y = self.x.shape[4], self.size[2], strip.slices, strip.rows
        v = self.x[strip.image, :, z.first : z.last, y.first : y.last].permute(2, 0, 1, 3)
        v = torch.empty(v.shape, dtype=self.kind, device="cpu").copy_(v)
        if z.matrix is not None:
            v = torch.matmul(z.matrix, v.view(-1, z.last - z.first, w))
        lines = v.view(-1, w)
        if self.across is not None:
            lines = torch.mm(lines, self.across.t())
        elif w != W:
            lines = torch.ops.aten.upsample_linear1d(lines[None], [W], self.align_corners, self.factor)
        return lines.view(y.last - y.first, -1)

    def up(self, wide: Tensor, strip: Slab, rows: slice) -> Tensor:
        """Upsampled logits of a block, (rows, C, S * W)."""
        matrix = strip.rows.matrix
        v = wide if matrix is None else torch.mm(matrix, wide)
        return v.view(v.shape[0], self.x.shape[1], -1)

    def down(self, dwide: Tensor | None, dv: Tensor, strip: Slab, rows: slice) -> Tensor:
        """The gradient at ``wide`` of a gradient at the strip's one block."""
        dv, matrix = dv.reshape(dv.shape[0], -1), strip.rows.matrix
        return dv if matrix is None else torch.mm(matrix.t(), dv)

    def narrow(self, dwide: Tensor, strip: Slab) -> Tensor:
        """The gradient at the strip's logits, (last - first, C, planes, w)."""
        (_, C, _, _, w), W, z, y = self.x.shape, self.size[2], strip.slices, strip.rows
        lines = dwide.view(-1, W)
        if self.across is not None:
            lines = torch.mm(lines, self.across)
        elif w != W:
            back = torch.ops.aten.upsample_linear1d_backward
            lines = back(lines[None], [W], [1, lines.shape[0], w], self.align_corners, self.factor)
        part = lines.view(-1, z.stop - z.start, w)
        if z.matrix is not None:
            part = torch.matmul(z.matrix.t(), part)
        return part.view(y.last - y.first, C, z.last - z.first, w)

    def gradient(self) -> Tensor:
        """Zeros to ``add`` to."""
        return torch.zeros(self.x.shape, dtype=self.kind, device="cpu")

    def add(self, dx: Tensor, strip: Slab, part: Tensor) -> None:
        """Add what ``narrow`` gave."""
        z, y = strip.slices, strip.rows
        dx[strip.image, :, z.first : z.last, y.first : y.last] += part.permute(1, 2, 0, 3)

    def finished(self, dx: Tensor) -> Tensor:
        """The gradient (N, C, d, h, w)."""
        return dx


def upsampled(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Small finite volumes upsampled whole, by three products: (N, C, d, h, w) -> (N, C, D, H, W); differentiable."""
    N, C, d, h, w = x.shape
    D, H, W = size
    if w != W:
        x = torch.mm(x.reshape(-1, w), matrix_along(w, W, align_corners, x.dtype).t())
    if h != H:
        x = torch.matmul(matrix_along(h, H, align_corners, x.dtype), x.reshape(-1, h, W))
    if d != D:
        x = torch.matmul(matrix_along(d, D, align_corners, x.dtype), x.reshape(-1, d, H * W))
    return x.reshape(N, C, D, H, W)


def upsampled_backward(dv: Tensor, shape: Sequence[int], size: Sequence[int], align_corners: bool) -> Tensor:
    """The transpose of ``upsampled``: the gradient at logits of ``shape`` of one at the voxels, (N, C, D * H * W)."""
    (_, _, d, h, w), (D, H, W) = shape, size
    if d != D:
        dv = torch.matmul(matrix_along(d, D, align_corners, dv.dtype).t(), dv.reshape(-1, D, H * W))
    if h != H:
        dv = torch.matmul(matrix_along(h, H, align_corners, dv.dtype).t(), dv.reshape(-1, H, W))
    if w != W:
        dv = torch.mm(dv.reshape(-1, W), matrix_along(w, W, align_corners, dv.dtype))
    return dv.reshape(tuple(shape))


def _within(t: Tensor, strip: Slab) -> Tensor:
    """The strip's voxels of (..., D, H, W)."""
    return t[..., strip.slices.start : strip.slices.stop, strip.rows.start : strip.rows.stop, :]


def _cuts(D: int, H: int, lines: int) -> tuple[int, int]:
    """Into how many parts slices and rows are cut, for at most so many lines a strip."""
    deep = high = 1
    while (slices := -(-D // deep)) * (rows := -(-H // high)) > lines:
        if slices > rows:
            deep = -(-D // (slices - 1))
        else:
            high = -(-H // (rows - 1))
    return deep, high


@constant(maxsize=256)
def _parts(low: int, full: int, count: int, align_corners: bool, kind: torch.dtype, factor: float = 0.0) -> list[Part]:
    """About ``count`` parts of an axis, of equal lengths."""
    length = -(-full // count)
    ends = [(start, min(start + length, full)) for start in range(0, full, length)]
    if low == full:
        return [Part(start, stop, start, stop, None) for start, stop in ends]
    matrix = matrix_along(low, full, align_corners, kind, factor)
    first, second, _ = neighbours(low, full, align_corners, kind, factor)
    parts = []
    for start, stop in ends:
        begin, end = int(first[start]), int(second[stop - 1]) + 1
        parts.append(Part(start, stop, begin, end, matrix[start:stop, begin:end].contiguous()))
    return parts
