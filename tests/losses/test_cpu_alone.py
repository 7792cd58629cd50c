"""Losses that stand alone on a CPU, in one walk, against torch's own lines at full size in float64."""

import pytest
import torch
from torch.nn import functional as F

from fastseg.losses import BinaryCrossEntropy, Focal
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.cpu import loss_alone
from fastseg.ops.cpu.cross_entropy_rows import Criterion, walk
from fastseg.ops.cpu.loss_alone import Alone


def in_torch(logits, target, loss):
    v = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=loss.align_corners)
    counts = (target != 255).to(v.dtype)
    y = target.masked_fill(target == 255, 0)
    if loss.softmax:
        losses = F.cross_entropy(v, y.long(), reduction="none")
        factor = counts if loss.pos is None else counts * loss.pos.to(v.dtype)[y.long()]
    else:
        y = y.to(v.dtype)
        losses = F.binary_cross_entropy_with_logits(v, y, reduction="none")
        one = torch.ones(v.shape[1])
        pos, neg = ((one if f is None else f).to(v.dtype)[:, None, None] for f in (loss.pos, loss.neg))
        factor = counts * (y * pos + (1 - y) * neg)
    total = ((1 - (-losses).exp()) ** loss.gamma * losses * factor).sum()
    return total / counts.sum() if loss.mean else total


@pytest.mark.parametrize("way", ["images", "one image", "strips"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize(("softmax", "classes"), [(True, 2), (True, 5), (False, 1), (False, 3)])
def test_value_and_gradient(softmax, classes, weighed, gamma, way, monkeypatch):
    monkeypatch.setattr(loss_alone, "BLOCK", {"images": 2**17, "one image": 40 * classes, "strips": 20}[way])
    logits = (3 * torch.randn(2, classes, 3, 4)).contiguous(memory_format=torch.channels_last).requires_grad_()
    size = (2, 7, 9) if softmax else (2, classes, 7, 9)
    target = torch.randint(classes if softmax else 2, size, dtype=torch.uint8)
    if weighed:
        target = target.masked_fill(torch.rand(size) < 0.2, 255)
    pos, neg = (torch.rand(classes) + 0.5 if weighed else None for _ in range(2))
    loss = Alone(softmax, gamma, pos, pos if softmax else neg, 255 if weighed else None, not weighed, weighed)
    value, wide = loss_alone.loss_alone(logits, target, loss), logits.detach().double().requires_grad_()
    want = in_torch(wide, target, loss)
    torch.testing.assert_close(value.double(), want, rtol=3e-6, atol=3e-6)
    (got,), (exact,) = torch.autograd.grad(3 * value, logits), torch.autograd.grad(3 * want, wide)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("softmax", [True, False])
def test_second_derivative(softmax):
    logits = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    target = torch.randint(2, (1, 4, 4) if softmax else (1, 3, 4, 4))
    loss = Alone(softmax, 2.0, torch.rand(3), torch.rand(3), None, True, False)
    assert torch.autograd.gradgradcheck(lambda x: loss_alone.loss_alone(x, target, loss), (logits,))


def test_sure_pixels():
    """No infinity times 0 where the loss underflows, nor a cancellation where it is small."""
    logits = torch.tensor([60.0, -60.0]).view(1, 2, 1, 1).requires_grad_()
    for gamma in (0.5, 2.0):
        for target, loss in (
            (torch.zeros(1, 4, 4, dtype=torch.uint8), Alone(True, gamma, None, None, None, True, False)),
            (
                torch.tensor([1, 0]).view(1, 2, 1, 1).expand(1, 2, 4, 4),
                Alone(False, gamma, None, None, None, True, False),
            ),
        ):
            value = loss_alone.loss_alone(logits, target, loss)
            assert 0 <= value < 1e-20
            assert torch.autograd.grad(value, logits)[0].abs().max() < 1e-20
    small = torch.tensor([12.0]).view(1, 1, 1, 1)
    value = loss_alone.loss_alone(small, torch.ones(1, 1, 4, 4), Alone(False, 0.0, None, None, None, True, False))
    torch.testing.assert_close(value, F.softplus(-small).squeeze(), rtol=1e-5, atol=0)


@pytest.mark.skipif(INTERPRETED, reason="there the kernels run")
@pytest.mark.parametrize("term", [Focal(1.5), Focal(activation="sigmoid", alpha=0.3), BinaryCrossEntropy()], ids=str)
def test_all_ignored(term):
    """NaN with a gradient of 0; a label that is no class is named."""
    logits, classes = torch.randn(1, 3, 2, 2, requires_grad=True), term.activation == "softmax"
    target = torch.full((1, 4, 4) if classes else (1, 3, 4, 4), 255)
    term.ignore_index = 255
    value = term(logits, target)
    assert value.isnan()
    assert not torch.autograd.grad(value, logits)[0].any()
    with pytest.raises(IndexError, match="7"):
        term(logits, torch.full_like(target, 7))


@pytest.mark.parametrize("options", [{}, {"ignore": 255}, {"weight": 1.0, "smoothing": 0.1, "ignore": 255}], ids=str)
def test_cross_entropy_of_two_classes_in_one_block(options):
    logits = (3 * torch.randn(2, 2, 3, 4)).requires_grad_()
    target = torch.randint(2, (2, 7, 9), dtype=torch.uint8)
    if "ignore" in options:
        target = target.masked_fill(torch.rand(target.shape) < 0.2, 255)
    weight = torch.tensor([0.4, 1.3]) if "weight" in options else None
    criterion = Criterion(options.get("ignore", -100), "mean", options.get("smoothing", 0.0), False)
    value = walk(logits, target, weight, criterion, torch.float32, at_once=True)
    want = F.cross_entropy(
        F.interpolate(logits, (7, 9), mode="bilinear"), target.long(), weight, ignore_index=criterion.ignore_index,
        label_smoothing=criterion.label_smoothing,
    )  # fmt: skip
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (value, want)), rtol=1e-4, atol=1e-6)
