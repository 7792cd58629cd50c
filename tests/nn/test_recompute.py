"""Chains of convolution, batch norm and activation keep one map a layer, and their gradients stay what they were."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu
from torch.utils.checkpoint import checkpoint

import fastseg
from benchmarks import harness
from fastseg.nn import ConvNormAct2d, MaxPool2d, MaxUnpool2d, SeparableConv2d, UpsamplingBilinear2d
from fastseg.nn.fuse.pooling import run_conv_norm_act_pool, run_unpool_conv_norm_act
from fastseg.nn.fuse.upsample_concat import upsample_concat
from fastseg.ops.core import recompute as _recompute
from fastseg.ops.core.dispatch import INTERPRETED

CHANNELS, SIDE = 8, 7
MAP = 2 * CHANNELS * SIDE * SIDE * 4  # bytes of a map of two images in fp32


class Chain(nn.Sequential):
    """Three layers and a convolution without a norm, as a net ends."""

    def __init__(self):
        layers = [ConvNormAct2d(CHANNELS, CHANNELS) for _ in range(3)]
        super().__init__(*layers, ConvNormAct2d(CHANNELS, CHANNELS, norm=False, act=None))


def gradients(net: nn.Module, run, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y))
    return [y.detach(), x.grad, *(p.grad.clone() for p in net.parameters())]


@pytest.fixture
def chain(device) -> tuple[Chain, Tensor]:
    x = torch.randn(2, CHANNELS, SIDE, SIDE, device=device)
    return Chain().to(device), x.contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="plain PyTorch keeps both maps: faster")
def test_one_map_a_layer(chain):
    """The image and each normed convolution's output; torch's modules keep each activated map too."""
    net, x = chain
    maps = lambda: harness.kept_bytes(lambda: net(x)) // MAP  # statistics are less than one
    x.requires_grad_()
    assert maps() == 1 + 3
    with fastseg.reference():
        assert maps() == 1 + 3 + 3


@pytest.mark.parametrize("around", ["nothing", "checkpoint", "save_on_cpu"])
def test_gradients_are_those_of_the_reference(chain, around):
    """Bit for bit those of kept maps: what is made again is the same; also through the hooks of others."""
    net, x = chain
    state = {key: value.clone() for key, value in net.state_dict().items()}
    run = (lambda x: checkpoint(net, x, use_reentrant=False)) if around == "checkpoint" else net
    with save_on_cpu() if around == "save_on_cpu" else nullcontext():
        got = gradients(net, run, x)
    net.load_state_dict(state)
    with fastseg.reference():
        want = gradients(net, net, x)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-4, atol=2e-4)


def test_a_map_that_was_written_to_is_kept(chain):
    """Its recipe would give what it was before."""
    net, x = chain
    y = net[0](x.requires_grad_())
    with torch.no_grad():
        y.mul_(2)
    weight = net[1].conv.weight
    (got,) = torch.autograd.grad(net[1](y).square().sum(), weight)
    with fastseg.reference():
        (want,) = torch.autograd.grad(net[1](y.detach()).square().sum(), weight)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="plain PyTorch keeps the map itself")
def test_a_source_that_is_written_to_after_the_forward_is_noticed(device):
    """No other backward keeps the pooled map: nobody but the recipe would see that it is no longer what it was."""
    x = torch.randn(2, CHANNELS, 8, 6, device=device).to(memory_format=torch.channels_last).requires_grad_()
    pooled, indices = MaxPool2d(2, 2, return_indices=True, index_format="compact")(x)
    last = ConvNormAct2d(CHANNELS, CHANNELS).to(device)
    y = run_unpool_conv_norm_act(pooled, indices, MaxUnpool2d(2, 2), x.shape[-2:], last.conv, last.norm, "relu")
    with torch.no_grad():
        pooled.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_where_hooks_are_disabled(chain):
    """Maps are kept, as everywhere."""
    net, x = chain
    want = gradients(net, net, x)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
    with disable_saved_tensors_hooks("none here"):
        got = gradients(net, net, x)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_second_use_of_a_map(chain):
    """A map that two convolutions and an addition take: each convolution makes it again, the addition needs none."""
    net, x = chain
    run = lambda x: (lambda y: net[1](y) + net[2](y) + y)(net[0](x))
    got = gradients(net, lambda x: net[3](run(x)), x)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
    with fastseg.reference():
        want = gradients(net, lambda x: net[3](run(x)), x)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-4, atol=2e-4)


class Pooled(nn.Module):
    """A stage down and up again with pooling indices, as SegNet."""

    def __init__(self):
        super().__init__()
        self.down, self.up, self.last = (ConvNormAct2d(CHANNELS, CHANNELS) for _ in range(3))
        self.pool = MaxPool2d(2, 2, ceil_mode=True, return_indices=True, index_format="compact")
        self.unpool = MaxUnpool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        y, indices = run_conv_norm_act_pool(y, self.up.conv, self.up.norm, "relu", self.pool)
        conv, norm = self.last.conv, self.last.norm
        return run_unpool_conv_norm_act(y, indices, self.unpool, x.shape[-2:], conv, norm, "relu")


class Skip(nn.Module):
    """A map beside its upsampled, smaller self, as U-Net."""

    def __init__(self, up: nn.Module):
        super().__init__()
        self.fine, self.coarse = ConvNormAct2d(CHANNELS, CHANNELS), ConvNormAct2d(CHANNELS, CHANNELS, stride=2)
        self.up, self.join = up, ConvNormAct2d(2 * CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        return self.join(upsample_concat(self.coarse(fine), [fine], self.up))


def separable() -> nn.Module:
    return nn.Sequential(ConvNormAct2d(CHANNELS, CHANNELS), SeparableConv2d(CHANNELS, CHANNELS))


NETS = {  # and how many maps of the first layer's size theirs have fewer than with all maps kept
    "separable": (separable, 1),
    "pooled": (Pooled, 1.75),  # the input of `up`; of the unpooled map the pooled one stays, a quarter
    "transposed": (lambda: Skip(nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, stride=2)), 2),
    "interpolated": (lambda: Skip(UpsamplingBilinear2d(scale_factor=2)), 3),
}


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="plain PyTorch keeps all maps: faster")
@pytest.mark.parametrize("name", NETS)
def test_maps_made_of_others(name, device, monkeypatch):
    """What is joined, unpooled or taken by a separable convolution is made again; the gradients are the same bits."""
    build, saved = NETS[name]
    net = build().to(device)
    twin = copy.deepcopy(net)
    x = torch.randn(2, CHANNELS, 8, 6, device=device).to(memory_format=torch.channels_last).requires_grad_()
    kept = harness.kept_bytes(lambda: net(x))
    got = gradients(net, net, x.detach())
    monkeypatch.setattr(_recompute, "recipe_of", lambda y: None)
    twin(x)  # for the statistics
    more = harness.kept_bytes(lambda: twin(x)) - kept
    twin.load_state_dict(net.state_dict())
    assert more >= saved * x.numel() * 4
    for a, b in zip(got, gradients(twin, twin, x.detach()), strict=True):
        assert torch.equal(a, b)
