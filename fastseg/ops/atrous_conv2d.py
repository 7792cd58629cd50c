"""Dilated convolution with padding that keeps the size, in plain PyTorch."""

from torch import Tensor
from torch.nn import functional as F


def atrous_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1, *, residual: Tensor | None = None
) -> Tensor:
    """``conv2d(x, weight, bias, padding="same", dilation=dilation) + residual``."""
    y = F.conv2d(x, weight, bias, padding=dilation * (weight.shape[-1] // 2), dilation=dilation)
    return y if residual is None else y + residual
