"""DRAM bytes by the order of programs, as ``test_order_of_work.py`` has them, of the kernels beside the separable ones.

Each launch moves maps several times as large as the cache that it is replayed through, which holds what the programs
that run at once touch, as an H200's does: a pair of lines of each plane, two rows of tiles with their borders.
"""

from typing import NamedTuple
from unittest import mock

import pytest
import torch

from fastseg.ops.core.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="launches are replayed from the interpreter's log")

if INTERPRETED:
    from l2 import ratios

    from fastseg.kernels.atrous_conv import tables
    from fastseg.kernels.atrous_conv.bwd import atrous_conv_bwd_weight
    from fastseg.kernels.atrous_conv.fwd import atrous_conv_fwd
    from fastseg.kernels.dense_conv.pointwise import pointwise_conv_fwd
    from fastseg.kernels.dense_conv.stem import stem_conv_fwd
    from fastseg.kernels.inverted_residual.fwd import Weights, inverted_residual_fwd
    from fastseg.kernels.runtime.ceilings import H200
    from fastseg.kernels.runtime.config import override
    from fastseg.ops import (
        max_pool2d,
        max_unpool2d,
        upsample_argmax,
        upsample_bilinear,
        upsample_cross_entropy,
    )

RESIDENT = 3
MOST = 1.15


def nhwc(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last)


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def pooling():
    x = nhwc(2, 32, 32, 32).requires_grad_()
    values, indices = max_pool2d(x, 2, return_indices=True, index_format="compact")
    values.backward(torch.randn_like(values))
    v = values.detach().requires_grad_()
    y = max_unpool2d(v, indices, 2)
    y.backward(torch.randn_like(y))


def planes():
    x = torch.randn(2, 8, 16, 512).bfloat16().requires_grad_()
    values, indices = max_pool2d(x, 2, return_indices=True, index_format="compact")
    max_unpool2d(values, indices, 2)


def bilinear():
    x = nhwc(1, 16, 16, 16).requires_grad_()
    y = upsample_bilinear(x, scale_factor=4)
    y.backward(torch.randn_like(y))


def heads():
    x = torch.randn(1, 4, 16, 16).requires_grad_()
    upsample_argmax(x.detach(), scale_factor=8)
    upsample_cross_entropy(x, torch.randint(0, 4, (1, 128, 128))).backward()


def pointwise():
    x, weight = nhwc(1, 64, 32, 32), nhwc(96, 64, 1, 1)
    blocks = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}
    with override("separable_conv_fwd_pw", **blocks):
        pointwise_conv_fwd(x, weight, nhwc(1, 96, 1, 1).flatten(), "relu", nhwc(1, 96, 32, 32), None)


def stem():
    stem_conv_fwd(nhwc(1, 3, 96, 96), nhwc(32, 3, 3, 3), nhwc(1, 32, 1, 1).flatten(), "relu6", 2, 1)


def atrous(cache: int = 64 << 10):
    """A group of images is a quarter of the cache, on this chip as on others. As of an ASPP, its tiles run at once, and
    rectangles end with an image's rows: a tile of several images would read the groups behind its own."""
    x, weights = nhwc(8, 32, 16, 16), [nhwc(16, 32, 3, 3)]
    like: NamedTuple = H200
    chip = mock.patch.object(tables, "chip_of", lambda device: like._replace(l2_bytes=cache))
    with chip, override("atrous_conv_fwd", BLOCK_M=16, BLOCK_N=16, BLOCK_K=32):
        atrous_conv_fwd(x, weights, [], None, [4], "relu")


def atrous_weight():
    """Of 16 parts of 9 taps: only launches of fewer programs than a chip holds have parts."""
    x = nhwc(1, 32, 32, 32)
    with override("atrous_conv_bwd_weight", BLOCK_M=64, BLOCK_N=32, BLOCK_K=32):
        atrous_conv_bwd_weight(nhwc(1, 32, 32, 32), x, [3], [12])


def block():
    shapes = ((96, 16, 1, 1), (96,), (96, 1, 3, 3), (96,), (24, 96, 1, 1), (24,))
    weights = Weights(*(torch.randn(*shape).bfloat16() for shape in shapes))
    inverted_residual_fwd(nhwc(1, 16, 96, 64), weights, "relu6", 2, 1, False)


CASES = {
    pooling: (("max_pool_fwd", "max_unpool_fwd", "max_unpool_bwd"), 16 << 10),
    planes: (("max_pool_fwd", "max_unpool_fwd"), 64 << 10),
    bilinear: (("bilinear_fwd", "bilinear_bwd"), 32 << 10),
    heads: (("upsample_argmax_fwd", "upsample_cross_entropy_fwd", "upsample_cross_entropy_bwd"), 96 << 10),
    pointwise: (("separable_conv_fwd_pw",), 32 << 10),
    stem: (("stem_conv_fwd",), 24 << 10),
    atrous: (("atrous_conv_fwd",), 64 << 10),
    atrous_weight: (("atrous_conv_bwd_weight",), 24 << 10),
    block: (("inverted_residual_fwd",), 80 << 10),
}
TOGETHER = {atrous: 24, atrous_weight: 9}  # programs that run at once


@pytest.mark.parametrize("fn", CASES, ids=lambda fn: fn.__name__)
def test_operands_come_from_dram_once(fn):
    kernels, cache = CASES[fn]
    found = ratios(fn, kernels, cache, TOGETHER.get(fn, RESIDENT))
    assert found.keys() == set(kernels)
    assert {kernel: ratio for kernel, ratio in found.items() if ratio > MOST} == {}


def test_images_that_do_not_fit_the_cache_are_read_again():
    """All eight images in one group, as a chip of eight times the cache would have it."""
    assert ratios(lambda: atrous(8 * 64 << 10), ("atrous_conv_fwd",), 64 << 10, 24)["atrous_conv_fwd"] > 2
