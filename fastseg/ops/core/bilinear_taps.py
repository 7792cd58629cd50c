"""Taps of the bilinear kernel, and ``conv_transpose2d`` of any output size, in torch's own lines."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.sizes import by_index


def line(K: int, like: Tensor) -> Tensor:
    """The kernel along one axis, (K,), in the dtype and on the device of ``like``."""
    distance = (torch.arange(K, device=like.device, dtype=like.dtype) - (K - 1) / 2).abs()
    return 1 - distance / ((K + 1) // 2)


def grouped_taps(K: int, C: int, like: Tensor, *, across: bool = False) -> Tensor:
    """Taps (C, 1, K, K) of a convolution of one group a channel, or (C, 1, 1, K) with ``across``."""
    taps = line(K, like)
    taps = taps[None] if across else taps[:, None] * taps
    return taps.expand(C, 1, *taps.shape).contiguous()


def natural_size(x: Tensor, stride: int, K: int, padding: int) -> tuple[int, int]:
    """The output's height and width in torch."""
    H, W = x.shape[-2:]
    return (H - 1) * stride + K - 2 * padding, (W - 1) * stride + K - 2 * padding


def window(skip: Tensor, offset: int, size: Sequence[int]) -> Tensor:
    """The (N, C, *size) window of ``skip`` that begins at row and column ``offset``."""
    return skip[..., offset : offset + size[0], offset : offset + size[1]]


def sized_conv_transpose2d(
    x: Tensor, weight: Tensor, stride: int, padding: int, groups: int, size: tuple[int, int] | None
) -> Tensor:
    """``conv_transpose2d`` with any output size: past torch's size, what the kernel gives there, and then zeros."""
    if size is None:
        return F.conv_transpose2d(x, weight, None, stride, padding, groups=groups)
    natural = natural_size(x, stride, weight.shape[-1], padding)
    traced = any(isinstance(n, Tensor) for n in size)  # by torch.jit.trace, which records no question
    if not traced and size[0] <= natural[0] and size[1] <= natural[1]:
        return _cut(F.conv_transpose2d(x, weight, None, stride, padding, groups=groups), size)
    y = F.conv_transpose2d(x, weight, None, stride, groups=groups)[..., padding:, padding:]
    if by_index(*size):
        return resized_by_index(y, size, (0, 0))
    y = y[..., : size[0], : size[1]]
    return F.pad(y, (0, size[1] - y.shape[-1], 0, size[0] - y.shape[-2]))


def resized_by_index(y: Tensor, size: Sequence[int], before: Sequence[int]) -> Tensor:
    """``F.pad(y, ...)`` to ``size`` with so many rows and columns of zeros before, by indices."""
    for axis, n, first in zip((-2, -1), size, before, strict=True):
        have = y.shape[axis]
        at = torch.arange(n, device=y.device) - first
        inside = ((at >= 0) & (at < have)).view((-1, 1) if axis == -2 else (-1,))
        y = torch.where(inside, y.index_select(axis, at.clamp(0, have - 1)), 0)
    return y


def _cut(y: Tensor, size: tuple[int, int]) -> Tensor:
    """The first rows and columns; a copy for symbolic sizes, because asking if a view is dense would add a guard."""
    if not by_index(*size):
        return y[..., : size[0], : size[1]]
    for axis, n in zip((-2, -1), size, strict=True):
        y = y.index_select(axis, torch.arange(n, device=y.device))
    return y


def conv_transpose2d_plus(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    *,
    diagonal: bool,
    skip: Tensor | None = None,
    skip_offset: int = 0,
    output_size: tuple[int, int] | None = None,
) -> Tensor:
    """``bilinear_conv_transpose2d`` with any ``weight`` (C, C, K, K), in plain PyTorch.

    Args:
        x: (N, C, H, W) or (C, H, W).
        weight: of ``conv_transpose2d``.
        bias: (C,).
        stride: output pixels per input pixel.
        padding: output pixels cropped on each side.
        diagonal: True if no channel reads another, so that a grouped convolution is enough.
        skip: (N, C, SH, SW) or (C, SH, SW); its window of the output's size is added.
        skip_offset: first row and column of that window, in pixels.
        output_size: (OH, OW), in pixels.
    """
    groups = x.shape[1] if diagonal and x.dim() == 4 else 1
    if groups > 1:
        weight = weight.diagonal().permute(2, 0, 1)[:, None].contiguous()  # (C, 1, K, K)
    y = sized_conv_transpose2d(x, weight, stride, padding, groups, output_size)
    y = y if bias is None else y + bias.to(y.dtype)[:, None, None]
    return y if skip is None else y + window(skip, skip_offset, y.shape[-2:])
