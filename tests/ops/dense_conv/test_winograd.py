"""Winograd's form against the convolution in fp64: every border, strip and option; and what it costs in digits."""

import pytest
import torch
from torch.nn import functional as F

from fastseg.ops.core.kept import Kept
from fastseg.ops.cpu.onednn import why_not
from fastseg.ops.cpu.packed import PackedWeights
from fastseg.ops.cpu.winograd import blocks, matrices, plan, transform, transformed_bytes, winograd_conv2d
from fastseg.ops.cpu.winograd_dilated import Dilated, transform_dilated

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
CL = torch.channels_last


def test_the_matrices_convolve():
    """Exactly, by their definition, in whole numbers of an eighth."""
    m = matrices(torch.float64)
    d, g = torch.randint(-8, 9, (6,), dtype=torch.float64), torch.randint(-8, 9, (3,), dtype=torch.float64)
    want = d.unfold(0, 3, 1) @ g
    torch.testing.assert_close(m.a @ ((m.g @ g) * (m.b @ d)), want, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize(
    "N, C, COUT, H, W, tiles",
    [
        (1, 5, 3, 8, 8, (1, 2)),  # blocks that begin and end at a border
        (2, 8, 24, 12, 16, (2, 1)),
        (2, 16, 8, 13, 11, (2, 3)),  # neither side a multiple of four; the last block begins inside the one before
        (2, 16, 8, 13, 22, (3, 4)),
        (1, 3, 4, 9, 30, (3, 3)),
        (3, 4, 4, 16, 9, (4, 2)),
        (1, 4, 4, 3, 1, (1, 1)),
    ],
)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_convolution(N, C, COUT, H, W, tiles, relu, biased):
    x = torch.randn(N, C, H, W).contiguous(memory_format=CL)
    weight, bias = torch.randn(COUT, C, 3, 3), torch.randn(COUT) if biased else None
    want = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    want = want.relu() if relu else want
    with torch.no_grad():
        y = winograd_conv2d(x, transform(weight, bias, tiles, H, W), relu)
    assert y.is_contiguous(memory_format=CL) and y.shape == want.shape
    torch.testing.assert_close(y.double(), want, rtol=0, atol=2e-6 * C**0.5 * want.abs().max().item())


def test_rounding():
    """The root of the mean square, relative to that of the result; the convolution written out has about 2e-7."""
    x, weight = torch.randn(1, 128, 32, 32).contiguous(memory_format=CL), torch.randn(128, 128, 3, 3)
    want = F.conv2d(x.double(), weight.double(), padding=1)
    with torch.no_grad():
        y = winograd_conv2d(x, transform(weight, None, (4, 8), 32, 32), False)
    assert (y - want).norm() < 2.5e-6 * want.norm()


def test_nan_stays_nan():
    """Also after a ReLU, under the filter at least, and it leaves the other tiles alone."""
    x, filters = torch.randn(1, 8, 24, 24), transform(torch.randn(8, 8, 3, 3), None, (2, 6), 24, 24)
    with torch.no_grad():
        want = winograd_conv2d(x, filters, True)
        x[0, 3, 9, 10] = torch.nan
        y = winograd_conv2d(x, filters, True)
    assert y[:, :, 8:11, 9:12].isnan().all()
    y[:, :, 8:12, 8:12] = want[:, :, 8:12, 8:12]
    assert torch.equal(y, want)


def test_layers_of_one_size_share_their_transforms():
    one, other = (transform(torch.randn(8, C, 3, 3), None, (2, 3), 20, 24) for C in (3, 5))
    assert one.blocks is other.blocks
    first, *_, last = blocks(20, 24, (2, 3))
    assert first.back is last.back and (last.y.start, last.y.stop, last.x.start, last.x.stop) == (12, 20, 12, 24)


@pytest.mark.parametrize(
    "sizes, tiles",
    [
        ((256, 256, 128, 128), (4, 32)),
        ((128, 64, 512, 512), (2, 64)),
        ((64, 64, 80, 120), (4, 30)),
        ((64, 64, 40, 60), (5, 15)),  # parts of one size: 5 and 5, not 8 and 2
        ((48, 256, 128, 2060), (2, 58)),
        ((512, 512, 10, 15), (3, 4)),
        ((32, 64, 256, 256), (2, 64)),
        ((32, 32, 256, 256), None),
        ((512, 512, 8, 8), None),
        ((64, 64, 16, 32), (4, 8)),
        ((64, 64, 16, 31), None),
        ((512, 512, 4, 64), None),
    ],
)
def test_the_rule(sizes, tiles):
    assert plan(*sizes, threads=1) == tiles


def test_more_threads_want_more_work():
    assert plan(64, 64, 80, 240, threads=1) is not None and plan(64, 64, 80, 240, threads=2) is None
    assert plan(64, 64, 360, 480, threads=1) == (2, 60) and plan(64, 64, 360, 480, threads=2) == (4, 60)
    assert plan(64, 64, 360, 480, threads=4) == plan(64, 64, 360, 480, threads=64)
    assert plan(512, 512, 20, 20, threads=2) is not None and plan(128, 128, 20, 20, threads=2) is None


def test_bytes():
    weight = torch.zeros(32, 16, 3, 3)
    assert transformed_bytes(weight) == 4 * weight.nbytes


@pytest.mark.parametrize("rate, H, W", [(2, 13, 16), (3, 14, 12), (4, 32, 17)])
def test_dilated(rate, H, W):
    x, weight, bias = torch.randn(2, 8, H, W), torch.randn(6, 8, 3, 3) / 8, torch.randn(6)
    y = transform_dilated(weight, bias, (2, 3), H, W, rate)(x)
    want = F.conv2d(x.double(), weight.double(), bias.double(), padding=rate, dilation=rate)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (y - want).abs().max() < 2e-5 * want.abs().max()


def test_where_dilated_filters_are_transformed():
    kinds = {}
    for rate, stride, side in ((2, 1, 32), (4, 1, 32), (5, 1, 32), (2, 2, 32), (4, 1, 12)):
        w = torch.randn(128, 128, 3, 3)
        packs, x = PackedWeights(Kept([w])), torch.randn(1, 128, side, side)
        run = packs.convolution(x, w, None, ((stride,) * 2, (rate,) * 2, (rate,) * 2, 1))
        kinds[rate, stride, side] = isinstance(run, Dilated)
        assert packs.transformed == 4 * w.nbytes * kinds[rate, stride, side]
    assert [key for key, value in kinds.items() if value] == [(2, 1, 32), (4, 1, 32)] or torch.get_num_threads() > 1
