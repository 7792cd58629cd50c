"""Nets of volumes: the paper's sizes and parameters, margins, gradients, and a block that keeps where maxima were."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastseg import models
from fastseg.models import SegNetBlock3d, UNet3d, create


def small(**options):
    torch.manual_seed(0)
    return create("unet3d", num_classes=3, in_channels=2, **{"widths": (4, 8), **options}).eval()


def test_the_papers_parameters_and_sizes():
    """arXiv:1606.06650: 132x132x116 voxels in, 44x44x28 out; 19069955 parameters.

    That is the number of weights, and of biases of 3x3x3 and 1x1x1 convolutions.
    """
    with torch.device("meta"):
        model = UNet3d(num_classes=3, in_channels=3)
        y = model(torch.empty(1, 3, 116, 132, 132))
    assert y.shape == (1, 3, 28, 44, 44) and model.margin == 44
    others = [p for m in model.modules() if isinstance(m, nn.BatchNorm3d) for p in m.parameters()]
    others += [m.bias for m in model.modules() if isinstance(m, nn.ConvTranspose3d)]
    weights = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in others)
    assert weights == 19069955


@pytest.mark.parametrize("options", [{}, {"up": "trilinear"}, {"norm": False}, {"widths": (4, 6, 8)}], ids=str)
def test_padded_nets_keep_the_size(options):
    model = small(padding="same", **options)
    x = torch.randn(1, 2, 7, 9, 6)
    y = model(x)
    assert y.shape == (1, 3, 7, 9, 6)
    assert torch.equal(model.predict(x).long(), y.argmax(1))
    target = torch.randint(3, (1, 7, 9, 6))
    torch.testing.assert_close(model.loss(x, target), F.cross_entropy(y, target))
    model.loss(x, target).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_valid_nets_are_the_middle_of_the_volume():
    """A voxel of the logits sees the same of the volume wherever the volume is cut, at multiples of the stride."""
    model = small()
    m = model.margin
    x = torch.randn(1, 2, 24, 20, 20)
    y = model(x)
    assert y.shape == (1, 3, 24 - 2 * m, 20 - 2 * m, 20 - 2 * m)
    torch.testing.assert_close(model(x[:, :, 2:22]), y[:, :, 2:-2], rtol=1e-4, atol=1e-5)
    target = torch.randint(3, (1, 24, 20, 20))
    want = F.cross_entropy(y, target[:, m:-m, m:-m, m:-m])
    torch.testing.assert_close(model.loss(x, target), want)
    torch.testing.assert_close(model.loss(x, target[:, m:-m, m:-m, m:-m]), want)


def test_keys_are_those_of_unet():
    ours, images = small(norm=True).state_dict(), models.UNet(3, 2, norm=True, widths=(4, 8)).state_dict()
    assert set(images) < set(ours)
    assert {key.rpartition(".")[2] for key in set(ours) - set(images)} == {"bias"}  # of convolutions before a norm


def test_names_and_errors():
    assert models.names(volumes=True) == ["unet3d"] and "unet3d" not in models.names()
    for options, says in (
        ({"padding": "x"}, "padding is 'x'"),
        ({"up": "x"}, "up is 'x'"),
        ({"widths": (3,)}, "widths"),
    ):
        with pytest.raises(ValueError, match=says):
            small(**options)
    with pytest.raises(ValueError, match=r"without padding a side is 18 \+ a multiple of 2: pad to 18x20x22"):
        small()(torch.zeros(1, 2, 7, 19, 22))
    with pytest.raises(ValueError, match=r"give \(N, in_channels, D, H, W\)"):
        small()(torch.zeros(1, 2, 20, 20))
    with pytest.raises(ValueError, match="a side of 2 voxels"):
        small(padding="same")(torch.zeros(1, 2, 1, 4, 4))
    with pytest.raises(ValueError, match="give them equal sides"):
        small(padding="same").loss(torch.zeros(1, 2, 4, 4, 4), torch.zeros(1, 5, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize("index_format", ["compact", "int64"])
def test_segnet_block_equals_torchs_modules(index_format):
    torch.manual_seed(0)
    inner = SegNetBlock3d(4, 6, 4, convs=1, index_format=index_format)
    block = SegNetBlock3d(2, 4, 3, inner, index_format=index_format).eval()
    x = torch.randn(1, 2, 5, 6, 7, requires_grad=True)

    def as_torch(block, x):
        x = block.encoder(x)
        pooled, indices = F.max_pool3d(x, 2, 2, ceil_mode=True, return_indices=True)
        within = as_torch(block.inner, pooled) if isinstance(block.inner, SegNetBlock3d) else pooled
        return block.decoder(nn.MaxUnpool3d(2, 2)(within, indices, output_size=x.shape[2:]))

    y, want = block(x), as_torch(block, x)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, dy)[0] for out in (y, want)))
    with pytest.raises(ValueError, match="convs is 0"):
        SegNetBlock3d(1, 2, 3, convs=0)
