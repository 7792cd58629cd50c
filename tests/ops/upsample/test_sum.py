"""Sum of upsampled maps in one kernel: torch's numbers and gradients, in every layout; every byte once."""

import pytest
import torch
from torch import Tensor

from fastseg.ops import BatchNormArgs, upsample_sum
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.upsample_sum import upsample_sum_ref
from fastseg.testing import check_op, guard, guarded

if INTERPRETED:
    from traffic import count_traffic

    from fastseg.kernels.runtime import config

CL, NCHW = torch.channels_last, torch.contiguous_format
SIZES = [(3, 4), (1, 1), (6, 10), (2, 7), (9, 5)]


def draw(C: int, size, layout, dtype, device) -> Tensor:
    x = torch.randn(2, C, *size, dtype=torch.float64).to(dtype).to(device, memory_format=layout)
    return x.requires_grad_()


def call(op, corners: bool, **options):
    return lambda base, *maps: op(base, maps, align_corners=corners, **options)


@pytest.mark.parametrize("corners", [False, True], ids=["centres", "corners"])
@pytest.mark.parametrize(("count", "C", "layout"), [(1, 3, NCHW), (2, 3, CL), (3, 8, CL), (5, 2, NCHW)])
def test_values_and_gradients(count, C, layout, corners, device):
    """Also of a map as large as the sum, of one pixel, and of one that is larger; five maps are two launches."""
    dtype = torch.float64 if INTERPRETED else torch.float32
    tensors = [draw(C, size, layout, dtype, device) for size in ((6, 10), *SIZES[:count])]
    check_op(call(upsample_sum, corners), call(upsample_sum_ref, corners), tensors)
    assert upsample_sum(tensors[0], tensors[1:]).stride() == tensors[0].stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("C", "layout"), [(3, CL), (8, CL), (3, NCHW)], ids=["elements", "vectors", "nchw"])
def test_epilogue_without_gradients(C, layout, dtype, device):
    """Norm, bias and activation as the reference, which computes in float64 here."""
    base, *maps = [draw(C, size, layout, dtype, device).detach() for size in ((5, 9), (3, 4), (2, 2))]
    vector = lambda: torch.rand(C, device=device) + 0.5
    norm, bias = BatchNormArgs(vector(), vector(), vector(), vector()), vector()
    for n, b in ((norm, bias), (norm, None), (None, bias), (norm._replace(weight=None, bias=None), None)):
        got = upsample_sum(base, maps, b, norm=n, act="relu6")
        wide = [None if t is None else t.double() if isinstance(t, Tensor) else t for t in n] if n else None
        want = upsample_sum_ref(
            base.double(), [m.double() for m in maps], None if b is None else b.double(),
            norm=None if wide is None else BatchNormArgs(*wide), act="relu6",
        )  # fmt: skip
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=2e-6)


def test_a_norm_with_the_batchs_statistics(device):
    base, small = draw(4, (5, 6), CL, torch.float32, device), draw(4, (2, 3), CL, torch.float32, device)
    stats = [[torch.zeros(4, device=device), torch.ones(4, device=device)] for _ in range(2)]
    norms = [BatchNormArgs(*s, training=True) for s in stats]
    results = []
    for op, norm in zip((upsample_sum, upsample_sum_ref), norms, strict=True):
        y = op(base, [small], norm=norm, act="relu")
        results.append([y, *torch.autograd.grad(y.square().sum(), (base, small))])
    for got, want in zip((*results[0], *stats[0]), (*results[1], *stats[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)


def test_tiles_cut_at_both_ends(device):
    dtype = torch.float64 if INTERPRETED else torch.float32
    size, small = ((5, 11), (4, 6)) if INTERPRETED else ((67, 131), (17, 30))
    for C, layout in ((12, CL), (5, CL), (9, NCHW)):
        tensors = [draw(C, s, layout, dtype, device) for s in (size, small, (2, 2))]
        if INTERPRETED:
            with config.override("upsample_sum_fwd", ROWS=2, BLOCK_W=8, BLOCK_C=8):
                check_op(call(upsample_sum, False), call(upsample_sum_ref, False), tensors)
        else:
            check_op(call(upsample_sum, False), call(upsample_sum_ref, False), tensors)


def test_nothing_is_touched_outside(device):
    with guarded():
        tensors = [guard(draw(3, size, NCHW, torch.float32, device).detach()) for size in ((5, 7), (2, 3), (3, 3))]
        y = upsample_sum(tensors[0], tensors[1:], act="relu")
    torch.testing.assert_close(y, upsample_sum_ref(tensors[0], tensors[1:], act="relu"), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not INTERPRETED, reason="traffic is counted under the interpreter")
@pytest.mark.parametrize(("layout", "C"), [(NCHW, 3), (CL, 8), (CL, 3)], ids=["nchw", "vectors", "elements"])
def test_every_byte_once(layout, C):
    base, *maps = [draw(C, size, layout, torch.float32, "cpu").detach() for size in ((12, 12), (3, 3), (6, 6), (2, 4))]
    bias = torch.randn(C)
    with count_traffic() as traffic, config.override("upsample_sum_fwd", ROWS=8):
        upsample_sum(base, maps, bias, act="relu")
    assert traffic.total.launches == 1
    assert traffic.total.read_bytes == 4 * (base.numel() + sum(m.numel() for m in maps) + C)
    assert traffic.total.written_bytes == 4 * base.numel()
