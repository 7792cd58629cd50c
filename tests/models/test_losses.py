"""Losses of the models, with terms of ``fastseg.losses``: those of their full-size logits."""

import pytest
import torch

import fastseg
from fastseg.losses import CrossEntropy, Dice
from fastseg.models import create
from fastseg.models.deep_supervision import DeepSupervision
from fastseg.ops import upsample_loss

TERMS = [(1.0, CrossEntropy()), (0.5, Dice())]
OPTIONS = {"terms": TERMS, "ignore_index": 255}


@pytest.fixture(autouse=True)
def _reference():
    with fastseg.reference():  # the interpreter would take minutes
        yield


def inputs(side=64):
    target = torch.randint(3, (2, side, side))
    target[:, :7] = 255
    return torch.randn(2, 3, side, side), target


@pytest.mark.parametrize(("name", "options"), [
    ("deeplabv3plus", {"width": 0.1, "decoder_channels": 16}),
    ("unet", {"padding": "same", "widths": (4, 8)}),
    ("fcn", {"backbone": "resnet18"}),
    ("unetplusplus", {"widths": (4, 8, 8)}),
], ids=str)  # fmt: skip
def test_loss_and_confidence(name, options):
    """Of FCN too, whose scores a transposed convolution upsamples: what it leaves out does not count."""
    model, (x, target) = create(name, 3, **options).eval(), inputs()
    full = model(x)
    torch.testing.assert_close(model.loss(x, target, **OPTIONS), upsample_loss(full, target, TERMS, ignore_index=255))
    classes, sure = model.predict(x, confidence=True)
    assert torch.equal(classes, model.predict(x))
    torch.testing.assert_close(sure, full.softmax(1).amax(1), rtol=1e-4, atol=1e-4)


def test_heads_of_unetplusplus():
    """Weights that fade go through one call; the gradient reaches each head."""
    model, (x, target) = create("unetplusplus", 3, widths=(4, 8, 8), dropout=0.0, deep_supervision=True), inputs(16)
    heads = model(x)
    weights = [0.5, 1.0]
    loss = model.loss(x, target, weights=weights, **OPTIONS)
    want = sum(w * upsample_loss(y, target, TERMS, ignore_index=255) for w, y in zip(weights, heads, strict=True))
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(model.loss(x, target, **OPTIONS), sum(
        upsample_loss(y, target, TERMS, ignore_index=255) for y in heads) / 2)  # fmt: skip


def test_heads_of_deep_supervision():
    """Heads of other resolutions, with the labels once."""
    net = create("unet", 3, padding="same", widths=(4, 8, 8))
    model, (x, target) = DeepSupervision(net, at=[1, 2], weights=[0.5, 0.25]), inputs(32)
    *heads, last = model(x)
    parts = [upsample_loss(y, target, TERMS, ignore_index=255) for y in (*heads, last)]
    loss = model.loss(x, target, **OPTIONS)
    torch.testing.assert_close(loss, 0.5 * parts[0] + 0.25 * parts[1] + parts[2])
    loss.backward()
    assert all(head.weight.grad.abs().max() > 0 for head in model.heads)
