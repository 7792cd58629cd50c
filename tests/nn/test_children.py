"""fastseg.nn modules with other children than they were built with: torch's own, called one after another."""

import copy

import pytest
import torch
from nets import unsettle
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.nn import ASPP, ConvNormAct2d, SeparableConv2d
from fastseg.nn.fuse.sequential import Sequential
from fastseg.nn.fuse.watch import split_act

NORMS = {
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "identity": nn.Identity,
    "no statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "no affine": lambda: nn.BatchNorm2d(4, affine=False),
}


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


def conv_norm_act(m: nn.Module, x: Tensor) -> Tensor:
    return F.relu(m.norm(m.conv(x)))


def separable(m: nn.Module, x: Tensor) -> Tensor:
    return F.relu(m.post_norm(m.pointwise(F.relu(m.mid_norm(m.depthwise(x))))))


def aspp(m: nn.Module, x: Tensor) -> Tensor:
    maps = [branch(x).expand(-1, -1, *x.shape[2:]) for branch in m.convs]
    return m.project(torch.cat(maps, 1))


MODULES = {
    "ConvNormAct2d": (lambda: ConvNormAct2d(4, 4), conv_norm_act, ("norm",), ("conv",)),
    "SeparableConv2d": (
        lambda: SeparableConv2d(4, 4, mid_norm=True, mid_act="relu"),
        separable,
        ("mid_norm", "post_norm"),
        ("depthwise", "pointwise"),
    ),
    "ASPP": (
        lambda: ASPP(4, 4, (1, 2)),
        aspp,
        ("convs.0.1", "convs.2.1", "project.1"),
        ("convs.1.0", "convs.3.0", "convs.3.1", "convs.3.2", "project.0", "project"),
    ),
}


def compare(module: nn.Module, plain) -> None:
    """In training with gradients and statistics, then in evaluation with and without gradients."""
    twin, x = copy.deepcopy(module), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    for training, grad in ((True, True), (False, True), (False, False)):
        module.train(training), twin.train(training)
        with torch.set_grad_enabled(grad):
            got, want = module(x), plain(twin, x)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
            if grad:
                ours, theirs = (torch.autograd.grad(y.square().sum(), m.parameters())
                                for y, m in ((got, module), (want, twin)))  # fmt: skip
                torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(list(module.buffers()), list(twin.buffers()))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", MODULES)
def test_another_norm(name, norm):
    build, plain, places, _ = MODULES[name]
    for path in places:
        module = unsettle(build())
        module.set_submodule(path, NORMS[norm]().double())
        compare(module, plain)


@pytest.mark.parametrize("name", MODULES)
def test_a_wrapped_child(name):
    build, plain, _, places = MODULES[name]
    for path in places:
        module = unsettle(build())
        module.set_submodule(path, Doubled(module.get_submodule(path)))
        compare(module, plain)


def test_a_wrapped_convolution_without_a_norm():
    module = ConvNormAct2d(4, 4, norm=False).double()
    module.conv = Doubled(module.conv)
    compare(module, lambda m, x: F.relu(m.conv(x)))


def test_another_activation_and_another_pool():
    module = unsettle(ASPP(4, 4, (1, 2)))
    module.convs[1][2], module.project[2] = nn.SiLU(), nn.LeakyReLU(0.3)
    compare(module, aspp)
    block = unsettle(SeparableConv2d(4, 4, mid_norm=True, post_act="relu"))
    block.mid_act = nn.SiLU()  # a module where a name was
    compare(block, lambda m, x: F.relu(m.post_norm(m.pointwise(F.silu(m.mid_norm(m.depthwise(x)))))))
    module.convs[3][0] = nn.AdaptiveMaxPool2d((2, 3))

    def interpolated(m: nn.Module, x: Tensor) -> Tensor:
        *maps, pooled = (branch(x) for branch in m.convs)
        pooled = F.interpolate(pooled, x.shape[2:], mode="bilinear", align_corners=False)
        return m.project(torch.cat([*maps, pooled], 1))

    compare(module, interpolated)


def test_the_name_of_an_activation():
    own = nn.ReLU6()
    own.max_val = 5.0
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda *_: None)
    for module, name in ((nn.ReLU(), "relu"), (nn.ReLU(True), "relu"), (nn.ReLU6(), "relu6"),
                         (nn.LeakyReLU(), "leaky_relu")):  # fmt: skip
        assert split_act(module) == (name, None)
    for module in (own, hooked, nn.LeakyReLU(0.2), nn.SiLU(), nn.Identity()):
        assert split_act(module) == (None, module)
    assert split_act("relu") == ("relu", None) and split_act(None) == (None, None)


def test_a_kept_map_stays_as_it_was():
    """A hook on a norm keeps what it gave: the ReLU after it, though in place, does not write to it."""
    net, kept = Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).eval(), []
    net[1].register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.no_grad():
        y = net(torch.randn(1, 4, 3, 3))
    assert kept[0].min() < 0 and torch.equal(y, kept[0].relu())
