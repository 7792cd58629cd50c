"""Skip connections: a coarse map upsampled and put beside finer ones."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def upsample_concat(
    x: Tensor, skips: Sequence[Tensor], up: nn.Module, *, crop: bool = False, up_first: bool = False
) -> Tensor:
    """``cat([*skips, up(x)], 1)``.

    Args:
        x: (N, C, H, W), the coarse map.
        skips: (N, *, SH, SW) each, finer maps of one size.
        up: doubles H and W.
        crop: cut the skips to the window in their middle that has the size of ``up(x)``, as the U-Net without padding;
            else ``up(x)`` gets zeros around it up to the size of the skips, whose odd sides were halved downwards.
        up_first: ``cat([up(x), *skips], 1)``.

    Returns:
        (N, sum of channels, OH, OW).
    """
    y = up(x)
    rows, columns = (skip - own for skip, own in zip(skips[0].shape[-2:], y.shape[-2:], strict=True))
    if crop:
        skips = [s[:, :, rows // 2 : rows // 2 + y.shape[2], columns // 2 : columns // 2 + y.shape[3]] for s in skips]
    elif rows or columns:
        y = F.pad(y, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    return torch.cat([y, *skips] if up_first else [*skips, y], 1)
