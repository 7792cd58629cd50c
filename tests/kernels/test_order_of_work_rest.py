"""DRAM bytes by the order of programs, as ``test_order_of_work.py`` has them, of the kernels that are left; and that no
kernel is left out. Maps are larger than the cache, the tiles of programs that run at once smaller."""

import ast
from pathlib import Path

import pytest
import torch

import fastseg
from fastseg.ops.core.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="launches are replayed from the interpreter's log")

if INTERPRETED:
    from l2 import ratios

    from fastseg.kernels.atrous_conv.fwd import atrous_conv_fwd
    from fastseg.kernels.batch_norm.bwd import batch_norm_act_bwd_input
    from fastseg.kernels.batch_norm.fold import fold_norm_fwd
    from fastseg.kernels.batch_norm.stats import batch_norm_stats
    from fastseg.kernels.common.norm_args import Norm
    from fastseg.kernels.pooling.max_pool import max_pool_fwd
    from fastseg.kernels.pooling.max_unpool import max_unpool_fwd
    from fastseg.kernels.pooling.max_unpool_conv import max_unpool_conv_fwd
    from fastseg.kernels.pooling.norm_max_pool_bwd import norm_max_pool_bwd
    from fastseg.kernels.pooling.windows import Pooling, new_map
    from fastseg.kernels.runtime.config import override
    from fastseg.kernels.upsample.confidence import upsample_confidence_fwd
    from fastseg.kernels.upsample.conv import upsample_conv_fwd
    from fastseg.kernels.upsample.cross_entropy_fwd import upsample_log_sum
    from fastseg.kernels.upsample.loss_sums import upsample_loss_inner, upsample_loss_sums
    from fastseg.kernels.upsample.loss_terms import CODES
    from fastseg.kernels.upsample.masks_to_classes import masks_to_classes_fwd
    from fastseg.kernels.upsample.masks_to_queries import masks_to_queries_fwd
    from fastseg.kernels.upsample.sizes import Axis, Upsampling
    from fastseg.kernels.upsample.sum import upsample_sum_fwd
    from fastseg.kernels.upsample.volume_argmax import upsample_argmax3d_fwd

MOST = 1.15
RESIDENT = 3
HERE = Path(__file__).parent
bf16 = torch.bfloat16


