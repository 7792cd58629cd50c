"""Compact pooling indices: sizes, conversion to and from torch's, what an object must survive."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fastseg
from fastseg.ops import PoolIndices, max_pool1d, max_pool2d, max_pool3d, max_unpool2d

POOLS = {1: (max_pool1d, F.max_pool1d), 2: (max_pool2d, F.max_pool2d), 3: (max_pool3d, F.max_pool3d)}


def pooled(x, kernel=2, **options):
    return max_pool2d(x, kernel, **options, return_indices=True, index_format="compact")


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
def test_segnet_keeps_a_thirty_second(last, device):
    """The five maps that SegNet pools at 360 x 480, cut to 16 channels and a quarter of the sides."""
    ours = theirs = 0
    for channels, height, width in ((16, 90, 120), (32, 45, 60), (64, 23, 30), (64, 12, 15), (64, 6, 8)):
        x = torch.randn(1, channels, height, width, device=device)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        with fastseg.reference():  # the same codes, sooner
            indices = pooled(x, ceil_mode=True)[1]
        ours, theirs = ours + indices.nbytes, theirs + indices.to_torch().nbytes
    if last:
        assert ours * 32 == theirs
    else:  # each line begins with a byte of its own: lines of 15 and 30 windows do not fill their last
        assert theirs / 32 < ours <= 1.03 * theirs / 32


@pytest.mark.parametrize(
    "kernel, bits", [(1, 2), (2, 2), ((1, 4), 2), ((2, 3), 4), (4, 4), ((3, 6), 8), (16, 8)], ids=str
)
def test_bits(kernel, bits, device):
    x = torch.randint(0, 4, (2, 3, 33, 35), device=device).float()
    indices = pooled(x, kernel)[1]
    assert indices.bits == bits
    assert torch.equal(indices.to_torch(), F.max_pool2d(x, kernel, return_indices=True)[1])


@pytest.mark.parametrize("path", ["kernels", "reference"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conversion_both_ways(dims, path, device):
    """Padding, dilation, ceil mode; contiguous, channels_last, unbatched; kernels and reference make the same codes."""
    ours, theirs = POOLS[dims]
    x = torch.randint(0, 4, (2, 5, *(9, 7, 6)[:dims]), device=device).float()
    views = [x, x[0]]
    if dims > 1:
        views.append(x.contiguous(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d))
    for view in views:
        for geometry in ((2, 2, 0, 1, True), (3, 2, 1, 1, False), (2, 1, 0, 2, False)):
            if path == "reference":
                with fastseg.reference():
                    indices = ours(view, *geometry, True, index_format="compact")[1]
            else:
                indices = ours(view, *geometry, True, index_format="compact")[1]
            want = theirs(view, *geometry, True)[1]
            got = indices.to_torch()
            assert torch.equal(got, want) and got.stride() == want.stride()
            sizes = [(v,) * dims for v in geometry[:4]]
            again = PoolIndices.from_torch(want, tuple(view.shape[-dims:]), *sizes, channels_last=indices.channels_last)
            assert torch.equal(again.codes, indices.codes) and again.shape == indices.shape


def test_from_torch_refuses_what_no_such_pooling_gave(device):
    indices = F.max_pool2d(torch.randn(1, 1, 4, 4, device=device), 2, return_indices=True)[1]
    with pytest.raises(ValueError, match="an index is outside its window"):
        PoolIndices.from_torch(indices + 2, (4, 4), (2, 2), (2, 2), (0, 0), (1, 1))


def test_survives_copies_pickling_devices_and_trees(device):
    x = torch.randn(2, 6, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    values, indices = pooled(x)
    want = max_unpool2d(values, indices, 2)
    leaves, spec = pytree.tree_flatten({"indices": indices, "n": 1})
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == 1
    for twin in (
        copy.deepcopy(indices),
        pickle.loads(pickle.dumps(indices)),
        indices.to(device),
        indices.to("cpu").to(device),
        pytree.tree_unflatten(leaves, spec)["indices"],
    ):
        assert torch.equal(max_unpool2d(values, twin, 2), want)
        assert (twin.shape, twin.device, twin.nbytes) == (indices.shape, indices.device, indices.nbytes)
    assert indices.shape == values.shape and indices.device == values.device
    assert repr(indices).startswith("PoolIndices(shape=(2, 6, 4, 4), 2 bits, 64 bytes, device=")


def test_indices_on_another_device_are_refused(device):
    values, indices = pooled(torch.randn(1, 4, 4, 4, device=device))
    with pytest.raises(ValueError, match="move them to one device"):
        max_unpool2d(values, indices.to("meta"), 2)
