"""Any model's evaluation graph, with everything fused that fastseg knows how to fuse."""

from fastseg.optimizing.optimized import Optimized, optimize

__all__ = ["Optimized", "optimize"]
