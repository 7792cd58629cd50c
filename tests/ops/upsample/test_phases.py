"""Bilinear resizes by whole factors, phase by phase: torch's values, and torch itself where a blend would differ."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastseg.inference import Runner
from fastseg.ops.cpu.onednn import why_not
from fastseg.ops.cpu.phases import Phases, pays


def image(*shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "shape, size",
    [((1, 5, 6, 7), (12, 14)), ((2, 3, 5, 4), (15, 32)), ((1, 2, 1, 3), (8, 9)), ((1, 21, 4, 4), (20, 8))],
)
def test_it_gives_torchs_values(shape, size):
    x = image(*shape)
    y = Phases(size)(x)
    torch.testing.assert_close(y, F.interpolate(x, size, mode="bilinear"))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_what_a_blend_would_change_goes_to_torch(value):
    x = image(1, 5, 6, 6)
    x[0, 1, 2, 3], x[0, 1, 2, 4] = value, -value
    assert torch.equal(Phases((12, 12))(x).nan_to_num(7), F.interpolate(x, (12, 12), mode="bilinear").nan_to_num(7))


def test_what_it_takes():
    x = image(1, 21, 64, 64)
    assert pays(x, (512, 512), False)
    assert not pays(x, (512, 512), True)  # other positions
    assert not pays(x, (512, 500), False)  # no whole factor
    assert not pays(x, (64, 512), False)
    assert not pays(x.contiguous(), (512, 512), False)
    assert not pays(x.double(), (512, 512), False)
    assert not pays(image(1, 24, 64, 64), (512, 512), False)  # torch takes eight channels at a time
    assert not pays(image(1, 21, 8, 8), (16, 16), False)
    assert not pays(image(1, 21, 128, 128), (256, 256), False)  # few rows for the same work
    assert pays(image(1, 2, 64, 64), (256, 256), False)


class Head(nn.Module):
    def __init__(self, **target):
        super().__init__()
        self.conv, self.target = nn.Conv2d(3, 21, 3, 8, 1), target

    def forward(self, x):
        return F.interpolate(self.conv(x), **self.target, mode="bilinear")


@pytest.mark.skipif(bool(why_not()), reason=why_not())
@pytest.mark.parametrize("target, bound", [({"size": (96, 96)}, True), ({"scale_factor": 8.0}, True),
                                           ({"scale_factor": 8.03}, False)])  # fmt: skip
def test_a_runner_takes_it_where_positions_follow_from_the_sizes(target, bound):
    model, x = Head(**target).eval(), torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    runner = Runner(model, x)
    with torch.no_grad():
        torch.testing.assert_close(runner(x), model(x), atol=1e-5, rtol=1e-4)
    (graph,) = (made.fused.graph for _, made in runner._state.bound.values())
    assert any(isinstance(node.target, Phases) for node in graph.nodes) == bound
