"""``ignore_index`` that is a class: every model's loss and gradients are those of torch's cross entropy."""

import pytest
import torch
from nets import NARROW, unsettle
from torch.nn import functional as F

from fastseg import reference
from fastseg.models import create, names
from fastseg.nn import UpsampleCrossEntropyLoss

WEIGHT = (0.7, 1.3, 0.4)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weighted"])
@pytest.mark.parametrize("ignored", [0, 2])
def test_fused_loss(ignored, weight, device):
    """Value and gradient, with the kernels too; the target holds nothing but classes."""
    weight = None if weight is None else torch.tensor(weight, dtype=torch.float64, device=device)
    target = torch.randint(3, (2, 9, 7), device=device)
    target[0, :4] = ignored
    logits = torch.randn(2, 3, 5, 4, dtype=torch.float64, device=device, requires_grad=True)
    ours = UpsampleCrossEntropyLoss(weight=weight, ignore_index=ignored)(logits, target.to(torch.uint8))
    full = F.interpolate(logits, size=(9, 7), mode="bilinear")
    theirs = F.cross_entropy(full, target, weight, ignore_index=ignored)
    torch.testing.assert_close(ours, theirs)
    got, want = (torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", names())
def test_every_model(name):
    """In evaluation, where the loss is that of the logits alone."""
    model = unsettle(create(name, 3, **NARROW[name])).eval()
    x, target = torch.randn(1, 3, 24, 20, dtype=torch.float64), torch.randint(3, (1, 24, 20), dtype=torch.uint8)
    weight = torch.tensor(WEIGHT, dtype=torch.float64)
    with reference():
        loss = model.loss(x, target, ignore_index=0, weight=weight)
        want = F.cross_entropy(model(x), target.long(), weight, ignore_index=0)
    torch.testing.assert_close(loss, want)
