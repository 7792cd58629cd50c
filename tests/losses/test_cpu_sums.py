"""Sums on a CPU in every way there is, against torch's own steps at full size in float64."""

import pytest
import torch

import fastseg
from fastseg.ops.core.loss_columns import KINDS, SIGMOID, SOFTMAX, Column, Sums
from fastseg.ops.cpu import loss_planes, loss_sums
from fastseg.ops.upsample_loss_sums import upsample_loss_sums, upsample_loss_sums_ref


@pytest.fixture(autouse=True)
def _reference():
    """In place of the one beside it: the forms of a CPU, whether kernels are interpreted or not."""
    with fastseg.force("upsample_loss_sums", "walk"):
        yield


@pytest.mark.parametrize("way", ["products", "torch's op", "rows"])
@pytest.mark.parametrize("form", ["ignored", "weighed", "plain", "each"])
@pytest.mark.parametrize("classes", [1, 2, 3, 9])
@pytest.mark.parametrize("activation", [SOFTMAX, SIGMOID])
def test_every_column(activation, classes, form, way, monkeypatch):
    if way == "torch's op":
        monkeypatch.setattr(loss_planes, "_FORWARD", 0)
        monkeypatch.setattr(loss_planes, "_BACKWARD", 0)
    for name, least in (("_LEAST", 2**62), ("_PLANE", 2**62), ("_MANY", 5)):
        monkeypatch.setattr(loss_sums, name, 0 if way == "rows" else least)
    focal = ("focal", "focal_pos", "focal_neg")
    columns = tuple(Column(kind, 1.5 if kind in focal else 0.0) for kind in KINDS[activation])
    logits = (3 * torch.randn(2, classes, 3, 4)).contiguous(memory_format=torch.channels_last).requires_grad_()
    if classes == 1 and activation == SOFTMAX:  # labels of each class would be class indices
        target = torch.zeros(2, 7, 9, dtype=torch.int64)
    elif form == "each" or classes == 1:
        target = torch.randint(2, (2, classes, 7, 9))
    else:
        target = torch.randint(classes, (2, 7, 9), dtype=torch.uint8)
    target = target.masked_fill(torch.rand(target.shape) < 0.2, 255) if form in ("ignored", "each") else target
    weight = torch.rand(2, 7, 9) if form == "weighed" else None
    got = upsample_loss_sums(logits, target, columns, activation, ignore_index=255, pixel_weight=weight)
    wide = logits.detach().double().requires_grad_()
    weight = None if weight is None else weight.double()
    want = upsample_loss_sums_ref(wide, target, Sums(columns, activation, 255, False), weight)
    torch.testing.assert_close(got, want, rtol=3e-6, atol=3e-6)
    seed = torch.randn_like(want)
    slopes = [torch.autograd.grad(sums, x, seed)[0] for sums, x in ((got, logits), (want, wide))]
    torch.testing.assert_close(slopes[0].double(), slopes[1], rtol=1e-4, atol=1e-4)
    assert slopes[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("least", [0, 2**62])
@pytest.mark.parametrize(("activation", "kind"), [(a, k) for a in KINDS for k in KINDS[a]])
def test_one_column(activation, kind, least, monkeypatch):
    """Each asks for what it needs, of labels of each class."""
    for name in ("_LEAST", "_PLANE", "_MANY"):
        monkeypatch.setattr(loss_sums, name, least)
    columns, logits, target = (Column(kind, 2.0),), torch.randn(1, 3, 2, 3).double(), torch.randint(2, (1, 3, 4, 5))
    got = upsample_loss_sums(logits, target, columns, activation)
    torch.testing.assert_close(got, upsample_loss_sums_ref(logits, target, Sums(columns, activation, -100, False)))
