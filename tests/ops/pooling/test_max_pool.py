"""Max pooling against torch's, bit for bit: torch's own samples and errors, exact semantics, layouts, derivatives."""

import itertools

import pytest
import torch
from samples import error_inputs, layouts, same_bits, samples
from torch import nn
from torch.nn import functional as F

import fastseg
import fastseg.nn
from fastseg.kernels.runtime.launch import intercept
from fastseg.ops import max_pool1d, max_pool2d, max_pool3d

OURS = {1: max_pool1d, 2: max_pool2d, 3: max_pool3d}
THEIRS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
NAN, INF = float("nan"), float("inf")

# kernel, stride, padding, dilation, ceil: the field's poolings, then what only a general kernel takes.
GEOMETRIES = [
    (2, 2, 0, 1, False),  # SegNet, U-Net, VGG
    (2, 2, 0, 1, True),  # SegNet at odd sizes
    (3, 2, 1, 1, False),  # ResNet
    (3, 2, 1, 1, True),  # DeepLabV2
    (2, 3, 0, 1, False),  # cells that no window covers
    ((3, 2), (1, 2), (1, 0), (1, 2), False),
    (3, 1, 1, 2, False),  # dilated
    (5, 1, 2, 1, False),  # 25 cells: a loop, codes of 8 bits
    (4, 4, 2, 1, True),  # padded, 4 bits
]


def module(dims: int, kwargs: dict, **options) -> nn.Module:
    return getattr(fastseg.nn, f"MaxPool{dims}d")(**kwargs, **options)


def both(dims: int, x, *args, **kwargs):
    """Our values and indices, and torch's."""
    return OURS[dims](x, *args, return_indices=True, **kwargs), THEIRS[dims](x, *args, return_indices=True, **kwargs)


@pytest.mark.parametrize("dims, every", [(1, 7), (2, 7), (3, 7), pytest.param(2, 1, marks=pytest.mark.long)])
def test_torch_samples(dims, every, device):
    """Every seventh. They are a product of lists of 2, 3 and 5 values, so each value comes, beside each of another."""
    found = samples(f"max_pool{dims}d", device=device)
    assert found
    for number, sample in enumerate(found[::every]):
        pool = module(dims, sample.kwargs)
        with fastseg.explain() as report:
            got = pool(sample.input)
        assert [d.path for d in report] == ["triton"]
        want = THEIRS[dims](sample.input, **sample.kwargs)
        if not sample.kwargs["return_indices"]:
            same_bits(got, want)
            continue
        for g, w in zip(got, want, strict=True):
            same_bits(g, w)
        if number % 5 == 0:
            compact = module(dims, sample.kwargs, index_format="compact")(sample.input)
            same_bits(compact[0], want[0])
            same_bits(compact[1].to_torch(), want[1])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_torch_error_inputs(dims):
    found = error_inputs(f"max_pool{dims}d")
    assert found
    for error in found:
        sample = error.sample_input
        for compact in (False, True):
            with pytest.raises(error.error_type, match=error.error_regex):
                module(dims, sample.kwargs, **({"index_format": "compact"} if compact else {}))(sample.input)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_layouts(geometry, dtype, device):
    """Few distinct values: ties everywhere. Two images, sizes that no block divides; layouts as torch answers them."""
    x = torch.randint(-2, 3, (2, 5, 9, 7), device=device).to(dtype)
    for view in layouts(x):
        ours, theirs = both(2, view, *geometry)
        for got, want in zip(ours, theirs, strict=True):
            same_bits(got, want)


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
def test_nan_infinity_and_ties(last, device):
    """Rows of the semantics table: the last NaN wins, the first of equals, -inf inside the plane, -0.0 as it is."""
    cases = [
        ([[1, NAN], [3, 2]], 2, 0, [1]),
        ([[1, NAN], [NAN, 2]], 2, 0, [2]),
        ([[-0.0, 0], [0, -0.0]], 2, 0, [0]),
        ([[-INF] * 3] * 3, 3, 1, [0, 1, 3, 4]),
        ([[NAN, 1, 2], [3, 4, 5], [6, 7, 8]], 3, 1, [0, 5, 7, 8]),
    ]
    for rows, kernel, padding, expected in cases:
        x = torch.tensor([[rows] * 3] * 2, device=device)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        ours, theirs = both(2, x, kernel, 2, padding)
        for got, want in zip(ours, theirs, strict=True):
            same_bits(got, want)
        assert ours[1][1, 2].flatten().tolist() == expected
        codes = max_pool2d(x, kernel, 2, padding, return_indices=True, index_format="compact")[1]
        assert torch.equal(codes.to_torch(), theirs[1])


