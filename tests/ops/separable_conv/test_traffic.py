"""Counted traffic and launches of the separable convolution: the figures in its header.

A = x, U = the depthwise map, Y = the output; bytes are distinct bytes per launch, counted by the interpreter's checker.
"""

import pytest
import torch
from separable_inputs import make

import fastseg
from fastseg.kernels.separable_conv.cost import fused_tile
from fastseg.ops import separable_conv2d
from fastseg.ops.core.dispatch import INTERPRETED

if INTERPRETED:
    from traffic import count_launches, count_traffic

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="traffic is counted under the interpreter")

N, C, COUT, SIDE = 2, 32, 16, 16
A = U = 4 * N * C * SIDE * SIDE
Y = 4 * N * COUT * SIDE * SIDE
WEIGHTS = 4 * C * 9 + 4 * C * COUT
NORMS = 4 * 4 * (C + COUT)  # four vectors each


@pytest.fixture(params=["fused", "split"])
def form(request):
    """Run the op in one form whatever the cost model says."""
    with fastseg.force("separable_conv2d", request.param):
        yield request.param


def traffic_of(fn):
    with count_traffic() as traffic:
        fn()
    return traffic


def test_evaluation_moves_what_the_header_says_to_the_byte(form):
    inputs, kwargs = make("aspp", N=N, C=C, H=SIDE, W=SIDE, COUT=COUT)
    with torch.no_grad():
        traffic = traffic_of(lambda: separable_conv2d(*inputs, **kwargs))
    total = traffic.total
    between = 0 if form == "fused" else U
    assert total.read_bytes == A + between + WEIGHTS + NORMS
    assert total.written_bytes == between + Y
    assert total.launches == (1 if form == "fused" else 2)


def test_training_forward(form):
    inputs, kwargs = make("aspp", N=N, C=C, H=SIDE, W=SIDE, COUT=COUT, training=True)
    by_kernel = traffic_of(lambda: separable_conv2d(*inputs, **kwargs)).by_kernel
    partial = lambda channels, tiles: 4 * 2 * channels * tiles + 4 * tiles  # (mean, deviations) and a count per tile
    dw = by_kernel["_separable_conv_fwd_dw_kernel"]
    dw_tiles = N * (SIDE // 8) * (SIDE // 16)
    assert dw.read_bytes == A + 4 * C * 9
    assert dw.written_bytes == partial(C, dw_tiles) + (0 if form == "fused" else U)
    gemm = by_kernel[f"_separable_conv_fwd_{'fused' if form == 'fused' else 'pw'}_kernel"]
    assert gemm.read_bytes == (A + WEIGHTS if form == "fused" else U + 4 * C * COUT) + 4 * 4 * C
    pixels = N * SIDE * SIDE
    tile = fused_tile(pixels, C, COUT, 3, torch.float32)  # smaller ones on a map that leaves the chip idle
    tiles = pixels // (tile.H * tile.W if form == "fused" else 64)
    assert gemm.written_bytes == Y + partial(COUT, tiles)
    last = by_kernel["_batch_norm_act_fwd_kernel"]
    assert (last.read_bytes, last.written_bytes) == (Y + 4 * 4 * COUT, Y)
    assert {name: t.launches for name, t in by_kernel.items()} == {
        "_separable_conv_fwd_dw_kernel": 1,
        "_batch_stats_kernel": 2,
        f"_separable_conv_fwd_{'fused' if form == 'fused' else 'pw'}_kernel": 1,
        "_batch_norm_act_fwd_kernel": 1,
    }


def test_backward():
    inputs, kwargs = make("aspp", N=N, C=C, H=SIDE, W=SIDE, COUT=COUT, training=True)
    y = separable_conv2d(*inputs, **kwargs)
    dy = torch.randn_like(y)
    by_kernel = traffic_of(lambda: y.backward(dy)).by_kernel
    pixels = N * SIDE * SIDE
    maps = {  # read, written maps, written partial sums; weights and vectors are read on top
        "_separable_conv_fwd_dw_kernel": (A, U, 0),
        "_batch_norm_act_bwd_reduce_kernel": (2 * Y, 0, 4 * 2 * COUT * (pixels // 256)),
        "_separable_conv_bwd_pw_input_kernel": (2 * Y + U, U, 4 * 2 * C * (pixels // 64)),
        "_separable_conv_bwd_pw_weight_kernel": (2 * Y + U, 0, 4 * COUT * C * (pixels // 32)),
        "_separable_conv_bwd_dw_input_kernel": (2 * U, A, 0),
        "_separable_conv_bwd_dw_weight_kernel": (2 * U + A, 0, 4 * C * 9 * (pixels // 64)),
    }
    assert by_kernel.keys() == maps.keys()
    for name, (read, written, partial) in maps.items():
        t = by_kernel[name]
        assert t.launches == 1
        assert read <= t.read_bytes <= read + WEIGHTS + 2 * NORMS, name
        assert t.written_bytes == written + partial, name


def test_one_launch_a_pair_in_a_network():
    inputs, kwargs = make("mobilenet", N=1, C=16, H=8, W=8, COUT=16)
    with torch.no_grad(), count_launches() as launches:
        x = inputs[0]
        for _ in range(3):
            x = separable_conv2d(
                x,
                *inputs[1:],
                **kwargs,
            )
    assert launches == {"_separable_conv_fwd_fused_kernel": 3}
