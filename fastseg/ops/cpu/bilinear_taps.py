"""Taps of the bilinear kernel, and transposed convolutions with them in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.constants import constant
from fastseg.ops.core.dispatch import followed
from fastseg.ops.core.layout import new_map

LEAST_STRIDE = 8  # from here on two passes are faster than one grouped convolution, in both layouts (CPU, 1 thread)


def line(K: int, like: Tensor) -> Tensor:
    """The kernel along one axis, (K,), in the dtype and on the device of ``like``."""
    distance = (torch.arange(K, device=like.device, dtype=like.dtype) - (K - 1) / 2).abs()
    return 1 - distance / ((K + 1) // 2)


def is_plain(x: Tensor) -> bool:
    """True if ``x`` is an ordinary CPU tensor: not traced, not transformed, no stand-in."""
    return x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter) and not followed()


def grouped_taps(K: int, x: Tensor, dtype: torch.dtype, *, across: bool = False) -> Tensor:
    """Taps (C, 1, K, K) for the channels of ``x``, or (C, 1, 1, K) with ``across``; cached for plain tensors."""
    if is_plain(x):
        return kept_taps(K, x.shape[1], dtype, across)
    return _expanded(K, x.shape[1], x.new_empty(0, dtype=dtype), across)


@constant(16)
def kept_taps(K: int, C: int, dtype: torch.dtype, across: bool) -> Tensor:
    return _expanded(K, C, torch.empty(0, dtype=dtype), across)


def _expanded(K: int, C: int, like: Tensor, across: bool) -> Tensor:
    taps = line(K, like)
    taps = taps[None] if across else taps[:, None] * taps
    return taps.expand(C, 1, *taps.shape).contiguous()


def two_passes(x: Tensor, K: int, stride: int, padding: int, size: tuple[int, int] | None) -> Tensor:
    """The bilinear ``conv_transpose2d`` of a CPU map, first across, then down; K at most 2 ``stride``. No gradient.

    The pass across runs on the few rows of the small map. In the pass down each output row is a weighted sum of two
    rows, computed and written once, with one call for all rows of a phase. This takes 0.6 to 0.85 of a grouped
    convolution's time (channels_last, 21 channels).
    """
    N, C, H, W = x.shape
    OH, OW = size or ((n - 1) * stride + K - 2 * padding for n in (H, W))
    reach = max((H - 1) * stride + K - padding, 0)  # rows from here on are 0
    weight = grouped_taps(K, x, x.dtype, across=True)
    rows = F.conv_transpose2d(x, weight, stride=(1, stride), groups=C)[..., padding : padding + OW]
    rows = F.pad(rows, (0, OW - rows.shape[-1], 1, 1))
    y = new_map(x, (N, C, OH, OW))
    y[:, :, reach:] = 0
    taps = [*line(K, x.new_empty(0)).tolist(), *[0.0] * (2 * stride - K)]
    scaled = torch.empty_like(rows)
    for first in range(min(stride, OH, reach)):
        at, phase = divmod(first + padding, stride)
        out = y[:, :, first:reach:stride]
        upper, lower = (rows[:, :, i : i + out.shape[2]] for i in (at, at + 1))
        if taps[phase + stride] == 0:  # an odd kernel's last phase reads nothing from above, which might be infinite
            torch.mul(lower, taps[phase], out=out)
        else:
            torch.mul(lower, taps[phase], out=scaled[:, :, : out.shape[2]])
            torch.add(scaled[:, :, : out.shape[2]], upper, alpha=taps[phase + stride], out=out)
    return y


def sized_conv_transpose2d(
    x: Tensor, weight: Tensor, stride: int, padding: int, groups: int, size: tuple[int, int] | None
) -> Tensor:
    """``conv_transpose2d`` with any output size: past torch's size, what the kernel gives there, and then zeros."""
    natural = [(n - 1) * stride + weight.shape[-1] - 2 * padding for n in x.shape[-2:]]
    if size is None or (size[0] <= natural[0] and size[1] <= natural[1]):
        y = F.conv_transpose2d(x, weight, None, stride, padding, groups=groups)
        return y if size is None else _cut(y, size)
    y = F.conv_transpose2d(x, weight, None, stride, groups=groups)[..., padding:, padding:]
    y = y[..., : size[0], : size[1]]
    return F.pad(y, (0, size[1] - y.shape[-1], 0, size[0] - y.shape[-2]))


def _cut(y: Tensor, size: tuple[int, int]) -> Tensor:
    """The first rows and columns; a copy for symbolic sizes, because asking if a view is dense would add a guard."""
    if not any(isinstance(n, torch.SymInt) for n in size):
        return y[..., : size[0], : size[1]]
    for axis, n in zip((-2, -1), size, strict=True):
        y = y.index_select(axis, torch.arange(n, device=y.device))
    return y
