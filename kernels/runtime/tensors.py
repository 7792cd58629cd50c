"""Dtypes of accumulators and statistics, the precision of products, and output tensors."""

import torch
import triton.language as tl
from torch import Tensor

from fastseg.kernels.runtime.conv_sizes import Geometry
from fastseg.kernels.runtime.torch_private import conv_precision


def acc_dtype(x: Tensor) -> tl.dtype:
    """Sums are fp32; fp64 for fp64 input, which only the interpreter runs (gradcheck)."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def stats_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums kept for maps like ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def tf32(dtype: torch.dtype, device: torch.device | None = None) -> bool:
    """Whether products of ``dtype`` are rounded to tf32: fp32 where torch's switch for convolutions says so.

    ``allow_tf32``, torch's older name of the switch, raises once a newer one was set; the newer ones can always be
    read, and know of the older. Triton's tf32 on AMD is for MI300 alone. ``device``: None, the current one.
    """
    if dtype != torch.float32 or conv_precision("cuda", "conv") != "tf32":
        return False
    if not torch.version.hip:
        return True
    arch = amd_arch(device)
    return not arch or arch.startswith("gfx942")


def amd_arch(device: torch.device | None) -> str:
    """``gfx942:sramecc+:xnack-``; "" of other makers' chips."""
    if not torch.version.hip or (device is not None and device.type != "cuda"):
        return ""
    return torch.cuda.get_device_properties(device).gcnArchName


def precision(x: Tensor) -> str:
    """Of a kernel's products."""
    return "tf32" if tf32(x.dtype, x.device) else "ieee"


def empty_nhwc(x: Tensor, g: Geometry, channels: int) -> Tensor:
    """An output-sized map for x, channels innermost."""
    return x.new_empty(g.N, g.OH, g.OW, channels).permute(0, 3, 1, 2)
