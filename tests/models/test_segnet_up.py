"""SegNet and SegNet-Basic that interpolate, or learn to upsample, in place of unpooling."""

import pytest
import torch
from nets import unsettle
from torch import Tensor, nn
from torch.nn import functional as F

import fastseg
from fastseg.models import SegNet, SegNetBasic, create

NARROW = {SegNet: {"width": 0.02}, SegNetBasic: {"channels": 8}}
BOTH = pytest.mark.parametrize("net", [SegNet, SegNetBasic])
UPS = pytest.mark.parametrize("up", ["bilinear", "transpose"])


def plain(model: nn.Module, x: Tensor) -> Tensor:
    """In training, from the parameters of ``model``, with torch.nn.functional alone."""
    deep = isinstance(model, SegNet)

    def layer(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, relu: bool) -> Tensor:
        y = F.conv2d(x, conv.weight, conv.bias, padding=1 if deep else 3)
        y = F.batch_norm(y, None, None, norm.weight, norm.bias, True)
        return F.relu(y) if relu else y

    x = x if deep else F.local_response_norm(x, 5, 1e-4, 0.75)
    sizes = []
    for stage in model.encoder.stages() if deep else [[tuple(stage)] for stage in model.encoder]:
        for conv, norm in stage:
            x = layer(x, conv, norm, True)
        sizes.append(x.shape[2:])
        x = F.max_pool2d(x, 2, 2, ceil_mode=True)
    for i, stage in enumerate(model.decoder):
        size = sizes.pop()
        if model.up == "bilinear":
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        else:
            deconv = model.rise[i].deconv
            x = F.conv_transpose2d(x, deconv.weight, deconv.bias, stride=2)[:, :, : size[0], : size[1]]
        for k in range(0, len(stage), 3):
            x = layer(x, stage[k], stage[k + 1], deep)
    return F.conv2d(x, model.classifier.weight, model.classifier.bias, padding=1 if deep else 0)


@BOTH
@UPS
def test_equals_plain_pytorch(net, up, device):
    """Logits and gradients in fp64 on 13x18, whose halves are odd."""
    model = unsettle(net(4, up=up, **NARROW[net])).to(device)
    x = torch.randn(2, 3, 13, 18, dtype=torch.float64, device=device)
    want = plain(model, x)
    upstream, learnt = torch.randn_like(want), list(model.parameters())
    with fastseg.explain() as report:
        got = model(x)
    assert not {"max_unpool2d", "max_unpool_conv2d"} & {decision.op for decision in report}
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    ours, theirs = (torch.autograd.grad(y, learnt, upstream) for y in (got, want))
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8 * float(upstream.norm()), msg=name)


@BOTH
@UPS
def test_evaluation_folds_the_norms_and_keeps_every_pixel(net, up):
    model = unsettle(net(3, up=up, **NARROW[net])).eval()
    with fastseg.reference():
        for size in ((1, 1), (7, 33), (32, 32)):
            x = torch.randn(1, 3, *size, dtype=torch.float64)
            folded = model(x)  # with gradients: not folded
            with torch.no_grad():
                torch.testing.assert_close(model(x), folded, rtol=1e-10, atol=1e-11)
            assert folded.shape == (1, 3, *size)


@BOTH
def test_parameters_are_those_of_unpooling_and_the_deconvolutions(net):
    with torch.device("meta"):
        default, *others = (net(11, **options) for options in ({}, {"up": "bilinear"}, {"up": "transpose"}))
    keys = [list(model.state_dict()) for model in (default, *others)]
    assert keys[0] == keys[1] == [key for key in keys[2] if not key.startswith("rise.")]
    widths = (512, 512, 256, 128, 64) if net is SegNet else (64,) * 4
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert count(others[0]) == count(default)
    assert count(others[1]) - count(default) == sum(4 * C * C + C for C in widths)


@BOTH
def test_the_default_is_as_before(net):
    """Same seed, same weights, with and without ``up``: nothing is drawn for what is not there."""
    torch.manual_seed(3)
    one = net(3, **NARROW[net])
    torch.manual_seed(3)
    two = net(3, up="bilinear", **NARROW[net])
    assert one.up == "unpool" and one.pool.return_indices and not two.pool.return_indices
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_bad_option():
    with pytest.raises(ValueError, match="SegNet: up is 'nearest'; use one of unpool, bilinear, transpose"):
        create("segnet", 2, up="nearest")
