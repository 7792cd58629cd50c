"""``torch.fx.symbolic_trace`` of nets with fastseg's modules inside: leaves, as torch's own, with equal values."""

import pytest
import torch
from nets import NARROW
from torch import nn

from fastseg import nn as fnn
from fastseg.models import create, names

MAP = (2, 4, 6, 8)


class Net(nn.Module):
    """A user's net: arithmetic and a torch module around ``inner``, which may take a second map by name."""

    def __init__(self, inner: nn.Module, **names: str):
        super().__init__()
        self.before, self.inner, self.names = nn.Conv2d(4, 4, 1), inner, names

    def forward(self, x, other=None):
        x = self.before(x) + 1
        y = self.inner(x, **dict.fromkeys(self.names, other))
        return y[0] * 2 if isinstance(self.inner, (fnn.MaxPool2d, fnn.MaxPool3d)) else y * 2


class Unpooled(nn.Module):
    def __init__(self, index_format: str):
        super().__init__()
        self.pool = fnn.MaxPool2d(2, return_indices=True, index_format=index_format)
        self.unpool = fnn.MaxUnpool2d(2)

    def forward(self, x):
        values, indices = self.pool(x)
        return self.unpool(values.relu(), indices) - x


MODULES = {
    "ASPP": lambda: fnn.ASPP(4, 4, (1, 2)),
    "BatchNormAct2d": lambda: fnn.BatchNormAct2d(4),
    "BilinearConvTranspose2d": lambda: fnn.BilinearConvTranspose2d(4, 2),
    "ConvNormAct2d": lambda: fnn.ConvNormAct2d(4, 4),
    "MaxPool1d": lambda: nn.Sequential(nn.Flatten(2), fnn.MaxPool1d(2)),
    "MaxPool2d": lambda: fnn.MaxPool2d(2, return_indices=True),
    "MaxPool3d": lambda: fnn.MaxPool3d(2, return_indices=True),
    "SeparableConv2d": lambda: fnn.SeparableConv2d(4, 4, mid_norm=True, mid_act="relu"),
    "SyncBatchNorm": lambda: fnn.SyncBatchNorm(4),
    "Upsample": lambda: fnn.Upsample(scale_factor=2, mode="bilinear"),
    "UpsampleArgmax": lambda: fnn.UpsampleArgmax(scale_factor=2),
    "UpsamplingBilinear2d": lambda: fnn.UpsamplingBilinear2d(scale_factor=2),
    "UpsamplingNearest2d": lambda: fnn.UpsamplingNearest2d(scale_factor=2),
}


def check(net: nn.Module, count: int, *maps: torch.Tensor) -> None:
    """That the traced net calls so many of our modules, inside ours none, and equals it on further inputs."""
    traced = torch.fx.symbolic_trace(net)
    ours = [node for node in traced.graph.nodes if node.op == "call_module"
            and type(net.get_submodule(node.target)).__module__.startswith("fastseg")]  # fmt: skip
    assert len(ours) == count
    with torch.no_grad():
        torch.testing.assert_close(traced(*maps), net(*maps), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_leaves(name):
    check(Net(MODULES[name]()).eval(), 1, torch.randn(MAP))


def test_second_maps():
    loss = fnn.UpsampleCrossEntropyLoss()
    check(Net(loss, target="target"), 1, torch.randn(MAP), torch.randint(4, (2, 12, 16)))
    up = fnn.BilinearConvTranspose2d(4, 2)
    check(Net(up, skip="skip"), 1, torch.randn(MAP), torch.randn(2, 4, 12, 16))
    check(Net(fnn.BatchNormAct2d(4), residual="residual").eval(), 1, torch.randn(MAP), torch.randn(MAP))


@pytest.mark.parametrize("index_format", ["int64", "compact"])
def test_indices_pass_from_leaf_to_leaf(index_format):
    check(Unpooled(index_format), 2, torch.randn(MAP))


def test_every_module_is_looked_at():
    elsewhere = {"MaxUnpool1d", "MaxUnpool2d", "MaxUnpool3d", "UpsampleCrossEntropyLoss", "bilinear_kernel"}
    assert set(MODULES) | elsewhere == set(fnn.__all__)
    unpools = {fnn.MaxUnpool1d.forward, fnn.MaxUnpool3d.forward}
    assert unpools == {fnn.MaxUnpool2d.forward}


@pytest.mark.parametrize("name", names())
def test_models_are_leaves(name):
    class Cropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = create(name, 3, **NARROW[name])

        def forward(self, x):
            return self.model(x - 0.5).softmax(1)

    net = Cropped().eval()
    traced = torch.fx.symbolic_trace(net)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["model"]
