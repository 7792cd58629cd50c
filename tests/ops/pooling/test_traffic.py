"""Counted traffic of pooling and unpooling: the floors in the headers of kernels/pooling/max_pool.py and max_unpool.py.

Bytes are distinct bytes per launch, counted by the interpreter's checker; hi cells, lo windows, in fp32.
"""

import pytest
import torch

from fastseg.ops import BatchNormArgs, batch_norm_act_max_pool2d, max_pool2d, max_unpool2d
from fastseg.ops.core.dispatch import INTERPRETED

if INTERPRETED:
    from traffic import count_launches, count_traffic

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="traffic is counted under the interpreter")

N, C, H, W = 2, 32, 18, 32
HI, LO = 4 * N * C * H * W, 4 * N * C * H * W // 4
CODES, INT64 = LO // 4 // 4, 2 * LO  # bytes of 2 bits and of 8 bytes a window
LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])


def image(last: bool, requires_grad: bool = True) -> torch.Tensor:
    x = torch.randn(N, C, H, W)
    return (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_(requires_grad)


def total_of(fn):
    with count_traffic() as traffic:
        result = fn()
    return traffic.total.read_bytes + traffic.total.written_bytes, traffic.total.launches, result


@LAYOUTS
@pytest.mark.parametrize("index_format, index", [("compact", CODES), ("int64", INT64)])
def test_every_pass_is_at_its_floor(index_format, index, last):
    """At most 1.05 times the floor, forward and backward of pooling and of unpooling; with codes to the byte."""
    floor = HI + LO + index
    x = image(last)
    moved, launches, (values, indices) = total_of(
        lambda: max_pool2d(x, 2, return_indices=True, index_format=index_format)
    )
    assert (moved, launches) == (floor, 1)

    dy = torch.randn_like(values)
    moved, launches, _ = total_of(lambda: torch.autograd.grad(values, x, dy))
    assert (moved, launches) == (floor, 1)

    v = values.detach().requires_grad_()
    moved, launches, y = total_of(lambda: max_unpool2d(v, indices, 2))
    if index_format == "compact":
        assert (moved, launches) == (floor, 1)
    else:  # a report of 4 bytes a program, written, and read by the second kernel
        assert floor < moved <= 1.05 * floor and launches == 2

    dy = torch.randn_like(y)
    moved, launches, _ = total_of(lambda: torch.autograd.grad(y, v, dy))
    assert launches == 1
    # It reads one cell a window; on a GPU whole sectors come with it, at most the map.
    assert moved == 2 * LO + index <= 1.05 * floor


def test_the_fused_stage():
    """Evaluation and training read the convolution's output once and twice; the normalised map is nowhere."""
    x = image(last=True, requires_grad=False)
    vectors = [torch.rand(C) + 0.5 for _ in range(4)]
    norms = 4 * 4 * C
    fixed = BatchNormArgs(*vectors)
    moved, launches, _ = total_of(lambda: batch_norm_act_max_pool2d(x, fixed, "relu", return_indices=True))
    assert (moved, launches) == (HI + LO + CODES + norms, 1)

    x.requires_grad_()
    batch = BatchNormArgs(*vectors, training=True)
    moved, launches, y = total_of(lambda: batch_norm_act_max_pool2d(x, batch, "relu"))
    floor = 2 * HI + LO + CODES
    assert floor < moved <= 1.05 * floor and launches == 3

    dy = torch.randn_like(y)
    moved, launches, _ = total_of(lambda: torch.autograd.grad(y, x, dy))
    chosen = LO  # of x in the reduction
    floor = (LO + CODES + chosen) + (2 * HI + LO + CODES)
    assert floor < moved <= 1.05 * floor and launches == 2


@LAYOUTS
def test_overlapping_windows_read_each_cell_once(last):
    x = image(last)
    moved, _, y = total_of(lambda: max_pool2d(x, 3, 2, 1))
    windows = 4 * N * C * (H // 2) * (W // 2)
    assert moved == HI + windows + windows // 8  # codes of 4 bits
    moved, _, _ = total_of(lambda: y.sum().backward())
    assert moved == HI + windows + windows // 8


def test_a_model_stage_is_two_launches():
    """Down: one; up, from its codes: one. int64 indices are checked by a second."""
    x = image(last=True, requires_grad=False)
    with torch.no_grad():
        for index_format, up in (("compact", 1), ("int64", 2)):
            with count_launches() as launches:
                values, indices = max_pool2d(x, 2, return_indices=True, index_format=index_format)
                max_unpool2d(values, indices, 2)
            assert sum(launches.values()) == 1 + up


@LAYOUTS
@pytest.mark.parametrize("C, side", [(8, 32)])
def test_foreign_indices_cost_at_most_four_times_local_ones(last, C, side):
    """Windows of another plane's width, as after pooling an odd map: the same bytes at most three times again, and no
    chain of steps as long as a plane."""
    fmt = torch.channels_last if last else torch.contiguous_format
    v = torch.randn(2, C, side, side).contiguous(memory_format=fmt)
    offsets = torch.arange(side)[:, None] * 2 * (2 * side + 1) + torch.arange(side) * 2  # as of planes one wider
    foreign = offsets.clamp(max=4 * side * side - 1).expand(2, C, side, side).contiguous(memory_format=fmt)
    offsets = torch.arange(side)[:, None] * 4 * side + torch.arange(side) * 2
    local = offsets.expand(2, C, side, side).contiguous(memory_format=fmt)
    local_bytes, launches, _ = total_of(lambda: max_unpool2d(v, local, 2))
    with count_traffic() as traffic:
        y = max_unpool2d(v, foreign, 2)
    moved = traffic.total
    assert moved.launches == launches and torch.equal(y, torch.nn.functional.max_unpool2d(v, foreign, 2))
    assert local_bytes < moved.read_bytes + moved.written_bytes <= 4 * local_bytes
    elements = v.numel()  # each window is looked at twice by the second kernel, each cell's maximum set once
    second = traffic.by_kernel["_max_unpool_fwd_foreign_kernel"]
    assert second.writes <= (4 + 1 + 1) * elements + 2
