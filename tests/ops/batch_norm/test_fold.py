"""A norm folded into weights: equal to the norm after the convolution, in the layout and dtype that is asked for."""

import pytest
import torch
import torch.nn.functional as F

from fastseg.kernels.runtime.launch import intercept
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.registered.fold_norm import fold_norm

CL = torch.channels_last


@pytest.mark.parametrize("affine, biased", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 200, 3, 3), (6, 7, 1, 1)], ids=str)
def test_equals_the_norm_after_the_convolution(shape, affine, biased, device):
    d = {"dtype": torch.float64 if device == "cpu" else torch.float32, "device": device}
    weight, x = torch.randn(shape, **d), torch.randn(2, shape[1], 5, 5, **d)
    mean, gamma, beta, bias = torch.randn(4, shape[0], **d)
    gamma, beta, bias = gamma if affine else None, beta if affine else None, bias if biased else None
    var = torch.rand(shape[0], **d) + 0.5
    want = F.batch_norm(F.conv2d(x, weight, bias), mean, var, gamma, beta, eps=0.1)
    for last in (False, True):
        for given in (weight, weight.contiguous(memory_format=CL)):
            w, shift = fold_norm(given, bias, mean, var, gamma, beta, 0.1, d["dtype"], last)
            assert w.is_contiguous(memory_format=CL if last else torch.contiguous_format)
            torch.testing.assert_close(F.conv2d(x, w, shift), want, rtol=1e-4, atol=1e-9 if device == "cpu" else 1e-3)


def test_dtypes_and_slices(device):
    weight = torch.randn(8, 12, 1, 1, device=device).bfloat16()
    mean, gamma, beta = torch.randn(3, 8, device=device)
    var = torch.rand(8, device=device) + 0.5
    scale = gamma / (var + 1e-5).sqrt()
    for dtype in (torch.bfloat16, torch.float32):
        w, shift = fold_norm(weight[:, 3:9], None, mean, var, gamma, beta, 1e-5, dtype, True)
        assert w.dtype == shift.dtype == dtype and w.shape == (8, 6, 1, 1)
        want = weight[:, 3:9].float() * scale[:, None, None, None]
        torch.testing.assert_close(w.float(), want, rtol=8e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-7)
        torch.testing.assert_close(shift, (beta - mean * scale).to(dtype), rtol=8e-3, atol=1e-6)


@pytest.mark.skipif(not INTERPRETED, reason="counted on a CPU")
def test_is_one_launch():
    seen = []
    vectors = torch.rand(4, 6)
    with intercept(lambda kernel, *_: seen.append(kernel.fn.__name__)):
        fold_norm(torch.randn(6, 7, 3, 3), None, *vectors, 1e-5, torch.bfloat16, False)
    assert seen == ["_fold_norm_fwd_kernel"]
