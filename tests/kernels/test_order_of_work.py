"""DRAM bytes of launches, by the order their programs start in, through a model of the L2 (``l2.py``).

The problem is small in everything: 256 pixels of 48 channels in blocks of 16, and a cache of 24 KB. A map is larger
than the cache, as the decoder's maps of 134 and 159 MB are larger than an H200's.
"""

from contextlib import ExitStack

import numpy as np
import pytest
import torch

import fastseg
from fastseg.ops.core.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="launches are replayed from the interpreter's log")

if INTERPRETED:
    import interpreter
    from l2 import LINE, recorded, replay, stands_for
    from separable_inputs import make

    from fastseg.kernels.runtime.config import override
    from fastseg.ops import separable_conv2d

CACHE, RESIDENT = 24 << 10, 3
PIXELS, C = 256, 48
GEMM = {"BLOCK_N": 16, "BLOCK_K": 32}
BLOCKS = {
    "separable_conv_fwd_fused": {"BLOCK_H": 4, "BLOCK_W": 8, **GEMM},
    "separable_conv_fwd_dw": {"BLOCK_H": 4, "BLOCK_W": 8, "BLOCK_C": 16},
    "separable_conv_fwd_pw": {"BLOCK_M": 32, **GEMM},
    "separable_conv_bwd_pw_input": {"BLOCK_M": 32, **GEMM},
    "separable_conv_bwd_pw_weight": {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 16},
    "separable_conv_bwd_dw_input": {"BLOCK_H": 4, "BLOCK_W": 8, "BLOCK_C": 16},
    "separable_conv_bwd_dw_weight": {"BLOCK_M": 64, "BLOCK_C": 16},
}


def launch_of(*programs, bytes_of_lines=64):
    """A launch whose programs touch the lines named: {program: [(kind, lines), ...]}."""
    launch = interpreter.Launch(lambda: None)
    for number, (index, accesses) in enumerate(programs):
        launch.programs.append(index)
        for kind, lines in accesses:
            addresses = np.array(lines, dtype=np.uint64) * np.uint64(bytes_of_lines)
            launch.log.append(interpreter.Access(kind, 0, addresses, 4, number, 0))
    return launch


def sweep(columns, lines=8):
    """One program a line and column of blocks, each reading its line; x is the line."""
    return launch_of(*(((x, y, 0), [("load", [x])]) for x in range(lines) for y in range(columns)))


def test_a_sweep_longer_than_the_cache_reads_everything_again():
    assert replay(sweep(3), 4 * LINE, 1).read == 3 * 8 * LINE  # x is fastest: all lines, then all again
    assert replay(sweep(3), 4 * LINE, 1, order=lambda p: p).read == 8 * LINE  # columns fastest
    assert replay(sweep(3), 8 * LINE, 1).read == 8 * LINE  # they fit
    assert replay(sweep(3), 4 * LINE, 24).read == 8 * LINE  # all run at once
    assert replay(sweep(3), 4 * LINE, 1).ratio == 3.0


def test_the_line_not_used_for_longest_leaves():
    reads = lambda *lines: launch_of(((0, 0, 0), [("load", [line]) for line in lines]))
    assert replay(reads(1, 2, 1, 3, 1), 2 * LINE, 1).read == 3 * LINE  # 2 made way for 3
    assert replay(reads(1, 2, 1, 3, 2), 2 * LINE, 1).read == 4 * LINE


def test_written_lines_go_to_dram_once_they_leave_and_at_the_end():
    one = launch_of(((0, 0, 0), [("store", [1]), ("store", [1]), ("load", [2]), ("load", [3]), ("store", [1])]))
    moved = replay(one, 2 * LINE, 1)
    assert (moved.read, moved.written, moved.floor) == (2 * LINE, 2 * LINE, 3 * LINE)
    assert replay(one, 3 * LINE, 1).written == LINE
    atomic = replay(launch_of(((0, 0, 0), [("atomic", [5])])), LINE, 1)
    assert (atomic.read, atomic.written, atomic.ratio) == (LINE, LINE, 1.0)


def test_the_small_problem_stands_for_the_decoder():
    """304 -> 256 at 16 x 128 x 128: dy and z, 256 channels, and u and g1, 304; 264 programs of 64 x 64 run at once."""
    full, tile = 16 * 128 * 128 * 2, 64 * 2
    maps = 2 * full * (256 + 304)
    tiles = 264 // 5 * tile * 2 * (256 + 304)
    assert stands_for(4 * 2 * PIXELS * C, RESIDENT // 3 * 32 * 4 * 2 * C, CACHE, maps, tiles)
    assert not stands_for(CACHE, 0, CACHE, maps, tiles)


@pytest.fixture(scope="module")
def launches():
    """One of each kernel of the separable convolution, trained, and of the batch norm behind it."""
    torch.manual_seed(0)
    inputs, kwargs = make("aspp", N=1, C=C, H=PIXELS // 8, W=8, COUT=C, training=True, dtype=torch.bfloat16)
    with ExitStack() as stack:
        for kernel, blocks in BLOCKS.items():
            stack.enter_context(override(kernel, **blocks))
        found = stack.enter_context(recorded())
        with fastseg.force("separable_conv2d", "split"):
            y = separable_conv2d(*inputs, **kwargs)
            y.backward(torch.randn_like(y))
        with fastseg.force("separable_conv2d", "fused"), torch.no_grad():
            for norm in (kwargs["mid_norm"], kwargs["post_norm"]):
                kwargs["mid_norm" if norm is kwargs["mid_norm"] else "post_norm"] = norm._replace(training=False)
            separable_conv2d(*inputs, **kwargs)
    return {launch.name.strip("_").removesuffix("_kernel"): launch for launch in found}


@pytest.mark.parametrize("kernel", [*BLOCKS, "batch_norm_act_fwd", "batch_norm_act_bwd_reduce"])
def test_operands_come_from_dram_once(launches, kernel):
    assert replay(launches[kernel], CACHE, RESIDENT).ratio <= 1.15


@pytest.mark.parametrize("kernel", BLOCKS)
def test_tiles_fastest_would_read_them_again(launches, kernel):
    """The order that these kernels had: all tiles for the first block of channels, then all again for the next."""
    blocks = 9 if kernel.endswith("pw_weight") else 3
    moved = replay(launches[kernel], CACHE, RESIDENT, order=lambda p: (p[0] % blocks, p[0] // blocks))
    assert moved.ratio > 1.5


@pytest.mark.parametrize("kernel", BLOCKS)
def test_grids_lie_on_axis_x(launches, kernel):
    """Where blocks of channels were on axis y, their number was bounded by 65535, and their order was the wrong one."""
    assert {(y, z) for _, y, z in launches[kernel].programs} == {(0, 0)}
