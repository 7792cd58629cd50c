"""Predicted times of compiled kernels against what can be worked out by hand, and of forms against the cost models."""

from collections import Counter
from functools import partial

import pytest
import torch
import triton
import triton.language as tl

from fastseg.kernels.runtime.ceilings import CHIPS
from fastseg.kernels.runtime.conv_sizes import Geometry
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.separable_conv.cost import plan
from fastseg.kernels.tools.cases.separable_conv import separable as case
from fastseg.kernels.tools.predict import sass
from fastseg.kernels.tools.predict.model import predict_launches
from fastseg.kernels.tools.report import Launched, compile_launches

H200 = CHIPS["H200"]


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=0.0), mask=offs < n)


@triton.jit
def exp_kernel(x_ptr, y_ptr, steps, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    for _ in tl.range(0, steps, loop_unroll_factor=1):
        x = tl.exp2(x)
    tl.store(y_ptr + offs, x)


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n, offs_k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offs_m[:, None] * K + (k + offs_k)[None, :])
        b = tl.load(b_ptr + (k + offs_k)[:, None] * BLOCK_N + offs_n[None, :])
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(c_ptr + offs_m[:, None] * BLOCK_N + offs_n[None, :], acc)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def only(kernel, grid, *args, chip=H200, **options):
    run = lambda: launch(kernel, (grid,), *args, num_warps=4, enable_fp_fusion=True, **options)
    (prediction,) = predict_launches(run, chip)
    return prediction


@pytest.mark.parametrize("name", ["H200", "A100", "L4", "B200", "RTX 5090"])
def test_a_copy_takes_its_bytes(name):
    chip, x = CHIPS[name], meta(2**28)
    found = only(copy_kernel, 2**28 // 2048, x, meta(2**28), 2**28, chip=chip, BLOCK=2048)
    assert found.bound == "dram" and not found.assumed
    assert found.seconds == pytest.approx(2 * 4 * 2**28 / chip.bandwidth + chip.launch)
    part = only(copy_kernel, 2**28 // 2048, x, meta(2**28), 2**26, chip=chip, BLOCK=2048)
    assert part.terms["dram"] == pytest.approx(found.terms["dram"] / 4, rel=0.5)  # by three programs of the grid


def test_exponentials_take_the_special_units_by_the_loops_trips():
    """8 of a lane in each trip: 16 a cycle and multiprocessor. The trips are an argument."""
    of = lambda steps: only(exp_kernel, 13200, meta(13200 * 1024), meta(13200 * 1024), steps, BLOCK=1024)
    short, long = of(100), of(1000)
    assert long.bound == "special"
    assert long.terms["special"] == pytest.approx(1000 * 13200 * 1024 / H200.mufu, rel=0.02)
    # ptxas unrolls the loop: of what remains, half of its most trips are counted
    assert short.terms["special"] == pytest.approx(long.terms["special"] / 10, rel=0.05)


def test_products_take_the_matrix_units():
    K, blocks = 4096, {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}
    half = partial(meta, dtype=torch.bfloat16)
    found = only(dot_kernel, 1320, half(64 * 1320, K), half(K, 128), meta(64 * 1320, 128), K, **blocks)
    assert found.terms["matrix"] == pytest.approx(2 * 64 * 1320 * 128 * K / H200.half)
    few = only(dot_kernel, 10, half(640, K), half(K, 128), meta(640, 128), K, **blocks)
    assert few.bound == "latency" and few.terms["matrix"] == pytest.approx(found.terms["matrix"] / 10)


def test_the_fused_kernel_asks_for_the_next_taps_before_its_product():
    """One loop, over channels: all loads, nine tap tiles and weights of the next step, stand before the product of this
    step, and a norm's scale is one instruction of the special units for each channel of a thread."""
    fused: list[Launched] = []
    decoder = partial(case, torch.bfloat16, N=16, C=304, H=128, W=128, COUT=256)
    compile_launches(decoder, "sm_90", each=fused.append)
    (launched,) = fused
    listing = sass.read(sass.disassemble(launched.cubin))
    (loop,) = listing.loops
    inside = [listing.instructions[i] for i in sass.own(loop)]
    special = Counter(one.suffixes[0] for one in inside if one.opcode == "MUFU")
    assert loop.inner == [] and launched.report.code.spills == 0
    assert special == {"RSQ": 8}
    first_sum = next(i for i, one in enumerate(inside) if one.opcode in ("FFMA", "FMUL"))
    product = next(i for i, one in enumerate(inside) if one.opcode == "HGMMA")
    assert first_sum < product
    loads = [i for i, one in enumerate(inside) if one.opcode == "LDG" and "128" in one.suffixes]
    assert len(loads) >= 9 and max(loads) < product  # ptxas moves most of them up, in front of this step's sums
    assert sum(i > first_sum for i in loads) >= 5
    before = listing.instructions[: min(sass.own(loop))]  # the first step's: only a loop that loads ahead needs them
    assert sum(one.opcode == "LDG" and "128" in one.suffixes for one in before) >= 9


# (N, C, H, W, COUT) -> the least and the most of split over fused by the static model. Where split is the faster by it
# and the cost model takes fused (`separable_conv/cost.py` says why), the ratio is written here.
SHAPES = {
    (16, 728, 32, 32, 728): (0.4, 0.8),  # Xception's middle flow: both say split
    (16, 304, 128, 128, 256): (0.8, 1.2),  # the decoder: the cost model says fused
}


@pytest.mark.parametrize("N, C, H, W, COUT", SHAPES)
def test_forms_in_the_order_of_the_static_model(N, C, H, W, COUT):
    g = Geometry(N, C, H, W, COUT, H, W, 3, 1, 1, 1)
    us = {}
    for form in ("fused", "split"):
        found = predict_launches(partial(case, torch.bfloat16, N=N, C=C, H=H, W=W, COUT=COUT, form=form), H200)
        us[form] = sum(one.us for one in found)
    least, most = SHAPES[N, C, H, W, COUT]
    assert least <= us["split"] / us["fused"] <= most, us
    assert plan(g, torch.bfloat16, mid_batch_stats=False).pays == (C == 304)
