"""Count pairs of a target class and a predicted class."""

import torch
from torch import Tensor

_PIECE, _CPU_PIECE = 2**22, 2**18  # pixels that are counted together: their bins are int64


def no_pairs(C: int, device: torch.device) -> Tensor:
    """Counts of nothing: C x C pairs, then ignored pixels, then pixels whose target is no class."""
    return torch.zeros(C * C + 2, dtype=torch.int64, device=device)


def add_pairs(
    counts: Tensor, classes: Tensor, target: Tensor, C: int, ignore_index: int | None, *, followed: bool = False
) -> Tensor:
    """Add the pixels of an image to ``no_pairs``.

    Args:
        counts: (C * C + 2,); on a CPU they are added to in place.
        classes: predicted, of any integer dtype, 0 to C - 1.
        target: of any integer dtype, of as many pixels.
        C: number of classes.
        ignore_index: target value whose pixels are not counted.
        followed: whether a trace or a transform follows the tensors: then there is one piece and no look at values.

    Returns:
        The counts.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``; on a CPU that nothing follows.
    """
    seen = counts.device.type == "cpu" and not followed
    pred, true = classes.flatten(), target.flatten()
    piece = _CPU_PIECE if seen else _PIECE
    pieces = [(pred, true)] if followed else list(zip(pred.split(piece), true.split(piece), strict=True))
    for p, t in pieces:
        if seen and t.numel() > 0:
            least, most = (value.item() for value in t.aminmax())
            if least >= 0 and most < C and not (ignore_index is not None and least <= ignore_index <= most):
                bins = torch.add(p, t.long(), alpha=C) if C > 1 else t.long()
                counts[: C * C] += torch.bincount(bins, minlength=C * C)
                continue
        t = t.long()
        bins = torch.where((t < 0) | (t >= C), C * C + 1, t * C + p.long())
        if ignore_index is not None:
            bins = torch.where(t == ignore_index, C * C, bins)
        if seen:
            found = torch.bincount(bins, minlength=C * C + 2)
            if found[-1] > 0:
                raise IndexError(f"Target {int(t[bins == C * C + 1][0])} is out of bounds.")
            counts += found
        else:  # bincount would wait for the device
            counts = counts.scatter_add(0, bins, torch.ones_like(bins))
    return counts
