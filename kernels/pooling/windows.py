"""Shared by the pooling kernels: the geometry of windows, the walk over maps, and the packing of codes.

A map is walked as rows of an inner axis that is contiguous in memory: channels_last, a row is a pixel and the inner
axis its channels; else a row is one line of one plane and the inner axis its pixels. All sizes have three dimensions;
1-D and 2-D pooling have leading ones, which Triton compiles away.

    window (z, y, x), tap (iz, iy, ix):  cell  (d, h, w) = (z SD - PD + iz LD,  y SH - PH + iy LH,  x SW - PW + ix LW)
                                         code  (iz KH + iy) KW + ix,   in 2, 4 or 8 bits
                                         index (d H + h) W + w,        as torch's int64

with kernel K, stride S, padding P and dilation L.

Codes of 2 and 4 bits are packed along the inner axis, 4 or 2 to a byte, the first in the lowest bits; each row begins
with a byte of its own, so that no two programs write one byte.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.runtime.sizes import MOST_TAPS, layout_of

INT64 = tl.constexpr(64)  # bits of an index; codes have 2, 4 or 8
NO_INDEX = 0
UNROLLED = tl.constexpr(16)  # loops of up to so many steps are unrolled; longer ones would be code of megabytes

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Pooling:
    """One pooling, or the unpooling that undoes it: (N, C, *size) -> (N, C, *out) windows.

    ``dims``: the number of spatial axes of the caller's maps, the last ones of three.
    """

    N: int
    C: int
    size: Size  # D, H, W of the larger map
    out: Size  # windows
    kernel: Size
    stride: Size
    padding: Size
    dilation: Size
    channels_last: bool
    dims: int = 3

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1] * self.kernel[2]

    @property
    def disjoint(self) -> bool:
        """No two windows share a cell."""
        return self.dilation == (1, 1, 1) and all(k <= s for k, s in zip(self.kernel, self.stride, strict=True))

    @property
    def windows(self) -> Size:
        """How many windows cover every cell of the larger map: ``out``, or more where the last cells are in none."""
        sizes = zip(self.size, self.out, self.padding, self.stride, strict=True)
        return tuple(max(o, (n + p - 1) // s + 1) for n, o, p, s in sizes)

    @functools.cached_property
    def layout(self) -> torch.memory_format:
        """Of maps."""
        return layout_of(self.channels_last, self.dims)

    @functools.cached_property
    def window_rows(self) -> tuple[int, int]:
        """Rows, and elements of the inner axis, of a map of the windows."""
        return self.rows(self.out)

    def rows(self, grid: Size) -> tuple[int, int]:
        """Rows, and elements of the inner axis, of a map of ``grid`` cells."""
        d, h, w = grid
        return (self.N * d * h * w, self.C) if self.channels_last else (self.N * self.C * d * h, w)

    @functools.cached_property
    def constants(self) -> dict[str, int | bool]:
        """The geometry as compile-time arguments."""
        groups = {"K": self.kernel, "S": self.stride, "P": self.padding, "L": self.dilation}
        sizes = {name + axis: n for name, size in groups.items() for axis, n in zip("DHW", size, strict=True)}
        return sizes | {"CHANNELS_LAST": self.channels_last}

    def unsupported(self) -> str:
        """Why the kernels cannot take these sizes, or ""."""
        elements = self.C * self.size[0] * self.size[1] * self.size[2]
        if self.taps > MOST_TAPS:
            return f"windows of {self.taps} > {MOST_TAPS} cells"
        if elements >= 2**31 or max(self.rows(self.size)[0], self.rows(self.windows)[0]) >= 2**31:
            return "an image of 2^31 elements or more"
        return ""


def new_map(like: Tensor, pool: Pooling, grid: Size, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised map of ``grid`` cells or windows in pool's layout: (N, C, *grid), ``pool.dims`` of them."""
    shape = (pool.N, pool.C, *grid[3 - pool.dims :])
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=pool.layout)


def new_index(like: Tensor, pool: Pooling, bits: int) -> Tensor:
    """Uninitialised int64 indices shaped as the windows, or rows of packed codes (rows, bytes); empty for no index."""
    if bits == INT64.value:
        return new_map(like, pool, pool.out, torch.int64)
    rows, inner = pool.window_rows
    return like.new_empty((rows, -(-inner * bits // 8)) if bits else 0, dtype=torch.uint8)


@triton.jit
def grid_rows(row, offs, D, H, W, CHANNELS_LAST: tl.constexpr):
    """Row numbers (M,), inner offsets (L,) -> image or plane (M, 1) int64; d, h, w (each (M, 1) or (1, L)); channel."""
    if CHANNELS_LAST:
        w = (row % W)[:, None]
        row = row // W
        channel = offs[None, :]
    else:
        w = offs[None, :]
        channel = 0
    h = (row % H)[:, None]
    row = row // H
    d = (row % D)[:, None]
    return (row // D)[:, None].to(tl.int64), d, h, w, channel


@triton.jit
def pack_codes(code, BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr):
    """(M, L) codes -> (M, L BITS / 8) bytes."""
    FIELDS: tl.constexpr = 8 // BITS
    fields = tl.reshape(code, (BLOCK_M, BLOCK_L // FIELDS, FIELDS))
    shifts = tl.arange(0, FIELDS) * BITS
    return tl.sum(fields << shifts[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def unpack_codes(packed, BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr):
    """(M, L BITS / 8) bytes -> (M, L) codes."""
    FIELDS: tl.constexpr = 8 // BITS
    fields = tl.broadcast_to(packed.to(tl.int32)[:, :, None], (BLOCK_M, BLOCK_L // FIELDS, FIELDS))
    shifts = tl.arange(0, FIELDS) * BITS
    return tl.reshape((fields >> shifts[None, None, :]) & ((1 << BITS) - 1), (BLOCK_M, BLOCK_L))


@triton.jit
def load_index(
    index_ptr, offs, image, z, y, x, channel, row_ok, ok, C, OD, OH, OW,
    CHANNELS_LAST: tl.constexpr, BITS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Indices (int64) or codes (int32) of windows (z, y, x), whose elements are ``offs``.

    ALIGNED: along the inner axis they are block ``program_id(1)``, so that each byte of packed codes is read once.
    """
    if BITS == INT64:
        index = tl.load(index_ptr + offs, mask=ok, other=0)
    elif BITS == 8:
        index = tl.load(index_ptr + offs, mask=ok, other=0).to(tl.int32)
    else:
        FIELDS: tl.constexpr = 8 // BITS
        row = (image * OD + z) * OH + y
        if CHANNELS_LAST:
            row = row * OW + x
        width = ((C if CHANNELS_LAST else OW) + FIELDS - 1) // FIELDS
        if ALIGNED:
            offs_b = tl.program_id(1) * (BLOCK_L // FIELDS) + tl.arange(0, BLOCK_L // FIELDS)
            mask_b = row_ok & (offs_b < width)[None, :]
            packed = tl.load(index_ptr + row * width + offs_b[None, :], mask=mask_b, other=0)
            index = unpack_codes(packed, BITS, BLOCK_M, BLOCK_L)
        else:
            field = channel if CHANNELS_LAST else x
            packed = tl.load(index_ptr + row * width + field // FIELDS, mask=ok, other=0).to(tl.int32)
            index = (packed >> (field % FIELDS * BITS)) & ((1 << BITS) - 1)
    return index
