"""Volumes in cubes: a net without padding gives the result of the whole volume; one that pads is blended."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastseg.inference import overlap_tile
from fastseg.inference.tile_probe import tile_geometry
from fastseg.models import create


def valid_net():
    torch.manual_seed(0)
    return create("unet3d", num_classes=3, in_channels=2, widths=(2, 3)).eval()


class Local(nn.Module):
    """Reaches one voxel; pads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(1, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


class Position(nn.Module):
    """The logits are the volume itself: any weights that sum to one give it back."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 1, 1, 1))

    def forward(self, x):
        return x * self.weight


def test_margin_and_phase_are_found():
    geometry = tile_geometry(valid_net(), 20, 2, 3)
    assert (geometry.margin, geometry.phase, geometry.num_classes) == (8, 2, 3)
    deep = create("unet3d", num_classes=2, in_channels=1, padding="same", widths=(2, 2, 2)).eval()
    assert tile_geometry(deep, 8, 1, 3).phase == 4


@pytest.mark.parametrize("pad_mode", ["reflect", "constant", "replicate"])
def test_tiles_of_a_valid_net_equal_the_whole(pad_mode):
    model, volume = valid_net(), torch.randn(2, 2, 9, 11, 6)
    m = model.margin
    with torch.no_grad():
        # sides of the padded volume must be -4 modulo 2: even
        sides = [n + n % 2 for n in volume.shape[2:]]
        if pad_mode == "constant":
            padded = F.pad(volume, [m, m + sides[2] - 6, m, m + sides[1] - 11, m, m + sides[0] - 9])
        else:
            widths = [(0, 0), (0, 0), *((m, m + s - n) for s, n in zip(sides, volume.shape[2:], strict=True))]
            mode = {"reflect": "reflect", "replicate": "edge"}[pad_mode]
            padded = torch.from_numpy(np.pad(volume.numpy(), widths, mode=mode))
        want = model(padded)[:, :, :9, :11, :6]
    got = overlap_tile(model, volume, tile=20, batch_size=3, pad_mode=pad_mode)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    classes = overlap_tile(model, volume.numpy(), tile=20, argmax=True, pad_mode=pad_mode)
    assert isinstance(classes, np.ndarray) and classes.dtype == np.uint8
    assert (classes == want.argmax(1).numpy()).mean() > 0.999


@pytest.mark.parametrize("blend", ["gaussian", "linear", "constant", "crop"])
@pytest.mark.parametrize("shape", [(13, 9, 17), (5, 20, 8), (8, 8, 8)], ids=str)
def test_weights_sum_to_one(blend, shape):
    volume = torch.randn(1, 1, *shape)
    got = overlap_tile(Position().eval(), volume, tile=8, overlap=3, blend=blend)
    torch.testing.assert_close(got, volume.expand(1, 2, *shape), rtol=1e-5, atol=1e-6)


def test_cropped_tiles_that_overlap_by_the_reach_equal_the_whole(tmp_path):
    model, volume = Local().eval(), torch.randn(2, 1, 11, 9, 12)
    want = model(volume).detach()
    torch.testing.assert_close(overlap_tile(model, volume, tile=6, overlap=2, blend="crop"), want, rtol=1e-5, atol=1e-5)
    out = np.lib.format.open_memmap(tmp_path / "classes.npy", "w+", np.uint16, (2, 11, 9, 12))
    assert overlap_tile(model, volume, tile=6, overlap=2, blend="crop", argmax=True, out=out) is out
    assert (out == want.argmax(1).numpy()).mean() > 0.999
    half = overlap_tile(Local().bfloat16().eval(), volume, tile=6, batch_size=5)
    assert half.dtype == torch.bfloat16 and half.shape == want.shape


def test_errors():
    model = valid_net()
    with pytest.raises(ValueError, match=r"cannot take tiles of 19 pixels \(margin 8, phase 2\)"):
        overlap_tile(model, torch.zeros(1, 2, 8, 8, 8), tile=19)
    with pytest.raises(ValueError, match=r"give \(N, C, H, W\), none of C, H, W zero, or \(N, C, D, H, W\)"):
        overlap_tile(model, torch.zeros(2, 8, 8), tile=20)
    with pytest.raises(ValueError, match=r"out is \(1, 8, 8\); the result is \(1, 8, 8, 8\)"):
        overlap_tile(model, torch.zeros(1, 2, 8, 8, 8), tile=20, argmax=True, out=np.zeros((1, 8, 8), np.uint8))
    with pytest.raises(TypeError, match=r"it must return logits \(N, K, D, H, W\)"):
        overlap_tile(nn.Sequential(Position(), nn.Flatten(2)).eval(), torch.zeros(1, 1, 8, 8, 8), tile=8)
