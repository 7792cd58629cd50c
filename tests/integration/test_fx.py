"""``torch.fx.symbolic_trace`` of nets with fastseg's modules and functions inside: one node each, as torch's own."""

import pickle
from collections.abc import Callable

import pytest
import torch
from nets import NARROW
from torch import nn

from fastseg import nn as fnn
from fastseg import ops
from fastseg.losses import CrossEntropy, Dice
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
    "UpsampleNearestConv2d": lambda: fnn.UpsampleNearestConv2d(4, 0, 4),
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
    terms = [(1.0, CrossEntropy()), (0.5, Dice())]  # objects, which no node of a graph holds: the module is the node
    check(Net(fnn.UpsampleLoss(terms), target="target"), 1, torch.randn(MAP), torch.randint(4, (2, 12, 16)))
    up = fnn.BilinearConvTranspose2d(4, 2)
    check(Net(up, skip="skip"), 1, torch.randn(MAP), torch.randn(2, 4, 12, 16))
    check(Net(fnn.BatchNormAct2d(4), residual="residual").eval(), 1, torch.randn(MAP), torch.randn(MAP))


@pytest.mark.parametrize("index_format", ["int64", "compact"])
def test_indices_pass_from_leaf_to_leaf(index_format):
    check(Unpooled(index_format), 2, torch.randn(MAP))


def test_every_module_is_looked_at():
    elsewhere = {
        "UpsampleLoss",
        "LinearFuse2d",
        "MaxUnpool1d",
        "MaxUnpool2d",
        "MaxUnpool3d",
        "ResizeConcatConv2d",
        "UpsampleCrossEntropyLoss",
        "bilinear_kernel",
    }
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


class Calls(nn.Module):
    """A user's net that calls a function on a map, its parameters and buffers."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function
        self.depthwise = nn.Parameter(torch.randn(4, 1, 3, 3))
        self.pointwise = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.full = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.wide = nn.Parameter(torch.randn(4, 8, 3, 3))
        self.project = nn.Parameter(torch.randn(4, 8, 1, 1))
        self.bias = nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    @property
    def norm(self) -> ops.BatchNormArgs:
        return ops.BatchNormArgs(self.mean, self.var, self.bias, self.bias)

    def forward(self, x):
        y = self.function(self, x + 1)
        return y * 2


def _halves(both):
    return both[0], both[1]


def _unpooled(net: Calls, x):
    values, indices = ops.max_pool2d(x, 2, return_indices=True, index_format="compact")
    return ops.max_unpool_conv2d(values, indices, net.full, net.bias, "relu")


FUNCTIONS = {
    "aspp": lambda net, x: ops.aspp(x, [net.pointwise, net.full], [1, 2], project_weight=net.project),
    "atrous_conv2d": lambda net, x: ops.atrous_conv2d(x, net.full, net.bias, dilation=2, act="relu", residual=x),
    "batch_norm_act": lambda net, x: ops.batch_norm_act(x, net.norm, "relu", x.neg()),
    "batch_norm_act_max_pool2d": lambda net, x: ops.batch_norm_act_max_pool2d(x, net.norm, kernel_size=3, stride=2),
    "bilinear_conv_transpose2d": lambda net, x: ops.bilinear_conv_transpose2d(x, 2, bias=net.bias),
    "masks_to_classes": lambda net, x: ops.masks_to_classes(x.flatten(2)[..., :4], x, scale_factor=2),
    "masks_to_queries": lambda net, x: ops.masks_to_queries(x[:, :, 0, 0], x, 9)[2],
    "max_pool1d": lambda net, x: ops.max_pool1d(x.flatten(2), 2),
    "max_pool2d": lambda net, x: ops.max_pool2d(x, kernel_size=2),
    "max_pool3d": lambda net, x: ops.max_pool3d(x[None], 2),
    "max_unpool1d": lambda net, x: ops.max_unpool1d(*_halves(ops.max_pool1d(x[0], 2, return_indices=True)), 2),
    "max_unpool2d": lambda net, x: ops.max_unpool2d(*_halves(ops.max_pool2d(x, 2, return_indices=True)), 2),
    "max_unpool3d": lambda net, x: ops.max_unpool3d(*_halves(ops.max_pool3d(x[None], 2, return_indices=True)), 2),
    "max_unpool_conv2d": _unpooled,
    "paste_masks": lambda net, x: ops.paste_masks(x[0, :, None, :3, :3], x[0, :, 0, :4], (9, 8)),
    "separable_conv2d": lambda net, x: ops.separable_conv2d(
        x, net.depthwise, net.pointwise, mid_norm=net.norm, mid_act="relu", residual=x
    ),
    "upsample_argmax": lambda net, x: ops.upsample_argmax(x, scale_factor=2),
    "resize_concat_conv2d": lambda net, x: ops.resize_concat_conv2d([x, x[:, :, ::2, ::2]], net.wide, size=x.shape[2:]),
    "upsample_trilinear": lambda net, x: ops.upsample_trilinear(x[:, :, None], (3, x.shape[2] + 3, x.shape[3] * 2)),
    "upsample_bilinear": lambda net, x: ops.upsample_bilinear(x.relu(), (x.shape[2] + 3, x.shape[3] * 2)),
    "upsample_concat": lambda net, x: ops.upsample_concat(x[:, :, ::2, ::2], [x, x.neg()]),
    "upsample_concat_conv2d": lambda net, x: ops.upsample_concat_conv2d(x[:, :, ::2, ::2], x, net.wide, act="relu"),
    "upsample_confidence": lambda net, x: ops.upsample_confidence(x, scale_factor=2)[1],
    "upsample_confusion": lambda net, x: ops.upsample_confusion(x, x[:, 0].abs().long() % 4, 4),
    "upsample_nearest_conv2d": lambda net, x: ops.upsample_nearest_conv2d(x, None, net.full, net.bias),
    "upsample_sum": lambda net, x: ops.upsample_sum(x, [x[:, :, ::2, ::2]], net.bias, act="relu"),
    "upsample_threshold": lambda net, x: ops.upsample_threshold(x[:, :1], scale_factor=2),
    "upsample_topk": lambda net, x: ops.upsample_topk(x, 2, scale_factor=2)[0],
    "upsample_cross_entropy": lambda net, x: ops.upsample_cross_entropy(x, x[:, 0].abs().long() % 4, net.bias.detach()),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_nodes(name):
    net = Calls(FUNCTIONS[name])
    traced = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(net)))
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called.count(getattr(ops, name)) == 1
    inside = [node.target for node in traced.graph.nodes if "fastseg::" in str(node.target)]
    assert not inside  # the registered ops stay behind it
    for size in (MAP, (1, 4, 8, 10)):
        x = torch.randn(size)
        torch.testing.assert_close(traced(x), net(x), rtol=0, atol=0)


def test_a_list_of_maps_is_looked_into():
    """The first argument need not be a stand-in."""
    deep = torch.randn(2, 4, 3, 4)
    net = Calls(lambda net, x: ops.upsample_concat(deep, [net.mean.new_zeros(2, 1, 6, 8), x]))
    traced = torch.fx.symbolic_trace(net)
    assert ops.upsample_concat in [node.target for node in traced.graph.nodes]
    x = torch.randn(MAP)
    torch.testing.assert_close(traced(x), net(x), rtol=0, atol=0)


def test_every_function_is_looked_at():
    of_torchs_own = {"bilinear_kernel", "compose_pointwise"}
    assert set(FUNCTIONS) | of_torchs_own | {"BatchNormArgs", "PoolIndices", "upsample_loss"} == set(ops.__all__)
