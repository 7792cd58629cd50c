"""Bilinearly upsampled maps of few pixels, added to a map on a CPU by one product of matrices.

A map of k pixels upsampled to n is a product with a matrix (n, k). The pixels of all maps make the columns of one, so
that ``base += P m`` reads and writes the base once; torch writes every upsampled map and adds it, in three passes each.
A PSP module's maps of 1, 4, 9 and 36 pixels at 512 channels and 32x32 take 0.7 ms, torch 3.1, on one thread of an AVX2
processor, and 0.9 and 5.5 on two. A single map of 16 pixels takes as long either way, of 4 half.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg.ops.core.constants import constant
from fastseg.ops.core.dispatch import followed, kernels_run, needs_grad
from fastseg.ops.core.upsample import is_finite, matrix_along

MOST_PIXELS = 36  # of a map
_LEAST = 2**15  # elements of the base: below, torch's passes take less than the calls here
_KEPT_PIXELS = 2**12  # of an output up to which its matrix, some 0.8 MB, is kept: it depends on sizes alone


def few_pixels(base: Tensor, maps: Sequence[Tensor]) -> list[bool]:
    """Which maps (N, C, h_i, w_i) ``add_few_pixels`` takes beside a base (N, C, H, W); none under a trace,
    and none where kernels run.

    A product would spread NaN and infinity, which an interpolation leaves where they are.
    """
    tensors = (base, *maps)
    if kernels_run(base) or base.dtype not in (torch.float32, torch.float64) or followed(*tensors):
        return [False] * len(maps)
    if (
        not base.is_cpu
        or base.numel() < _LEAST
        or needs_grad(*tensors)
        or not base.is_contiguous(memory_format=torch.channels_last)
    ):
        return [False] * len(maps)
    small = [m.shape[2] * m.shape[3] <= MOST_PIXELS and m.dtype == base.dtype for m in maps]
    return [taken and is_finite(m) for taken, m in zip(small, maps, strict=True)]


def add_few_pixels(base: Tensor, maps: Sequence[Tensor], weight: Tensor, align_corners: bool) -> Tensor:
    """``base + sum of interpolate(conv2d(m, w), base.shape[2:], mode="bilinear", ...)``, in place; 1x1 filters.

    Args:
        base: (N, COUT, H, W), dense in channels_last.
        maps: (N, C_i, h_i, w_i) each.
        weight: (COUT, sum of C_i), the filters of all maps.
    """
    N, COUT, H, W = base.shape
    lows = tuple((m.shape[2], m.shape[3]) for m in maps)
    matrix = (_kept_matrix if H * W <= _KEPT_PIXELS else _matrix)(lows, H, W, align_corners, base.dtype)
    # One product for all maps, most of its factors zeros: each product by itself would wake all threads.
    blocks = base.new_zeros(N, matrix.shape[1], weight.shape[1])
    row = column = 0
    for m in maps:
        pixels = m.flatten(2).transpose(1, 2)
        blocks[:, row : row + pixels.shape[1], column : column + pixels.shape[2]] = pixels
        row, column = row + pixels.shape[1], column + pixels.shape[2]
    small = torch.mm(blocks.flatten(0, 1), weight.t()).view(N, -1, COUT)
    base.permute(0, 2, 3, 1).view(N, H * W, COUT).baddbmm_(matrix.expand(N, -1, -1), small)
    return base


def _matrix(lows: tuple[tuple[int, int], ...], H: int, W: int, align_corners: bool, dtype: torch.dtype) -> Tensor:
    """(H W, pixels of all maps)."""
    columns = []
    for h, w in lows:
        rows, across = matrix_along(h, H, align_corners, dtype), matrix_along(w, W, align_corners, dtype)
        columns.append((rows[:, None, :, None] * across[:, None]).view(H * W, h * w))
    return torch.cat(columns, 1)


_kept_matrix = constant(maxsize=16)(_matrix)
