"""Dtypes of accumulators and statistics, the precision of products, and output tensors."""

import torch
import triton.language as tl
from torch import Tensor

from fastseg.kernels.runtime.conv_sizes import Geometry


def acc_dtype(x: Tensor) -> tl.dtype:
    """Sums are fp32; fp64 for fp64 input, which only the interpreter runs (gradcheck)."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def stats_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums kept for maps like ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def precision(x: Tensor) -> str:
    """fp32 operands follow torch's switch for convolutions."""
    return "tf32" if x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32 else "ieee"


def empty_nhwc(x: Tensor, g: Geometry, channels: int) -> Tensor:
    """An output-sized map for x, channels innermost."""
    return x.new_empty(g.N, g.OH, g.OW, channels).permute(0, 3, 1, 2)
