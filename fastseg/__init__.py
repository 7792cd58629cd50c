"""fastseg: fused kernels, drop-in modules and models for semantic segmentation in PyTorch."""

import importlib

from fastseg.ops.core.explain import explain, reference
from fastseg.ops.core.kept import frozen

__version__ = "0.1.0"
__all__ = ["explain", "frozen", "reference", "warmup"]

_PACKAGES = (
    "cli",
    "demo",
    "inference",
    "io",
    "kernels",
    "losses",
    "measure",
    "metrics",
    "models",
    "nn",
    "ops",
    "testing",
    "training",
)


def __getattr__(name: str):
    """Import sub-packages on first use, so that ``import fastseg`` stays fast."""
    if name in _PACKAGES:
        return importlib.import_module(f"fastseg.{name}")
    if name == "warmup":
        return importlib.import_module("fastseg.inference.warmup").warmup
    raise AttributeError(f"module 'fastseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
