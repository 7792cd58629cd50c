"""The class map of a mask classifier on a CPU, in blocks of rows: no map of queries or classes at full size."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastseg.ops.core.layout import channels_last
from fastseg.ops.core.upsample import Factors, along_x, neighbours
from fastseg.ops.cpu.argmax import rows_argmax
from fastseg.ops.cpu.threads import each
from fastseg.ops.cpu.upsampled_rows import BLOCK, Strip, strips_of


def classes_by_rows(
    p: Tensor, masks: Tensor, H: int, W: int, factors: Factors, align_corners: bool, dtype: torch.dtype
) -> Tensor:
    """The largest of ``sum_q p[q, k] sigmoid(m_q)`` with masks of the output's size.

    Args:
        p: (N, Q, K), in the dtype to compute in.
        masks: logits (N, Q, h, w).

    Returns:
        (N, H, W) of ``dtype``.
    """
    N, Q, K = p.shape
    weights = p.transpose(1, 2).contiguous()
    classes = torch.empty(N, H, W, dtype=dtype, device="cpu")

    def strip(part: Strip) -> None:
        n = part.image
        wide = along_x(masks[n, :, part.first : part.last].to(p.dtype), W, align_corners, factors[1])
        step = max(1, BLOCK // (max(Q, K) * W))
        for start in range(0, part.stop - part.start, step):
            rows = slice(start, min(start + step, part.stop - part.start))
            shares = torch.mm(part.matrix[rows], wide).sigmoid_().view(-1, Q, W)
            there = slice(part.start + rows.start, part.start + rows.stop)
            classes[n, there] = torch.matmul(weights[n], shares).max(1).indices

    each(strip, strips_of(masks.shape, H, W, align_corners, p.dtype, factors[0]))
    return classes


def classes_of_few(
    p: Tensor, masks: Tensor, H: int, W: int, factors: Factors, align_corners: bool, dtype: torch.dtype
) -> Tensor:
    """As ``classes_by_rows`` in torch's steps, with queries and classes innermost, which those steps are faster on."""
    masks = masks if masks.dtype == p.dtype else masks.to(p.dtype)
    if masks.shape[2] == H and masks.shape[3] == W:  # nothing to resize
        shares = masks.flatten(2).sigmoid().transpose(1, 2)
    else:
        lines = channels_last(masks)
        wide = torch.ops.aten.upsample_bilinear2d(lines, [H, W], align_corners, factors[0] or None, factors[1] or None)
        shares = wide.permute(0, 2, 3, 1).flatten(1, 2).sigmoid_()
    return torch.bmm(shares, p).max(2).indices.view(-1, H, W).to(dtype)


def classes_of_scores_by_rows(
    p: Tensor, masks: Tensor, at: tuple[int, int], H: int, W: int, align_corners: bool, dtype: torch.dtype
) -> Tensor:
    """The largest of scores that are summed at the size ``at`` and then interpolated to (H, W); else as above."""
    N, _, K = p.shape
    weights = p.transpose(1, 2).contiguous()
    shares = shares_at(masks, at, align_corners, p.dtype)
    scores = lambda n, low, stop: torch.matmul(weights[n], shares(n, low, stop)).transpose(0, 1)
    return rows_argmax(scores, (N, K, at[0]), H, W, (0.0, 0.0), align_corners, dtype, p.dtype)


def shares_at(
    masks: Tensor, at: tuple[int, int], align_corners: bool, kind: torch.dtype
) -> Callable[[int, int, int], Tensor]:
    """A function (image, first row, end) -> ``sigmoid`` of these rows of masks resized to ``at``: (rows, Q, at[1])."""
    if tuple(masks.shape[2:]) == at:
        return lambda n, low, stop: masks[n, :, low:stop].to(kind).transpose(0, 1).sigmoid()
    first, second, weight = neighbours(masks.shape[2], at[0], align_corners, kind)

    def shares(n: int, low: int, stop: int) -> Tensor:
        begin = int(first[low])
        m = along_x(masks[n, :, begin : int(second[stop - 1]) + 1].to(kind), at[1], align_corners)
        upper = m.index_select(0, first[low:stop] - begin)
        lower = m.index_select(0, second[low:stop] - begin)
        return upper.lerp_(lower, weight[low:stop, None]).sigmoid_().view(stop - low, -1, at[1])

    return shares
