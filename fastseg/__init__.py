"""fastseg: fused kernels, drop-in modules and models for semantic segmentation in PyTorch."""

__version__ = "0.1.0"
