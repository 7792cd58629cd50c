"""Max pooling with indices, its unpooling, and the fused end of an encoder stage, at SegNet's sizes.

    pool             y, index = max_pool2d(x, 2, ceil_mode=True)       least traffic  hi + lo + codes
    pool-backward    dx from dy and the index                          least traffic  lo + codes + hi
    unpool           x = max_unpool2d(y, index)                        least traffic  lo + codes + hi
    unpool-backward  dy from dx and the index                          least traffic  hi + codes + lo
    stage-eval       y, index = max_pool2d(relu(batch_norm(x)), 2)     least traffic  hi + lo + codes
    stage-train      the same with batch statistics                    least traffic  2 hi + lo + codes
    stage-backward   dx and the norm's gradients                       least traffic  2 hi + lo + codes

hi = N C H W and lo = N C ceil(H / 2) ceil(W / 2) elements; codes = lo / 4 bytes, 2 bits a window. GB/s is that traffic
over the time for every provider, also for those that move int64 indices of 8 lo bytes. "eager" is NCHW, torch's best
layout for unpooling; "compile" compiles the channels_last form.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness, problem
from benchmarks.roofline.floors import ITEM, Cost
from benchmarks.roofline.op_floors import pool_bytes
from benchmarks.workloads import SEGNET_STAGES, PoolShape
from fastseg.ops import BatchNormArgs, PoolIndices, batch_norm_act_max_pool2d, max_pool2d, max_unpool2d

OP = "pooling"
MODES = ("pool", "pool-backward", "unpool", "unpool-backward", "stage-eval", "stage-train", "stage-backward")
PROVIDERS = ("fastseg", "fastseg int64", "eager", "eager channels_last", "compile")
EAGER_POOL = partial(F.max_pool2d, kernel_size=2, ceil_mode=True, return_indices=True)


def sizes(shape: PoolShape) -> tuple[int, int]:
    """Elements of the smaller and of the larger map."""
    return shape.N * shape.C * -(-shape.H // 2) * -(-shape.W // 2), shape.N * shape.C * shape.H * shape.W


class Problem(problem.Problem):
    """One shape on one device.

    Args:
        shape: of ``workloads``.
        mode: of ``MODES``.
        device: where.
    """

    compiled: ClassVar = {"compile": "eager channels_last"}
    inputs = ("x", "nchw")

    def __init__(self, shape: PoolShape, mode: str, device: torch.device):
        super().__init__(mode, device, grad=mode.endswith("backward") or mode == "stage-train")
        self.shape = shape
        self.nchw = self.draw(shape.N, shape.C, shape.H, shape.W, last=False)
        if mode.startswith("unpool"):
            self.nchw, self.index = EAGER_POOL(self.nchw)
            self.index_last = self.index.contiguous(memory_format=torch.channels_last)
        self.nchw.requires_grad_(self.grad)
        self.x = self.nchw.detach().contiguous(memory_format=torch.channels_last).requires_grad_(self.grad)
        vector = lambda: torch.rand(shape.C, generator=self.generator, device=device).add_(0.5)
        self.norm = BatchNormArgs(
            vector(), vector(), vector().requires_grad_(self.grad), vector().requires_grad_(self.grad),
            training=mode != "stage-eval",
        )  # fmt: skip

    @property
    def bytes_moved(self) -> float:
        lo, hi = sizes(self.shape)
        maps = 2 * hi if self.mode in ("stage-train", "stage-backward") else hi
        return (maps + lo) * self.dtype.itemsize + lo / 4

    def forms(self) -> dict[str, Callable[[Tensor], object]]:
        """provider -> function of the map."""
        pixels = self.shape.H, self.shape.W
        if self.mode.startswith("pool"):
            ours = partial(max_pool2d, kernel_size=2, ceil_mode=True, return_indices=True)
            plain = EAGER_POOL
        elif self.mode.startswith("unpool"):
            codes = PoolIndices.from_torch(self.index_last, pixels, (2, 2), (2, 2), (0, 0), (1, 1), channels_last=True)
            unpool = lambda function, index: lambda v: function(v, index, 2, output_size=pixels)
            return {
                "fastseg": unpool(max_unpool2d, codes),
                "fastseg int64": unpool(max_unpool2d, self.index_last),
                "eager": unpool(F.max_unpool2d, self.index),
                "eager channels_last": unpool(F.max_unpool2d, self.index_last),
            }
        else:
            ours = partial(
                batch_norm_act_max_pool2d, norm=self.norm, kernel_size=2, ceil_mode=True, return_indices=True
            )
            norm = self.norm
            plain = lambda x: EAGER_POOL(F.relu(F.batch_norm(x, *norm)))
        return {
            "fastseg": partial(ours, index_format="compact"),
            "fastseg int64": partial(ours, index_format="int64"),
            "eager": lambda x: plain(x),
            "eager channels_last": lambda x: plain(x),
        }

    def functions(self, *names: str) -> dict[str, Callable[[], object]]:
        """As the base's; "eager" gets the NCHW map."""
        providers = self.providers()
        return {
            name: self.function(providers[name], self.nchw if name == "eager" else self.x)
            for name in dict.fromkeys((self.baseline, *names))
            if name in providers
        }

    def function(self, form: Callable[[Tensor], object], x: Tensor | None = None) -> Callable[[], object]:
        x = self.nchw if x is None else x
        if not self.backward:
            return partial(form, x)
        y = form(x)
        y = y[0] if isinstance(y, tuple) else y
        dy = self.gradient(y)
        wanted = [x, self.norm.weight, self.norm.bias] if self.mode.startswith("stage") else [x]
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)

    def comparable(self, result: object) -> list[Tensor]:
        """Values, and of a pooling alone the indices: behind a norm, rounding may tie what was not."""
        if self.mode.startswith("stage") and not self.backward:
            result = result[0]
        elif self.mode == "pool":
            y, index = result
            result = y, index.to_torch() if isinstance(index, PoolIndices) else index
        return super().comparable(result)

    def notes(self, provider: str) -> dict[str, object]:
        """Of a forward: the bytes kept for its backward, and the index's own."""
        if self.backward or self.mode == "unpool":
            return {}
        form, eager = self.providers()[provider], provider == "eager"
        x = (self.nchw if eager else self.x).detach().requires_grad_(self.mode != "stage-eval")
        with torch.enable_grad():
            _, index = form(x)
        notes = {"index_bytes": index.nbytes}
        if x.requires_grad:
            notes["kept_bytes"] = harness.kept_bytes(partial(form, x))
        return notes


