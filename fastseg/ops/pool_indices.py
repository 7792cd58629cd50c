"""Compact indices of a max pooling: 2, 4 or 8 bits per window."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.kernels.runtime.sizes import MOST_TAPS
from fastseg.ops.core.dispatch import followed
from fastseg.ops.core.layout import memory_format_of
from fastseg.ops.core.torch_private import register_pytree_node

UNPOOL = {1: F.max_unpool1d, 2: F.max_unpool2d, 3: F.max_unpool3d}
POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_CONTIGUOUS = torch.contiguous_format
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True, eq=False)
class PoolIndices:
    """Indices of a max pooling as codes inside the window: 2 bits for up to 4 cells, 4 up to 16, 8 up to 256.

    ``max_pool2d(..., return_indices=True, index_format="compact")`` returns one; ``max_unpool2d`` takes it in place of
    int64 indices. The code of a cell is its number in the window, row by row, so a code cannot name a cell outside its
    window.

    Attributes:
        codes: uint8 (rows, bytes), packed codes, the first in the lowest bits; packed along channels if
            ``channels_last``, else along the last axis of the windows.
        shape: (N, C, *windows) or (C, *windows).
        input_size: spatial size of the input of the pooling, in pixels.
        kernel_size: size of the windows, in pixels, one number per spatial axis, as for the next three.
        stride: distance between windows, in pixels.
        padding: padding before the first pixel, in pixels.
        dilation: distance between neighbouring cells of a window, in pixels.
        channels_last: True if the pooled map is channels_last.

    Example:
        >>> values, indices = max_pool2d(x, 2, return_indices=True, index_format="compact")
        >>> indices.to_torch()  # as torch's own int64
    """

    codes: Tensor
    shape: torch.Size
    input_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    channels_last: bool

    @property
    def bits(self) -> int:
        """Bits per code."""
        return bits_of(self.kernel_size)

    @property
    def nbytes(self) -> int:
        """Size of the codes, in bytes."""
        return self.codes.nbytes

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PoolIndices":
        """Copy to another device."""
        return replace(self, codes=self.codes.to(device, non_blocking=non_blocking))

    def to_torch(self) -> Tensor:
        """Decode to torch's int64 indices: flat in the unpadded plane; -1 for a code that names no cell of it."""
        batch = self.shape[: -len(self.input_size)]
        windows = self.shape[len(batch) :]
        N, C = batch if len(batch) == 2 else (1, *batch)
        grid = (N, *windows, C) if self.channels_last else (N, C, *windows)
        codes = _unpack(self.codes.view(*grid[:-1], self.codes.shape[1]), self.bits, grid[-1])
        codes = codes.movedim(-1, 1) if self.channels_last else codes
        flat = decode(codes, self.input_size, self.kernel_size, self.stride, self.padding, self.dilation)
        flat = flat.contiguous(memory_format=_FORMATS[flat.dim()]) if self.channels_last else flat.contiguous()
        return flat.view(self.shape) if len(batch) == 1 else flat

    @classmethod
    def from_torch(
        cls,
        indices: Tensor,
        input_size: tuple[int, ...],
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        *,
        channels_last: bool = False,
    ) -> "PoolIndices":
        """Encode int64 indices (N, C, *windows) or (C, *windows) of a max pooling with this geometry.

        Raises:
            ValueError: windows have more than 256 cells, or an index is outside its window.
        """
        dims = len(input_size)
        flat = indices if indices.dim() == dims + 2 else indices[None]
        codes = encode(flat, input_size, kernel_size, stride, padding, dilation)
        back = decode(codes, input_size, kernel_size, stride, padding, dilation)
        if not torch.equal(back, flat):
            raise ValueError(
                "PoolIndices.from_torch: an index is outside its window; give the geometry of the indices' pooling"
            )
        codes = pack(codes, bits_of(kernel_size), channels_last)
        return cls(codes, indices.shape, *_tuples(input_size, kernel_size, stride, padding, dilation), channels_last)

    def check(self) -> None:
        """Check that the parts fit each other; a damaged file may hold parts that do not.

        Raises:
            ValueError: the parts do not fit.
        """
        dims = len(self.input_size)
        batch, windows = tuple(self.shape[:-dims]), tuple(self.shape[-dims:])
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation)
        fits = len(batch) in (1, 2) and len(windows) == dims and all(len(size) == dims for size in sizes)
        if fits:
            grid = (*batch[:-1], *windows, batch[-1]) if self.channels_last else (*batch, *windows)
            rows = (math.prod(grid[:-1]), -(-grid[-1] * self.bits // 8))
            fits = self.codes.dtype == torch.uint8 and tuple(self.codes.shape) == rows
        if not fits:
            raise ValueError(f"{self!r}: codes are {self.codes.dtype} {tuple(self.codes.shape)}, which does not fit")

    def __repr__(self) -> str:
        return (
            f"PoolIndices(shape={tuple(self.shape)}, {self.bits} bits, {self.nbytes} bytes, device={self.device}, "
            f"input_size={self.input_size}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, channels_last={self.channels_last})"
        )


def _flatten(indices: PoolIndices) -> tuple[list, tuple]:
    codes, *rest = (getattr(indices, name) for name in PoolIndices.__dataclass_fields__)
    return [codes], tuple(rest)


register_pytree_node(  # nested inputs and outputs of torch's tools: the codes are the one tensor
    PoolIndices,
    _flatten,
    lambda leaves, rest: PoolIndices(*leaves, *rest),
    serialized_type_name="fastseg.ops.PoolIndices",
)


def _tuples(*sizes) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(size) for size in sizes)


def bits_of(kernel_size: tuple[int, ...]) -> int:
    """Bits of a code for windows of this size.

    Raises:
        ValueError: the windows have more than 256 cells.
    """
    taps = math.prod(kernel_size)
    if taps > MOST_TAPS:
        raise ValueError(f'windows of {taps} > {MOST_TAPS} cells have no compact indices; use index_format="int64"')
    return 2 if taps <= 4 else 4 if taps <= 16 else 8


def _origins(axis: int, dims: int, windows: int, stride: int, padding: int, like: Tensor) -> Tensor:
    """The first coordinate of each window along one spatial axis, shaped to broadcast over (N, C, *windows)."""
    start = torch.arange(windows, device=like.device, dtype=torch.int32) * stride - padding
    return start.view(-1, *[1] * (dims - 1 - axis))


def encode(indices: Tensor, input_size, kernel_size, stride, padding, dilation) -> Tensor:
    """Encode int64 indices (N, C, *windows) as uint8 codes of the same shape and layout."""
    dims = len(input_size)
    code: Tensor | int = 0
    rest, taps = indices.to(torch.int32) if math.prod(input_size) < 2**31 else indices, 1  # halves the bytes to read
    for axis in reversed(range(dims)):
        at = rest  # the first coordinate is the remainder
        if axis > 0:
            rest = rest // input_size[axis]
            at = at - rest * input_size[axis]
        step = at - _origins(axis, dims, indices.shape[2 + axis], stride[axis], padding[axis], indices)
        step = step if dilation[axis] == 1 else step // dilation[axis]
        code = code + (step if taps == 1 else step * taps).to(torch.uint8)
        taps *= kernel_size[axis]
    return code


def decode(codes: Tensor, input_size, kernel_size, stride, padding, dilation) -> Tensor:
    """Decode codes (N, C, *windows) to int64 indices of the same shape; -1 where a code names no cell of the plane."""
    dims = len(input_size)
    wide = torch.int32 if math.prod(input_size) < 2**31 else torch.int64
    ok = codes <= math.prod(kernel_size) - 1  # 256 does not fit the dtype
    rest, flat, cells = codes if max(kernel_size) < 256 else codes.to(wide), 0, 1
    for axis in reversed(range(dims)):
        step, n, windows = rest, input_size[axis], codes.shape[2 + axis]
        if axis > 0:
            rest = rest // kernel_size[axis]
            step = step - rest * kernel_size[axis]
        step = step.to(wide) if dilation[axis] == 1 else step.to(wide) * dilation[axis]
        at = step + _origins(axis, dims, windows, stride[axis], padding[axis], codes)
        if (
            followed(codes)
            or padding[axis]
            or (windows - 1) * stride[axis] + dilation[axis] * (kernel_size[axis] - 1) >= n
        ):
            ok = ok & (at >= 0) & (at < n)  # some window is cut off
        flat = at if cells == 1 else flat + at * cells
        cells *= n
    return torch.where(ok, flat.long(), -1)


def pack(codes: Tensor, bits: int, channels_last: bool) -> Tensor:
    """Pack uint8 codes (N, C, *windows) into (rows, bytes); a row is the channels of a pixel or a line of a plane."""
    rows = (codes.movedim(1, -1) if channels_last else codes).reshape(-1, codes.shape[1 if channels_last else -1])
    fields = 8 // bits
    if fields == 1:
        return rows.contiguous() if rows.data_ptr() != codes.data_ptr() else rows.clone()
    width = -(-rows.shape[1] // fields)
    padded = torch.nn.functional.pad(rows, (0, width * fields - rows.shape[1])).view(-1, width, fields)
    packed = padded[:, :, 0]
    for field in range(1, fields):
        packed = packed + padded[:, :, field] * 2 ** (field * bits)  # no shifts: ONNX has none for tensors
    return packed


def _unpack(packed: Tensor, bits: int, inner: int) -> Tensor:
    """(..., bytes) -> (..., inner) codes."""
    fields = 8 // bits
    if fields == 1:
        return packed
    columns = [packed // 2 ** (field * bits) % 2**bits for field in range(fields)]
    return torch.stack(columns, -1).flatten(-2)[..., :inner]


# --- torch's own pooling


def is_last(x: Tensor) -> bool:
    """True if ``x`` is channels_last or channels_last_3d."""
    return memory_format_of(x) != _CONTIGUOUS


def pool_in_windows(dims: int, x, kernel, stride, padding, dilation, ceil_mode, return_indices=True):
    """torch's maxima and indices, each index inside its window: channels_last_3d has others where all is -inf."""
    source = x.contiguous() if dims == 3 else x
    y, index = POOL[dims](source, kernel, stride, padding, dilation, ceil_mode, return_indices)
    if source is x:
        return y, index
    return tuple(t.contiguous(memory_format=memory_format_of(x)) for t in (y, index))
