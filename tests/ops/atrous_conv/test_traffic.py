"""Counted traffic and launches of the atrous convolution: the figures in the header of kernels/atrous_conv/fwd.py."""

import pytest
import torch

import fastseg
from fastseg.kernels.runtime import config
from fastseg.ops import atrous_conv2d
from fastseg.ops.atrous_conv2d import atrous_branches
from fastseg.ops.core.dispatch import INTERPRETED

if INTERPRETED:
    from traffic import count_traffic

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="traffic is counted under the interpreter")

N, C, COUT, H, W = 2, 16, 16, 4, 4
A, Y = 4 * N * C * H * W, 4 * N * COUT * H * W


@pytest.fixture(autouse=True)
def _own():
    """The own kernels, whatever the cost model says."""
    with fastseg.force("atrous_branches", "kernel"):
        yield


def tensors(*kernels: int):
    x = torch.randn(N, C, H, W).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = [torch.randn(COUT, C, K, K).contiguous(memory_format=torch.channels_last) for K in kernels]
    return x, [w.requires_grad_() for w in weights], [torch.randn(COUT) for _ in kernels]


TABLES, FWD = "_atrous_conv_tables_kernel", "_atrous_conv_fwd_kernel"


def test_branches_are_one_launch_that_reads_the_map_once():
    """A rate past the map leaves one weight of nine; the tables, a launch before, are a few integers a rectangle."""
    x, weights, biases = tensors(1, 3, 3)
    with torch.no_grad(), count_traffic() as traffic:
        atrous_branches(x, weights, biases, [1, 2, 7], "relu")
    assert list(traffic.by_kernel) == [TABLES, FWD]
    assert traffic.by_kernel[TABLES].read_bytes == 0 and traffic.by_kernel[TABLES].written_bytes <= 4 * 16 * 32
    total, read = traffic.by_kernel[FWD], A + 4 * C * COUT * (1 + 9 + 1) + 3 * 4 * COUT
    assert (total.launches, total.written_bytes) == (1, 3 * Y)
    assert 0 < total.read_bytes - read <= 4 * 16 * 16  # tables


def test_a_chain_reads_what_was_summed_before():
    x, (weight,), (bias,) = tensors(3)
    residual = torch.randn(N, COUT, H, W).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), count_traffic() as traffic:
        atrous_conv2d(x, weight, bias, 7, residual=residual)
    total = traffic.by_kernel[FWD]
    assert (total.launches, total.written_bytes) == (1, Y)
    assert 0 < total.read_bytes - (A + Y + 4 * C * COUT + 4 * COUT) <= 4 * 16 * 16


def test_pixels_are_loaded_as_often_as_taps_are_executed():
    """Every access counted: a tap in padding is not loaded and masked, it is not there."""
    x, (weight,), _ = tensors(3)
    loads = {}
    with torch.no_grad(), config.override("atrous_conv_fwd", BLOCK_M=16, BLOCK_N=16, BLOCK_K=16):
        for dilation in (2, 3, 7):
            with count_traffic() as traffic:
                atrous_conv2d(x, weight, dilation=dilation)
            loads[dilation] = traffic.total.reads
    # (Row, tap) pairs in whole tiles of 16 rows. Rate 2: four 2x2 rectangles with 2x2 taps each; rate 3: corners with
    # 2x2, edges with 2, the centre with 1; rate 7: the map, in two tiles, with 1.
    rows = {2: 16 * 4 * 4, 3: 16 * (4 * 4 + 4 * 2 + 1), 7: 16 * 2}
    for dilation, pairs in rows.items():
        weights = pairs // 16 * C * COUT  # each tile and tap reads its weights
        assert 0 <= loads[dilation] - pairs * C - weights <= 16 * 16 * 2, dilation


def test_backward_reads_each_map_once_a_launch():
    x, weights, _ = tensors(1, 3)
    y = atrous_branches(x, weights, None, [1, 2])
    dy = torch.randn_like(y)
    with count_traffic() as traffic:
        y.backward(dy)
    by_kernel = traffic.by_kernel
    assert {name: t.launches for name, t in by_kernel.items()} == {
        TABLES: 1,
        FWD: 1,
        "_atrous_conv_bwd_weight_kernel": 1,
    }
    taps = 4 * C * COUT * 10
    dx, dw = by_kernel["_atrous_conv_fwd_kernel"], by_kernel["_atrous_conv_bwd_weight_kernel"]
    assert dx.written_bytes == A and 0 < dx.read_bytes - (2 * Y + taps) <= 4 * 40 * 16
    assert dw.written_bytes == taps and dw.read_bytes == A + 2 * Y
