"""The losses are tried on the forms that a CPU takes; ``tests/ops/upsample/test_loss_sums.py`` has the kernels."""

import functools
import importlib.util
import sys

import pytest
import torch
from library_losses import Wide

from fastseg.ops.core import dispatch


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)  # the interpreter would take minutes


@pytest.fixture
def wide(monkeypatch):
    """The libraries' own lines in float64 throughout: some cast to float32 on the way."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    if importlib.util.find_spec("nnunetv2") is not None:
        import nnunetv2.training.loss.dice as dice

        monkeypatch.setattr(dice, "torch", Wide())
    if importlib.util.find_spec("monai") is not None:
        from monai.losses import dice, focal_loss, tversky
        from monai.networks import one_hot

        double = functools.partial(one_hot, dtype=torch.float64)
        for module in (dice, focal_loss, tversky):
            monkeypatch.setattr(module, "one_hot", double)
    if "ultralytics_losses" in sys.modules:
        monkeypatch.setattr(sys.modules["ultralytics_losses"], "torch", Wide())
