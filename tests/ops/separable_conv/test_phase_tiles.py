"""Tiles of dilated convolutions in phase order: the order itself, what a tile reads, and who asks for it."""

import pytest
import torch

from fastseg.kernels.runtime.conv_sizes import Geometry
from fastseg.ops import separable_conv2d
from fastseg.ops.core.dispatch import INTERPRETED

triton = pytest.importorskip("triton")
import triton.language as tl

from fastseg.kernels.common.tiles import in_phase_order
from fastseg.kernels.runtime.launch import intercept, launch


@triton.jit
def _order_kernel(out_ptr, size, phases, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, in_phase_order(i, size, phases), mask=i < size)


@pytest.mark.parametrize("size", [1, 7, 32, 33, 64])
@pytest.mark.parametrize("phases", [1, 2, 6, 18, 40])
def test_the_order(size, phases, device):
    out = torch.empty(size, dtype=torch.int32, device=device)
    launch(_order_kernel, (1,), out, size, phases, BLOCK=64)
    assert out.tolist() == sorted(range(size), key=lambda i: (i % phases, i))


def reads(size: int, rate: int, tile: tuple[int, int], phased: bool) -> float:
    """Input pixels of the map that a tile of 3x3 taps reads, for each of its own; the mean over tiles."""
    order = sorted(range(size), key=lambda i: (i % rate, i)) if phased else list(range(size))
    sides = []
    for length in tile:
        parts = (order[start : start + length] for start in range(0, size, length))
        sides.append([len({i + k * rate for i in part for k in (-1, 0, 1)} & set(order)) for part in parts])
    return sum(sides[0]) * sum(sides[1]) / size**2


@pytest.mark.parametrize(
    ("size", "rate", "contiguous", "phase"), [(32, 6, 2.9, 1.3), (64, 12, 5.5, 1.31), (64, 18, 5.9, 1.1)]
)
def test_a_tile_reads_hardly_more_than_its_own_pixels(size, rate, contiguous, phase):
    assert reads(size, rate, (8, 16), phased=False) > contiguous
    assert reads(size, rate, (8, 16), phased=True) < phase


@pytest.mark.skipif(not INTERPRETED, reason="kernels are not run")
@pytest.mark.parametrize(
    ("options", "phased"), [({"dilation": 6}, True), ({}, False), ({"dilation": 2, "stride": 2}, False)]
)
def test_dilated_convolutions_ask_for_it(options, phased):
    """Forward and the gradient at the input, both forms."""
    x = torch.randn(1, 8, 9, 9, requires_grad=True)
    asked = set()

    def look(kernel, grid, args, kwargs):
        if "PHASED" in kwargs:
            asked.add((kernel.fn.__name__, kwargs["PHASED"]))

    with intercept(look):
        separable_conv2d(x, torch.randn(8, 1, 3, 3), torch.randn(8, 8, 1, 1), **options).sum().backward()
    assert {flag for _, flag in asked} == {phased}
    assert any("bwd_dw_input" in name for name, _ in asked) and any("fwd" in name for name, _ in asked)
    assert Geometry(1, 8, 9, 9, 8, 9, 9, 3, options.get("stride", 1), 6, options.get("dilation", 1)).phased == phased