def test_overlapping_windows_add_their_gradients(device):
    x = torch.zeros(1, 1, 3, 3, device=device)
    x[0, 0, 1, 1] = 1
    x.requires_grad_()
    max_pool2d(x, 2, 1).sum().backward()  # a gradient of stride 0
    assert x.grad.flatten().tolist() == [0, 0, 0, 0, 4, 0, 0, 0, 0]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gradients(geometry, device):
    """From codes, from compact and from int64 indices; torch's, whose sums are of few terms, to rounding."""
    x = torch.randint(-2, 3, (2, 5, 9, 7), device=device).double().requires_grad_()
    for view in layouts(x):
        want = F.max_pool2d(view, *geometry)
        dy = torch.randn_like(want)
        (want_dx,) = torch.autograd.grad(want, x, dy)
        for options in ({}, {"return_indices": True}, {"return_indices": True, "index_format": "compact"}):
            y = max_pool2d(view, *geometry, **options)
            (dx,) = torch.autograd.grad(y[0] if options else y, x, dy)
            torch.testing.assert_close(dx, want_dx, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dims, geometry", [(1, (3, 2, 1)), (2, (2, 2)), (2, (3, 1, 1, 2)), (3, (2, 2))], ids=str)
def test_gradcheck(dims, geometry, device):
    x = torch.randperm(2 * 4**dims, device=device).double().view(1, 2, *[4] * dims).requires_grad_()
    for indices in ("int64", "compact"):
        pool = lambda t, f=indices: OURS[dims](t, *geometry, return_indices=True, index_format=f)[0]
        # linear until two cells change places
        assert torch.autograd.gradcheck(pool, x, eps=0.1, check_forward_ad=True, fast_mode=dims > 1)
        assert torch.autograd.gradgradcheck(pool, x, eps=0.1, fast_mode=True)


def test_empty_batch(device):
    x = torch.zeros(0, 3, 4, 4, device=device, requires_grad=True)
    for options in ({}, {"return_indices": True}, {"return_indices": True, "index_format": "compact"}):
        y = max_pool2d(x, 2, **options)
        y = y[0] if options else y
        assert y.shape == (0, 3, 2, 2)
        y.sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_integers_take_torchs_path(dtype, device):
    x = torch.randint(0, 5, (2, 3, 4, 4), device=device).to(dtype)
    with fastseg.explain() as report:
        y, indices = max_pool2d(x, 2, return_indices=True, index_format="compact")
    assert report.decisions[0].why == f"no kernel for {dtype}"
    want, want_indices = F.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(y, want) and torch.equal(indices.to_torch(), want_indices)


def test_no_index_is_made_where_nobody_wants_one(device):

    flags = []
    with intercept(lambda kernel, grid, args, kwargs: flags.append(kwargs["BITS"])):
        for grad, options in itertools.product((False, True), ({}, {"return_indices": True})):
            max_pool2d(torch.zeros(1, 1, 4, 4, device=device, requires_grad=grad), 2, **options)
    assert flags == [0, 64, 2, 64]


@pytest.mark.parametrize("kernel", [17, (2, 200)], ids=str)
def test_windows_too_large_for_codes(kernel, device):
    x = torch.randn(1, 2, 40, 201, device=device, requires_grad=True)
    with fastseg.explain() as report:
        y = max_pool2d(x, kernel)
    assert "cells" in report.decisions[0].why
    assert torch.equal(y, F.max_pool2d(x, kernel))
    with pytest.raises(ValueError, match='have no compact indices; use index_format="int64"'):
        max_pool2d(x, kernel, return_indices=True, index_format="compact")


def test_unknown_index_format(device):
    with pytest.raises(ValueError, match='index_format is \'int8\'; use "int64" or "compact"'):
        max_pool2d(torch.zeros(1, 1, 2, 2, device=device), 2, index_format="int8")


def test_one_pixel_of_one_channel_is_contiguous():
    """Strides of many images alone say nothing of channels_last: torch counts them as contiguous."""
    one = torch.randn(3, 1, 1, 1)
    with fastseg.reference():
        assert not max_pool2d(one, 1, return_indices=True, index_format="compact")[1].channels_last
