"""The query that owns each pixel, and the areas of all queries, on a CPU in blocks of rows."""

import torch
from torch import Tensor

from fastseg.ops.core.upsample import along_x
from fastseg.ops.cpu.masks_to_classes import shares_at
from fastseg.ops.cpu.threads import each
from fastseg.ops.cpu.upsampled_rows import BLOCK, Strip, strips_of


def queries_by_rows(
    scores: Tensor, masks: Tensor, at: tuple[int, int] | None, H: int, W: int, align_corners: bool, threshold: float,
    weighted: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As ``masks_to_queries``: scores (N, Q), in the dtype to compute in."""
    N, Q = scores.shape
    kind = scores.dtype
    rows_at = None if at is None else shares_at(masks, at, align_corners, kind)
    queries = torch.empty(N, H, W, dtype=dtype, device="cpu")
    inside = torch.empty(N, H, W, dtype=torch.bool, device="cpu")
    strips = strips_of((N, Q, *(at or masks.shape[2:])), H, W, align_corners, kind)
    # Made before the walk: what a strip would leave behind pins the memory that it freed, and the heap grows with each.
    areas = torch.zeros(len(strips), Q, dtype=torch.int64, device="cpu")

    def strip(numbered: tuple[int, Strip]) -> None:
        i, part = numbered
        n = part.image
        if rows_at is None:
            low = masks[n, :, part.first : part.last].to(kind)
        else:
            low = rows_at(n, part.first, part.last).transpose(0, 1)
        wide = along_x(low, W, align_corners)
        step = max(1, BLOCK // (Q * W))
        for start in range(0, part.stop - part.start, step):
            rows = slice(start, min(start + step, part.stop - part.start))
            shares = torch.mm(part.matrix[rows], wide).view(-1, Q, W)
            shares = shares.sigmoid_() if rows_at is None else shares
            weights = (Tensor.mul_ if weighted else Tensor.mul)(shares, scores[n, :, None])
            largest, owner = weights.max(1)
            if not weighted:
                largest = shares.gather(1, owner[:, None])[:, 0]
            areas[i] += ((weights if weighted else shares) >= threshold).sum((0, 2))
            there = slice(part.start + rows.start, part.start + rows.stop)
            queries[n, there], inside[n, there] = owner, largest >= threshold

    each(strip, list(enumerate(strips)))
    return queries, inside, areas.view(N, len(strips) // max(N, 1), Q).sum(1)
