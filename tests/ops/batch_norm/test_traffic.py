"""Counted traffic and launches of batch norm + residual + activation: the floors in the headers of the kernels.

Bytes are distinct bytes per launch, counted by the interpreter's checker; MC is one map in fp32.
"""

import pytest
import torch
from torch import Tensor

from fastseg.ops import BatchNormArgs, batch_norm_act
from fastseg.ops.core.dispatch import INTERPRETED

if INTERPRETED:
    from traffic import count_traffic

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="traffic is counted under the interpreter")

N, C, H, W = 2, 32, 64, 64
MC = 4 * N * C * H * W
ROWS = pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])


def make(last: bool, training: bool, residual: bool, grad: bool) -> tuple[Tensor, BatchNormArgs, Tensor | None]:
    layout = torch.channels_last if last else torch.contiguous_format
    draw = lambda: torch.randn(N, C, H, W).contiguous(memory_format=layout).requires_grad_(grad)
    vector = lambda: torch.rand(C) + 0.5
    norm = BatchNormArgs(vector(), vector(), vector().requires_grad_(grad), vector().requires_grad_(grad), training)
    return draw(), norm, draw() if residual else None


def moved(fn) -> tuple[float, dict[str, int], object]:
    """Maps moved, launches by kernel, result."""
    with count_traffic() as traffic:
        result = fn()
    launches = {
        name.removeprefix("_batch_").removesuffix("_kernel"): t.launches for name, t in traffic.by_kernel.items()
    }
    return (traffic.total.read_bytes + traffic.total.written_bytes) / MC, launches, result


def at_floor(maps: float, floor: int) -> None:
    assert floor < maps <= 1.05 * floor, (maps, floor)


@LAYOUTS
@ROWS
def test_training(residual, last):
    """Statistics read x; forward reads x (and the residual), writes y. The backward reads dy and x twice, with a
    residual dy, x and y, then the residual's gradient, which the first pass wrote, and x; and writes dx."""
    x, norm, r = make(last, True, residual, grad=True)
    maps, launches, y = moved(lambda: batch_norm_act(x, norm, "relu", r))
    at_floor(maps, 3 + residual)
    assert launches == {"norm_tile_stats": 1, "stats": 1, "norm_act_fwd": 1}
    dy = torch.randn_like(y)
    leaves = [t for t in (x, norm.weight, norm.bias, r) if t is not None]
    maps, launches, _ = moved(lambda: torch.autograd.grad(y, leaves, dy))
    at_floor(maps, 5 + 2 * residual)
    assert launches == {"norm_act_bwd_reduce": 1, "norm_act_bwd_input": 1}


@LAYOUTS
@ROWS
def test_fixed_statistics(residual, last):
    """One pass each way."""
    x, norm, r = make(last, False, residual, grad=True)
    maps, launches, y = moved(lambda: batch_norm_act(x, norm, "relu", r))
    at_floor(maps, 2 + residual)
    assert launches == {"norm_act_fwd": 1}
    dy = torch.randn_like(y)
    leaves = [t for t in (x, norm.weight, norm.bias, r) if t is not None]
    maps, launches, _ = moved(lambda: torch.autograd.grad(y, leaves, dy))
    at_floor(maps, 3 + 2 * residual)
    assert launches == {"norm_act_bwd_reduce": 1}
