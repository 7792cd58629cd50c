"""fastseg: fused kernels, drop-in modules and models for semantic segmentation in PyTorch."""

from fastseg.ops._dispatch import explain, reference
from fastseg.ops._kept import frozen

__version__ = "0.1.0"
__all__ = ["explain", "frozen", "reference"]
