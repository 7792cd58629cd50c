"""The modules of the fused heads against torch's two steps."""

import copy
import doctest
import pickle

import torch
from head_inputs import interpolate
from torch import nn

import fastseg
from fastseg.nn import loss as loss_module
from fastseg.nn import upsampling as upsampling_module
from fastseg.nn.loss import UpsampleCrossEntropyLoss
from fastseg.nn.upsampling import UpsampleArgmax


def test_argmax():
    logits = torch.randn(2, 5, 4, 6, requires_grad=True)
    full = interpolate(logits, True, (13, 17))
    assert torch.equal(UpsampleArgmax((13, 17), align_corners=True)(logits).long(), full.argmax(1))
    assert torch.equal(UpsampleArgmax(align_corners=True)(logits, (13, 17)).long(), full.argmax(1))
    assert torch.equal(
        UpsampleArgmax(scale_factor=2)(logits, (13, 17)).long(), interpolate(logits, False, (13, 17)).argmax(1)
    )
    twice = UpsampleArgmax(scale_factor=2)
    assert torch.equal(twice(logits, dtype=torch.int64), interpolate(logits, False, None, 2.0).argmax(1))
    assert repr(twice) == "UpsampleArgmax(scale_factor=2, align_corners=False)"
    assert repr(pickle.loads(pickle.dumps(twice))) == repr(twice)
    assert not twice.state_dict()


def test_cross_entropy():
    weight = torch.rand(3)
    options = {"ignore_index": 1, "reduction": "sum", "label_smoothing": 0.2}
    ours, torchs = (
        UpsampleCrossEntropyLoss(weight, align_corners=True, **options),
        nn.CrossEntropyLoss(weight, **options),
    )
    logits, target = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 9, 11), dtype=torch.uint8)
    for loss in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(loss(logits, target), torchs(interpolate(logits, True, (9, 11)), target.long()))
    assert ours.state_dict().keys() == torchs.state_dict().keys() == {"weight"}
    ours.load_state_dict(nn.CrossEntropyLoss(torch.ones(3)).state_dict())
    assert torch.equal(ours.weight, torch.ones(3))
    assert not UpsampleCrossEntropyLoss().state_dict()
    assert repr(UpsampleCrossEntropyLoss()) == "UpsampleCrossEntropyLoss(align_corners=False)"


def test_class_weights_follow_the_module_to_half():
    """A weight in another dtype than the logits is a factor all the same: torch refuses it."""
    loss = UpsampleCrossEntropyLoss(torch.tensor([0.5, 1, 2])).to(torch.bfloat16)
    logits, target = torch.randn(1, 3, 4, 5), torch.randint(3, (1, 8, 10))
    want = nn.CrossEntropyLoss(torch.tensor([0.5, 1, 2]))(interpolate(logits, False, (8, 10)), target)
    torch.testing.assert_close(loss(logits, target), want)


def test_docstrings_run():
    for module in (loss_module, upsampling_module):
        with fastseg.reference():
            results = doctest.testmod(module, extraglobs={"torch": torch})
        assert results.attempted and not results.failed
