"""Kernels and reference from one seed give the same losses, step by step; a gradient slightly off would show.

In fp64, where kernels compute in fp64 too: the first wrong digit is a mistake, not noise.
`benchmarks/studies/same_curve.py` shows the same in fp32.
"""

import numpy as np
import pytest
import torch

import fastseg
from benchmarks.studies import same_curve
from fastseg.models import create

STEPS, LR = 4, 0.1
TOLERANCE = 1e-12  # of the loss; less than 4e-16 was seen
BATCHES = same_curve.generated(STEPS, batch=1, size=(8, 32), classes=3, seed=0)


def _fresh():
    torch.manual_seed(0)
    return create("segnet_basic", 3, channels=4).double().to(memory_format=torch.channels_last)


def _apart(got, want):
    """The largest relative difference of two curves."""
    return np.max(np.abs(np.array(got) - want) / np.abs(want))


@pytest.fixture(scope="module")
def reference():
    with fastseg.reference():
        return same_curve.losses(_fresh(), BATCHES, LR)


@pytest.mark.skipif(not same_curve.INTERPRETED, reason="on a GPU kernels take no fp64")
def test_kernels_give_the_references_curve(reference):
    with fastseg.explain() as report:
        got = same_curve.losses(_fresh(), BATCHES, LR)
    assert {d.path for d in report} == {"triton"}
    assert {d.op for d in report} >= {"batch_norm_act_max_pool2d", "max_unpool2d", "upsample_cross_entropy"}
    assert _apart(got, reference) <= TOLERANCE
    assert reference[-1] < 0.9 * reference[0]


def test_a_rate_or_a_gradient_slightly_off_shows(reference):
    with fastseg.reference():
        assert _apart(same_curve.losses(_fresh(), BATCHES, LR * (1 + 1e-6)), reference) > 1e3 * TOLERANCE
        names = [name for name, _ in _fresh().named_parameters() if not name.endswith(".0.bias")]
        assert len(names) == 26  # the bias of a convolution before a norm has the gradient 0
        for name in names:
            model = _fresh()
            dict(model.named_parameters())[name].register_hook(lambda grad: grad * (1 + 1e-4))
            assert _apart(same_curve.losses(model, BATCHES, LR), reference) > 1e3 * TOLERANCE, name


def test_noise_is_what_roundings_grow_to():
    batches = same_curve.generated(8, batch=2, size=(16, 16), classes=3, seed=0)
    with fastseg.reference():
        curves, _ = same_curve.runs(lambda: _fresh().float(), batches, LR)
    found = same_curve.ratios(curves)
    assert found["fastseg"] == 0 and found["plain"] <= same_curve.FACTOR < found["lr + 1 %"]
    broken = {**curves, "fastseg": [*curves["reference"][:-1], curves["reference"][-1] * 1.001]}
    assert same_curve.ratios(broken)["fastseg"] > same_curve.FACTOR