def floors(shape: PoolShape, mode: str) -> dict[str, list[Cost]]:
    """provider -> its least traffic, kernel by kernel, in 16 bits."""
    lo, hi = sizes(shape)
    bytes_ = pool_bytes(lo, hi)
    costs = lambda *values: [Cost(bytes=value) for value in values]
    ours, eager, pass_ = bytes_["pool 2-bit"], bytes_["pool eager"], ITEM * hi
    if mode == "pool":
        return {"fastseg": costs(ours), "eager": costs(eager), "compile": costs(eager)}
    if mode == "unpool":
        return {"fastseg": costs(ours), "eager": costs(bytes_["unpool eager NCHW"])}
    if mode == "stage-eval":
        return {"fastseg": costs(ours), "eager": costs(2 * pass_, 2 * pass_, eager), "compile": costs(2 * pass_, eager)}
    if mode == "stage-train":
        forward = {"eager": costs(pass_, 2 * pass_, 2 * pass_, eager), "compile": costs(pass_, 2 * pass_, eager)}
        return {"fastseg": costs(pass_ + ours), **forward}
    return {"fastseg": costs(ours + (pass_ if mode == "stage-backward" else 0))}


def cut(shape: PoolShape, size: str) -> PoolShape:
    """One image for a CPU; 8 channels of 6 x 7 pixels in a smoke test."""
    if size == "tiny":
        return replace(shape, C=8, H=6, W=7, N=1)
    return replace(shape, N=1) if size == "small" else shape


def cases(size: str) -> list[problem.Case]:
    """SegNet's stages in each mode, the large batch first."""
    return [
        problem.Case(
            OP, f"{shape.name} n{shape.N}", shape.N, mode, partial(Problem, cut(shape, size), mode),
            floors(shape, mode),
        )
        for mode in MODES
        for shape in (*SEGNET_STAGES[5:], *SEGNET_STAGES[:5])
    ]  # fmt: skip


@pytest.mark.parametrize("provider", PROVIDERS)
@problem.every(cases)
def bench_pooling(number, provider, run, device, size, benchmark):
    case = cases(size)[number]
    if size != "full" and case.N > 1:
        pytest.skip("one image on a CPU")
    problem.bench(case, provider, run, device, size, benchmark)
