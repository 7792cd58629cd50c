"""At batch 1 launches fill the chip: programs of every launch of a network, counted with the decisions of CUDA."""

import math

import pytest
import torch

import fastseg
from fastseg.kernels.runtime.ceilings import ALONE, CHIPS, H200, spread
from fastseg.models import create
from fastseg.ops.core.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="launches are counted on CPU tensors")

if INTERPRETED:
    from fastseg.kernels.runtime.config import candidates_of
    from fastseg.kernels.runtime.conv_sizes import Geometry
    from fastseg.kernels.runtime.launch import intercept
    from fastseg.kernels.separable_conv.cost import fused_tile, plan, pw_tile

FEWEST = H200.multiprocessors // 2
bf16 = torch.bfloat16


def programs_of(backbone, **options):
    """(kernel, programs) of each launch of DeepLabV3+ on one 512x512 image, weights folded before."""
    from benchmarks.studies import launches

    model = create("deeplabv3plus", 21, backbone=backbone, **options).eval()
    model = model.to(bf16, memory_format=torch.channels_last)
    x = torch.zeros(1, 3, 512, 512, dtype=bf16).to(memory_format=torch.channels_last)
    found = []
    with torch.no_grad(), fastseg.frozen(model), launches.count():
        model(x)
        with intercept(lambda kernel, grid, args, kwargs: found.append((kernel.fn.__name__, math.prod(grid)))):
            model(x)
    return found


@pytest.mark.parametrize("backbone, options, count", [("mobilenet_v2", {}, 36), ("xception", {"preset": "google"}, 70)])
def test_no_launch_at_batch_1_leaves_most_of_the_chip_idle(backbone, options, count):
    found = programs_of(backbone, **options)
    assert len(found) >= count
    few = [launch for launch in found if launch[1] < FEWEST]  # the tables are some kilobytes of numbers
    assert [launch for launch in few if launch[0] != "_atrous_conv_tables_kernel"] == []


def test_few_programs_take_longer_by_the_chip_they_leave_idle():
    assert spread(264) == spread(10**6) == 1.0 and spread(132) == 2.0 and spread(16) == 132 / (ALONE * 16)
    assert spread(264, CHIPS["MI300X"]) == pytest.approx(304 / 132)


def test_tiles_shrink_where_a_map_has_few():
    large, small = (16 * 128 * 128, 304, 256), (32 * 32, 960, 160)
    assert fused_tile(*large, 3, bf16) == (8, 8, 256)  # as without the term for few programs
    assert fused_tile(*small, 3, bf16) == (4, 4, 128) and fused_tile(*small, 3, bf16).programs(32 * 32, 160) == 128
    assert pw_tile(16 * 128 * 128, 256, bf16) == (128, 128)
    assert pw_tile(32 * 32, 256, bf16) == (64, 32)
    assert pw_tile(32 * 32, 256, torch.float32)[0] == 64


def test_tuning_tries_narrow_blocks_and_128_registers():
    key = {"C": 960, "COUT": 160, "dtype": bf16}
    rows = candidates_of("separable_conv_fwd_fused", 1024, K=3, stats=False, **key)
    assert {32, 64, 128, 256} <= {row["BLOCK_N"] for row in rows} and {128, 255} == {row["maxnreg"] for row in rows}
    assert {row["num_warps"] for row in rows} == {4, 8}
    assert {32, 64, 128} <= {row["BLOCK_N"] for row in candidates_of("separable_conv_fwd_pw", 1024, **key)}


def test_the_form_depends_on_the_chip():
    """Computing the depthwise half three times costs an A100 or a B200 more, for each byte, than it costs an L4."""
    g = Geometry(8, 728, 64, 128, 728, 64, 128, 3, 1, 1, 1)
    fused = {name: plan(g, bf16, mid_batch_stats=False, chip=chip).pays for name, chip in CHIPS.items()}
    assert (fused["A100"], fused["B200"], fused["L4"]) == (False, False, True)
    assert str(plan(g, bf16, mid_batch_stats=False, chip=CHIPS["L4"])).endswith("us on an L4")
