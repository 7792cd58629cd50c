"""Libraries that people's models come from, importable beside a torch without their compiled operators."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch

_held: list[torch.library.Library] = []


def foreign(name: str):
    """Import a library, or skip the test with the reason."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed: pip install fastseg-kernels[convert-test]")
    declare_operators()
    return importlib.import_module(name)


def declare_operators() -> None:
    """torchvision's wheel is built for CUDA: beside a CPU torch its operators must be declared before the import."""
    spec = importlib.util.find_spec("torchvision")
    if _held or spec is None or torch.version.cuda is not None:
        return
    folder = Path(spec.origin).parent
    if "+cu" not in (folder / "version.py").read_text():
        return  # another build, which loads its own
    _held.append(torch.library.Library("torchvision", "FRAGMENT"))
    for name in re.findall(r'register_fake\("torchvision::(\w+)"\)', (folder / "_meta_registrations.py").read_text()):
        _held[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
