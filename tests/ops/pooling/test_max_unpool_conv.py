"""Unpooling folded into the convolution after it, against the two one after the other; and what decides."""

import pytest
import torch

import fastseg
from fastseg.ops import max_pool2d, max_unpool_conv2d
from fastseg.ops.max_unpool_conv import max_unpool_conv2d_ref
from fastseg.testing import compare

CL = torch.channels_last


def make(C=21, COUT=5, K=3, H=9, W=7, kernel=2, stride=2, dtype=torch.float32, device="cpu"):
    x = torch.randn(2, C, H, W, device=device, dtype=dtype).contiguous(memory_format=CL)
    values, indices = max_pool2d(x, kernel, stride, ceil_mode=True, return_indices=True, index_format="compact")
    weight = torch.randn(COUT, C, K, K, device=device, dtype=dtype)
    return values, indices, weight, torch.randn(COUT, device=device, dtype=dtype)


@pytest.fixture
def fold():
    """Fold whatever the cost model says."""
    with fastseg.force("max_unpool_conv2d", "fold"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "K, kernel, stride", [(3, 2, 2), (1, 2, 2), (5, 2, 3), (3, 3, 3), (3, (1, 2), (1, 2))], ids=str
)
def test_folded_equals_plain(K, kernel, stride, dtype, fold, device):
    """Ragged tiles and channels; codes of 2 and 4 bits; cells in no window; every activation."""
    values, indices, weight, bias = make(K=K, kernel=kernel, stride=stride, dtype=dtype, device=device)
    options = {"kernel_size": kernel, "stride": stride, "output_size": (9, 7)}
    for act in ("relu", None):
        with fastseg.explain() as report, torch.no_grad():
            y = max_unpool_conv2d(values, indices, weight, bias, act, **options)
        assert report.decisions[0].path == "triton" and y.is_contiguous(memory_format=CL)
        v, w, b = (t.double().cpu() for t in (values, weight, bias))
        want = max_unpool_conv2d_ref(v, indices.to("cpu"), w, b, act, **options)
        compare(y, want, terms=21 * K * K)


def test_many_channels(fold, device):
    """Blocks of input and of output channels."""
    values, indices, weight, _ = make(C=100, COUT=140, K=1, H=4, W=4, device=device)
    with torch.no_grad():
        y = max_unpool_conv2d(values, indices, weight, output_size=(4, 4))
        with fastseg.reference():
            want = max_unpool_conv2d(values, indices, weight, output_size=(4, 4))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


def test_the_cost_model_decides():
    """A 1x1 does not build its operand nine times; SegNet's 3x3 do, at every stage."""
    from fastseg.kernels.pooling.max_unpool_conv import plan

    for C, COUT, H, W in ((64, 64, 360, 480), (128, 128, 180, 240), (256, 256, 90, 120), (512, 512, 45, 60)):
        sizes = 16 * H * W, 16 * (H // 2) * (W // 2), C, COUT
        assert not plan(*sizes, 3, torch.bfloat16, 2).pays
        assert plan(*sizes, 1, torch.bfloat16, 2).pays
    assert "plain: model says folded" in str(plan(*sizes, 3, torch.bfloat16, 2))


def test_what_runs_one_after_the_other(fold, device):
    values, indices, weight, bias = make(device=device)
    arguments = {
        "gradients are needed": (values, indices, weight.clone().requires_grad_(), bias),
        "no compact indices": (values, indices.to_torch(), weight, bias),
        "indices of another pooling": (values, indices, weight, bias),
    }
    for why, args in arguments.items():
        size = (10, 8) if "another" in why else (9, 7)
        with fastseg.explain() as report:
            y = max_unpool_conv2d(*args, "relu", output_size=size)
        assert report.decisions[0].why.startswith(why) and y.shape == (2, 5, *size)


def test_bad_arguments(device):
    values, indices, weight, bias = make(device=device)
    with pytest.raises(ValueError, match=r"weight \(5, 20, 3, 3\)"):
        max_unpool_conv2d(values, indices, weight[:, :20], bias)
    with pytest.raises(ValueError, match="its kernel must be square and odd"):
        max_unpool_conv2d(values, indices, weight[..., :2, :2], bias)
    with pytest.raises(ValueError, match="act is 'tanh'"):
        max_unpool_conv2d(values, indices, weight, bias, "tanh")


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("kernel, H, W", [(2, 9, 7), (3, 8, 11), ((2, 3), 5, 4)], ids=str)
def test_pixels_past_the_last_window_are_zero(kernel, H, W, K, fold, device):
    """No ceil_mode: rows and columns are left over, where the next window's values would stand in memory."""
    x = torch.rand(2, 4, H, W, device=device).contiguous(memory_format=CL) + 1
    values, indices = max_pool2d(x, kernel, return_indices=True, index_format="compact")
    weight = torch.rand(3, 4, K, K, device=device) + 1
    with torch.no_grad():
        y = max_unpool_conv2d(values, indices, weight, kernel_size=kernel, output_size=(H, W))
        unpooled = torch.nn.functional.max_unpool2d(values, indices.to_torch(), kernel, output_size=(H, W))
        want = torch.nn.functional.conv2d(unpooled, weight, padding=K // 2)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
