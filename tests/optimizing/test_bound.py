"""A Runner's graph bound to packed weights gives what the model gives, keeps NaN, and stands aside for ``explain``."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastseg
from fastseg.inference import Runner
from fastseg.ops.cpu.onednn import why_not
from fastseg.optimizing.bound import Convolution, Winograd

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


class Net(nn.Module):
    """Every kind of call that is bound, and one that is not: far taps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.gate, self.wide, self.back = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1)
        self.far = nn.Conv2d(16, 16, 3, padding=6, dilation=6, groups=16)
        self.up, self.norm_up = nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        y = F.relu6(self.norm(self.stem(x)))
        z = F.silu(self.gate(y))
        z = y + self.back(F.gelu(self.wide(z * torch.sigmoid(z.mean((2, 3), keepdim=True)))))
        return self.head(F.relu(self.norm_up(self.up(F.hardswish(self.far(z))))))


@pytest.fixture(scope="module")
def model():
    net = Net().eval()
    with torch.no_grad():
        net.norm.running_mean.uniform_(-0.2, 0.2)
        net.norm_up.running_var.uniform_(0.5, 2)
    return net


def image(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def targets(runner):
    (bound,) = (made for _, made in runner._state.bound.values())
    return [node.target for node in bound.fused.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_gives_what_the_model_gives(model, layout):
    x = image(2, 3, 48, 48).to(memory_format=layout)  # more pixels than a product of matrices takes
    runner = Runner(model, x)
    with torch.no_grad():
        want = model(x)
    for _ in range(2):
        torch.testing.assert_close(runner(x), want, atol=1e-5, rtol=1e-4)
    assert torch.equal(runner.predict(x), runner(x).argmax(1))
    bound = [each for each in targets(runner) if isinstance(each, Convolution)]
    assert len(bound) == 7 and not any(each in (torch.ops.aten.relu_.default,) for each in targets(runner))
    assert sorted(each.run.after[0] for each in bound if hasattr(each.run, "after")) == [
        "gelu", "hardswish", "none", "none", "none", "swish"
    ]  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(model, value):
    x = image(1, 3, 24, 24)
    runner = Runner(model, x)
    x[0, 1, 11, 13] = value
    with torch.no_grad():
        assert torch.equal(runner(x).isnan(), model(x).isnan())


def test_far_taps_and_wide_filters_keep_their_forms():
    far = nn.Conv2d(32, 32, 3, padding=6, dilation=6, groups=32)
    net, x = (
        nn.Sequential(nn.Conv2d(3, 32, 1), far, nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()).eval(),
        image(1, 3, 64, 64),
    )
    runner = Runner(net, x)
    kinds = [type(each) for each in targets(runner)]
    assert kinds.count(Winograd) == 1 and kinds.count(Convolution) == 1 + (torch.get_num_threads() > 1)
    with torch.no_grad():
        torch.testing.assert_close(runner(x), net(x), atol=1e-4, rtol=1e-4)


def test_who_asks_sees_every_call(model):
    x = image(1, 3, 24, 24)
    runner = Runner(model, x)
    with fastseg.explain() as report:
        runner(x)
    assert [d.form for d in report if d.op == "conv2d_act"].count("packed") >= 1
    with fastseg.reference(), torch.no_grad():
        torch.testing.assert_close(runner(x), model(x), atol=1e-5, rtol=1e-4)


def test_half_precision_on_a_cpu(model):
    x = image(1, 3, 24, 40)
    runner = Runner(model, x, dtype=torch.bfloat16)
    with torch.no_grad():
        want = model(x)
    for got in (runner(x), runner(x)):
        assert got.dtype == torch.bfloat16 and (got.float() - want).norm() < 0.05 * want.norm()
    told = "torch.bfloat16 is not packed on this processor" in runner.explain()
    assert told == bool(why_not(torch.bfloat16)) and "not packed" not in Runner(model, x).explain()
