"""fastseg: fused kernels, drop-in modules and models for semantic segmentation in PyTorch."""

import importlib

from fastseg.ops.core.explain import explain, reference, unfused
from fastseg.ops.core.forms import force
from fastseg.ops.core.kept import frozen

__version__ = "0.1.0"
__all__ = [
    "conversion",
    "convert",
    "explain",
    "export",
    "force",
    "frozen",
    "optimize",
    "predict",
    "reference",
    "revert",
    "unfused",
    "warmup",
]

_PACKAGES = (
    "cli",
    "converting",
    "demo",
    "exporting",
    "inference",
    "io",
    "kernels",
    "losses",
    "measure",
    "metrics",
    "models",
    "nn",
    "ops",
    "optimizing",
    "testing",
    "training",
)
_FUNCTIONS = {
    "conversion": "converting",
    "convert": "converting",
    "export": "exporting.export",
    "optimize": "optimizing",
    "predict": "inference.final_resize",
    "revert": "converting",
    "warmup": "inference.warmup",
}


def __getattr__(name: str):
    """Import sub-packages on first use, so that ``import fastseg`` stays fast."""
    if name in _PACKAGES:
        return importlib.import_module(f"fastseg.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"fastseg.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module 'fastseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
