"""The losses of one class: 0 with a gradient of 0, and NaN where torch's is."""

import contextlib

import pytest
import torch
from torch.nn import functional as F

import fastseg
from fastseg.losses import CrossEntropy, TopK
from fastseg.ops import upsample_cross_entropy, upsample_loss

LOSSES = {
    "cross entropy": lambda logits, target: upsample_cross_entropy(logits, target),
    "sum": lambda logits, target: upsample_loss(logits, target, [(1.0, CrossEntropy())]),
    "top-k": lambda logits, target: upsample_loss(logits, target, [(1.0, TopK(0.9))]),
}


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "form"), [*((name, None) for name in LOSSES), ("cross entropy", "planes"), ("cross entropy", "rows")]
)
def test_a_nan_reaches_the_gradient(name, form, value):
    """One that hid a NaN would let training go on with it."""
    grads = []
    for run in (
        LOSSES[name],
        lambda logits, target: F.cross_entropy(F.interpolate(logits, (6, 8), mode="bilinear"), target),
    ):
        logits = torch.ones(1, 1, 3, 4)
        logits[0, 0, 1, 1] = value
        logits.requires_grad_()
        with contextlib.nullcontext() if form is None else fastseg.force("upsample_cross_entropy", form):
            run(logits, torch.zeros(1, 6, 8, dtype=torch.int64)).backward()
        grads.append(logits.grad)
    torch.testing.assert_close(grads[0], grads[1], equal_nan=True, atol=0, rtol=0)
