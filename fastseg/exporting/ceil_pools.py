"""Pooling with ``ceil_mode`` as pooling without it, for graphs of free sizes.

AOTInductor (torch 2.13) takes the size of such a pool's output from the example: 129 columns give 64 where 96 gave 48.
So the map is padded to the end of the last window, and the indices are counted back to the map's own columns.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class _Windows(NamedTuple):
    """The windows along one axis, in pixels."""

    stride: int
    padding: int
    reach: int  # from a window's first pixel to the one behind its last

    def rest(self, n: int) -> int:
        """Pixels by which the last window ends behind a padded axis of ``n`` pixels."""
        return (self.reach - n - 2 * self.padding) % self.stride


def _windows(size: Sequence[int], stride: Sequence[int], padding: Any, dilation: Any) -> list[_Windows] | None:
    """Of both axes; None where the last window may begin behind the map: torch leaves such a window out."""
    pairs = [_pair(value) for value in (size, stride or size, padding, dilation)]
    found = [_Windows(s, p, d * (k - 1) + 1) for k, s, p, d in zip(*pairs, strict=True)]
    return found if all(w.padding + w.stride <= w.reach for w in found) else None


def _pair(value: Any) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * 2 if len(values) == 1 else values


def _padded(x: Tensor, windows: list[_Windows], fill: float) -> Tensor:
    rows, columns = windows
    H, W = x.shape[-2:]
    return F.pad(
        x, (columns.padding, columns.padding + columns.rest(W), rows.padding, rows.padding + rows.rest(H)), value=fill
    )


def max_pool2d_with_indices(x, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False):
    """The op of this name; arguments as torch hands them to a decomposition."""
    windows = _windows(kernel_size, stride, padding, dilation) if ceil_mode else None
    if windows is None:
        return NotImplemented
    wide = _padded(x, windows, -torch.inf)
    y, index = torch.ops.aten.max_pool2d_with_indices(wide, kernel_size, stride, 0, dilation)
    (rows, columns), (H, W) = windows, x.shape[-2:]
    row = (index // wide.shape[-1] - rows.padding).clamp(0, H - 1)  # where all is -inf, padding may be named
    column = (index % wide.shape[-1] - columns.padding).clamp(0, W - 1)
    return y, row * W + column


def avg_pool2d(x, kernel_size, stride=(), padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None):
    """The op of this name: sums over the windows by how many pixels of them count."""
    windows = _windows(kernel_size, stride, padding, 1) if ceil_mode else None
    if windows is None:
        return NotImplemented
    sums = lambda wide: torch.ops.aten.avg_pool2d(wide, kernel_size, stride, 0, False, True, 1)
    total = sums(_padded(x, windows, 0.0))
    if divisor_override:
        return total / divisor_override
    ones = x.new_ones((1, 1, *x.shape[-2:]))
    if count_include_pad:  # padding counts, what lies behind it does not
        rows, columns = windows
        ones = F.pad(ones, (columns.padding,) * 2 + (rows.padding,) * 2, value=1.0)
        H, W = x.shape[-2:]
        return total / sums(F.pad(ones, (0, columns.rest(W), 0, rows.rest(H))))
    return total / sums(_padded(ones, windows, 0.0))


CEIL_POOLS: dict[Any, Callable] = {
    torch.ops.aten.max_pool2d_with_indices.default: max_pool2d_with_indices,
    torch.ops.aten.avg_pool2d.default: avg_pool2d,
}
