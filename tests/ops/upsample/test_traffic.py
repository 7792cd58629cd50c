"""Counted traffic of the bilinear kernels: every byte of input and output once, in either layout and direction.

Distinct bytes per launch, counted by the interpreter's checker; and loads, which say what L1 has to carry.
"""

import pytest
import torch

from fastseg.ops import bilinear_conv_transpose2d, upsample_bilinear
from fastseg.ops.core.dispatch import INTERPRETED

if INTERPRETED:
    from traffic import count_traffic

    from fastseg.kernels.runtime import config

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="traffic is counted under the interpreter")

CL, NCHW = torch.channels_last, torch.contiguous_format
N, SIDE = 2, 6
LAYOUTS = [(NCHW, 3), (CL, 8), (CL, 3)]
IDS = ["nchw", "nhwc-vectors", "nhwc-elements"]

OPS = {  # op, outputs per input side
    "x4": (lambda x, **kw: upsample_bilinear(x, scale_factor=4), 24),
    "x4 corners": (lambda x, **kw: upsample_bilinear(x, scale_factor=4, align_corners=True), 24),
    "to 11": (lambda x, **kw: upsample_bilinear(x, size=11), 11),
    "deconv k4 s2": (lambda x, **kw: bilinear_conv_transpose2d(x, 2, **kw), 12),
}


@pytest.fixture(autouse=True)
def _strips():
    with config.override("bilinear_fwd", ROWS=8), config.override("bilinear_bwd", ROWS=8):
        yield


def run(op, C: int, layout):
    """-> the launches of forward and backward, bytes of the low and of the high map."""
    x = torch.randn(N, C, SIDE, SIDE).to(memory_format=layout).requires_grad_()
    with count_traffic() as traffic:
        y = op(x)
        y.backward(torch.randn_like(y))
    (_, forward), (_, backward) = traffic.launches
    return forward, backward, 4 * x.numel(), 4 * y.numel()


@pytest.mark.parametrize(("layout", "C"), LAYOUTS, ids=IDS)
@pytest.mark.parametrize("name", OPS)
def test_every_byte_once(name, layout, C):
    op, side = OPS[name]
    forward, backward, lo, hi = run(op, C, layout)
    assert hi == 4 * N * C * side * side
    assert (forward.read_bytes, forward.written_bytes) == (lo, hi)
    assert (backward.read_bytes, backward.written_bytes) == (hi, lo)
    assert forward.launches == backward.launches == 1


@pytest.mark.parametrize(("layout", "C"), LAYOUTS, ids=IDS)
def test_loads(layout, C):
    """Forward: 4 taps an output column for each new pair of rows, not for each row. Backward: each output twice."""
    forward, backward, _, hi = run(OPS["x4"][0], C, layout)
    pairs = 6 + 1 + 2  # input row pairs of 24 output rows, and one more for each of two strips cut inside a pair
    assert forward.reads <= pairs * 4 * hi // 4 // 24
    assert backward.reads <= 2 * hi // 4


def test_smaller_reads_only_what_it_takes():
    x = torch.randn(1, 8, 12, 12).to(memory_format=CL)
    with count_traffic() as traffic:
        y = upsample_bilinear(x, scale_factor=0.25)
    assert traffic.total.read_bytes == 4 * 8 * (2 * 3) ** 2  # two rows and two columns of every four
    assert traffic.total.written_bytes == 4 * y.numel()


def test_the_skip_adds_one_read_of_its_window():
    x = torch.randn(2, 8, 3, 4).to(memory_format=CL)
    skip = torch.randn(2, 8, 16, 17).to(memory_format=CL)
    with count_traffic() as traffic:
        y = bilinear_conv_transpose2d(x, 2, 4, 0, skip=skip, skip_offset=5, bias=torch.randn(8))
    assert traffic.total.read_bytes == 4 * (x.numel() + y.numel() + 8)
    assert traffic.total.written_bytes == 4 * y.numel()
    assert traffic.total.launches == 1
