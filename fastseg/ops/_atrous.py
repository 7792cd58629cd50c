"""Dilated convolutions of one map side by side, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops._batch_norm import Activation, activate


def atrous_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    dilations: Sequence[int],
    act: Activation | None,
) -> Tensor:
    """``cat([act(conv2d(x, w, b, padding="same", dilation=d)), ...], 1)``."""
    maps = []
    for i, (weight, dilation) in enumerate(zip(weights, dilations, strict=True)):
        padding = dilation * (weight.shape[-1] // 2)
        y = F.conv2d(x, weight, None if biases is None else biases[i], padding=padding, dilation=dilation)
        maps.append(activate(y, act, inplace=True))
    return torch.cat(maps, 1)