def nhwc(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(bf16).contiguous(memory_format=torch.channels_last)


def norm_of(C: int) -> "Norm":
    return Norm(torch.zeros(C), torch.ones(C), torch.ones(C), torch.zeros(C), 1e-5, True)


def upsampling(low: int, full: int) -> "Upsampling":
    axis = Axis(low, full, low / full)
    return Upsampling(axis, axis, False)


def windows(C: int, size: int, last: bool) -> "Pooling":
    return Pooling(1, C, (1, size, size), (1, size // 2, size // 2), (1, 2, 2), (1, 2, 2), (0, 0, 0), (1, 1, 1), last)


def batch_norm():
    z, tile = nhwc(2, 64, 16, 16), {"BLOCK_M": 16, "BLOCK_C": 32}
    with override("batch_norm_tile_stats", **tile), override("batch_norm_act_bwd_input", **tile):
        batch_norm_stats(z)
        batch_norm_act_bwd_input(nhwc(*z.shape), z, norm_of(64), "relu", torch.zeros(2, 64), 1 / 512)


def fold():
    weight, vectors = torch.randn(64, 32, 3, 3), norm_of(64)
    fold_norm_fwd(weight, 288, None, *vectors[:4], 1e-5, torch.empty_like(weight))


def tables():
    atrous_conv_fwd(nhwc(1, 16, 32, 32), [nhwc(16, 16, 3, 3)], [], None, [12], "relu")


def stage():
    pool = windows(64, 16, True)
    z, norm = new_map(nhwc(1, 1, 1, 1), pool, pool.size).normal_(), norm_of(64)
    y, index = max_pool_fwd(z, pool, 2, norm, "relu")
    tile = {"BLOCK_M": 8, "BLOCK_L": 64}
    with override("norm_max_pool_bwd_reduce", **tile), override("norm_max_pool_bwd_input", **tile):
        norm_max_pool_bwd(y, index, z, norm, "relu", pool, 2)


def unpool_conv():
    pool = windows(32, 32, True)
    v, index = max_pool_fwd(new_map(nhwc(1, 1, 1, 1), pool, pool.size).normal_(), pool, 2)
    max_unpool_conv_fwd(v.select(2, 0), index, nhwc(32, 32, 1, 1), torch.zeros(32), "relu", pool, 2)


def foreign():
    pool = windows(8, 16, False)
    index = torch.randint(0, 256, (1, 8, 1, 8, 8))
    max_unpool_fwd(torch.randn(1, 8, 1, 8, 8), index, pool, 64)


def confidence():
    upsample_confidence_fwd(torch.randn(1, 4, 16, 16), upsampling(16, 128), torch.uint8, "probability")


def volume():
    axis = Axis(8, 16, 0.5), Axis(16, 32, 0.5), Axis(16, 32, 0.5)
    upsample_argmax3d_fwd(torch.randn(1, 4, 8, 16, 16), axis, False, torch.uint8)


def levels():
    base, *maps = [nhwc(1, 32, 32 >> i, 32 >> i) for i in range(3)]
    upsample_sum_fwd(base, maps, None, None, "relu", False, True)


def taps():
    upsample_conv_fwd(torch.randn(3, 1, 8, 8, 3, 32).to(bf16), nhwc(1, 32, 32, 32), None, "relu", (32, 32), False)


def masks():
    masks_to_classes_fwd(torch.randn(1, 32, 16, 16), torch.rand(1, 32, 8), upsampling(16, 64), torch.uint8)


def sums():
    x, target, up = torch.randn(1, 8, 16, 16), torch.randint(0, 8, (1, 128, 128)), upsampling(16, 128)
    spec, lse = tuple((CODES[kind], 1.0, 0.0) for kind in ("inter", "prob")), torch.zeros(1, 128, 128)
    upsample_loss_sums(x, target, None, lse, up, spec, 255)
    upsample_loss_inner(x, target, None, lse, torch.ones(1, 8, 2), up, spec, 255)


def probabilities():
    """Softmax and labels of each class: 8 classes of a pixel are read together."""
    x, target, up = torch.randn(1, 8, 16, 16), torch.rand(1, 8, 128, 128), upsampling(16, 128)
    spec = tuple((CODES[kind], 1.0, 0.0) for kind in ("inter", "prob"))
    lse = upsample_log_sum(x, up)
    upsample_loss_sums(x, target, None, lse, up, spec, 255)
    upsample_loss_inner(x, target, None, lse, torch.ones(1, 8, 2), up, spec, 255)


def owners():
    scores = torch.rand(1, 32)
    masks_to_queries_fwd(
        torch.randn(1, 32, 16, 16), scores, upsampling(16, 64), torch.uint8, 0.5, squash=True, weighted=True
    )


CASES = {
    batch_norm: (("batch_norm_tile_stats", "batch_stats", "batch_norm_act_bwd_input"), 24 << 10),
    fold: (("fold_norm_fwd",), 12 << 10),
    tables: (("atrous_conv_tables",), 8 << 10),
    stage: (("norm_max_pool_bwd_reduce", "norm_max_pool_bwd_input"), 12 << 10),
    unpool_conv: (("max_unpool_conv_fwd",), 24 << 10),
    foreign: (("max_unpool_fwd_foreign",), 12 << 10),
    confidence: (("upsample_confidence",), 40 << 10),
    volume: (("upsample_argmax3d_fwd",), 16 << 10),
    levels: (("upsample_sum_fwd",), 32 << 10),
    taps: (("upsample_conv_fwd",), 24 << 10),
    masks: (("masks_to_classes_fwd",), 12 << 10),
    owners: (("masks_to_queries_fwd",), 20 << 10),
    sums: (("upsample_loss_sums", "upsample_loss_inner"), 64 << 10),
    probabilities: (("upsample_loss_sums", "upsample_loss_inner"), 64 << 10),
}


@pytest.mark.parametrize("fn", CASES, ids=lambda fn: fn.__name__)
def test_operands_come_from_dram_once(fn):
    kernels, cache = CASES[fn]
    found = ratios(fn, kernels, cache, RESIDENT)
    assert found.keys() == set(kernels)
    assert {kernel: ratio for kernel, ratio in found.items() if ratio > MOST} == {}


def test_every_kernel_is_replayed():
    written = set()
    for path in (Path(fastseg.kernels.__file__).parent).rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list:
                written.add(node.name.strip("_").removesuffix("_kernel"))
    said = "".join(path.read_text() for path in HERE.glob("test_order_of_work*.py"))
    assert sorted(name for name in written if f'"{name}"' not in said) == []
