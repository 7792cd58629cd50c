"""Sizes as callers give them: numpy's integers and arrays, floats beside integers they equal, what is not finite."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastseg
import fastseg.nn as fnn
from fastseg import ops
from fastseg.ops.core.dispatch import INTERPRETED

N = np.int64
X = torch.arange(96.0).view(1, 2, 6, 8).sin()


def _unpooled(kernel, stride, size):
    values, indices = F.max_pool2d(X, 2, return_indices=True)
    return ops.max_unpool2d(values, indices, kernel, stride, output_size=size)


def _module(kind, *args, **options):
    torch.manual_seed(0)
    return kind(*args, **options).eval()(X)


W, DW, PW = torch.ones(3, 2, 3, 3), torch.ones(2, 1, 3, 3), torch.ones(3, 2, 1, 1)
CALLS = {  # of the function that makes a size
    "max_pool2d": lambda n: ops.max_pool2d(X, n(2), n(2), n(1), n(1)),
    "max_pool2d, pair": lambda n: ops.max_pool2d(X, (n(2), n(3))),
    "max_pool2d, array": lambda n: ops.max_pool2d(X, [2, 3] if n is int else np.array([2, 3])),
    "batch_norm_act_max_pool2d": lambda n: ops.batch_norm_act_max_pool2d(X, None, "relu", n(2), n(2)),
    "max_unpool2d": lambda n: _unpooled(n(2), n(2), (n(6), n(8))),
    "max_unpool2d, array": lambda n: _unpooled(2, 2, [6, 8] if n is int else np.array([6, 8])),
    "upsample_bilinear": lambda n: ops.upsample_bilinear(X, (n(9), n(7))),
    "upsample_bilinear, one": lambda n: ops.upsample_bilinear(X, n(9)),
    "upsample_bilinear, factor": lambda n: ops.upsample_bilinear(X, scale_factor=n(2)),
    "upsample_argmax": lambda n: ops.upsample_argmax(X, (n(9), n(7))),
    "upsample_argmax, factor": lambda n: ops.upsample_argmax(X, scale_factor=n(2)),
    "bilinear_conv_transpose2d": lambda n: ops.bilinear_conv_transpose2d(X, n(2), n(4), n(1), output_size=(n(9), n(8))),
    "separable_conv2d": lambda n: ops.separable_conv2d(X, DW, PW, stride=n(2), padding=n(1), dilation=n(1)),
    "atrous_conv2d": lambda n: ops.atrous_conv2d(X, W, dilation=n(2)),
    "aspp": lambda n: ops.aspp(X, [W], [n(2)], fusion="sum"),
    "upsample_cross_entropy": lambda n: ops.upsample_cross_entropy(X, torch.ones(1, 3, 3).long(), None, n(0)),
    "SeparableConv2d": lambda n: _module(fnn.SeparableConv2d, n(2), n(4), n(3), stride=n(2), dilation=n(1)),
    "ConvNormAct2d": lambda n: _module(fnn.ConvNormAct2d, n(2), n(4), n(3)),
    "Upsample": lambda n: _module(fnn.Upsample, n(9), mode="bilinear"),
    "BilinearConvTranspose2d": lambda n: _module(fnn.BilinearConvTranspose2d, n(2), n(2)),
    "MaxPool2d": lambda n: _module(fnn.MaxPool2d, n(2)),
    "UpsampleArgmax": lambda n: _module(fnn.UpsampleArgmax, n(9)),
    "ASPP": lambda n: _module(fnn.ASPP, n(2), n(4), [n(1), n(2)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_numpys_integers(name):
    with fastseg.reference():  # what is asked for is settled before the path
        assert torch.equal(CALLS[name](N), CALLS[name](int))


@pytest.mark.skipif(not INTERPRETED, reason="the kernels take CPU tensors under the interpreter")
@pytest.mark.parametrize("name", ["max_pool2d", "upsample_bilinear", "bilinear_conv_transpose2d"])
def test_numpys_integers_reach_kernels(name):
    with torch.no_grad():
        assert torch.equal(CALLS[name](N), CALLS[name](int))


def test_what_equals_a_size_is_not_taken_for_one():
    assert ops.upsample_bilinear(X, (8, 10)).shape == (1, 2, 8, 10)
    with pytest.raises(TypeError):
        ops.upsample_bilinear(X, (8.0, 10.0))
    with pytest.raises(TypeError, match="whole numbers"):
        ops.upsample_argmax(X, (8.0, 10.0))
    ops.max_pool2d(X, (2, 2))
    with pytest.raises(TypeError):
        ops.max_pool2d(X, (2.0, 2.0))


@pytest.mark.parametrize("factor", [float("inf"), (2.0, float("inf")), float("nan"), 1e300])
def test_factors_that_give_no_size(factor):
    for op in (ops.upsample_bilinear, ops.upsample_argmax):
        with pytest.raises(ValueError, match=r"scale_factor|below 2\^31"):
            op(X, scale_factor=factor)


def test_a_pooling_of_256_columns_has_compact_indices():
    """256 is no number of a code's dtype."""
    x = torch.randn(1, 1, 2, 300)
    for kernel in ((1, 256), (256, 1)):
        image = x if kernel == (1, 256) else x.transpose(2, 3)
        with fastseg.reference():
            _, indices = ops.max_pool2d(image, kernel, return_indices=True, index_format="compact")
        assert torch.equal(indices.to_torch(), F.max_pool2d(image, kernel, return_indices=True)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_windows_of_minus_infinity_have_their_first_cell(dtype):
    """torch's channels_last_3d names cells of the first plane for windows of any other."""
    x = torch.full((1, 2, 7, 5, 4), -float("inf")).to(dtype)
    x[0, :, 3:, 2] = 1.0
    for kernel, stride, dilation in ((1, 3, 2), (2, 3, 2), (3, 2, 1)):
        want = F.max_pool3d(x, kernel, stride, 0, dilation, return_indices=True)
        for image in (x, x.contiguous(memory_format=torch.channels_last_3d)):
            with fastseg.reference():
                y, indices = ops.max_pool3d(image, kernel, stride, 0, dilation, return_indices=True,
                                            index_format="compact")  # fmt: skip
            assert torch.equal(y, want[0]) and torch.equal(indices.to_torch(), want[1])


def test_a_view_that_is_to_be_negated():
    """torch's max_pool1d without gradients reads the values as they lie in memory."""
    x = torch.randint(-2, 3, (3, 4, 40)).float()
    view = torch._neg_view(x)
    for stride in (1, 2):
        with fastseg.reference():
            assert torch.equal(ops.max_pool1d(view, 5, stride), F.max_pool1d(-x, 5, stride))
            y, index = ops.max_pool1d(view, 5, stride, return_indices=True)
        assert torch.equal(y, F.max_pool1d(-x, 5, stride)) and torch.equal((-x).gather(2, index), y)


def test_no_images_of_many_classes():
    for dtype in (None, torch.int64):
        assert ops.upsample_argmax(torch.randn(0, 257, 2, 3), (4, 5), dtype=dtype).shape == (0, 4, 5)


def test_sub_packages_are_attributes():
    for name in ("models", "nn", "ops", "inference", "metrics", "training", "testing", "cli", "measure", "io", "demo"):
        assert getattr(fastseg, name).__name__ == f"fastseg.{name}" and name in dir(fastseg)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = fastseg.nonsense
