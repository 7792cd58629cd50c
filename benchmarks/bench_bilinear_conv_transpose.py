"""FCN's bilinear transposed convolution against torch's, dense and grouped, with and without the skip addition.

    forward     y = conv_transpose2d(x, bilinear_kernel, k = 2s, padding = s / 2)     least traffic  lo + hi
    skip        y + skip                                                              least traffic  lo + 2 hi
    backward    dx from dy                                                            least traffic  hi + lo

in elements: lo = N C H W, hi = s^2 lo. The dense weight is what FCN code holds: C times the multiply-adds, all but one
in C of them with 0. "grouped" takes its diagonal, "compile" compiles the dense module, "grouped-compile" the other.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import problem
from benchmarks.roofline.floors import ITEM, Cost
from benchmarks.workloads import COARSE, DECONV, HeadShape
from fastseg.nn import BilinearConvTranspose2d

OP = "bilinear_conv_transpose"
MODES = ("forward", "skip", "backward")
PROVIDERS = ("fastseg", "eager", "grouped", "compile", "grouped-compile")


class Problem(problem.Problem):
    """One shape on one device, in channels_last, and what each provider calls.

    Args:
        shape: of ``workloads``.
        mode: of ``MODES``.
        device: where.
    """

    baseline = "grouped"  # the dense one takes half a minute a call on a CPU
    compiled: ClassVar = {"compile": "eager", "grouped-compile": "grouped"}
    inputs = ("x", "skip")

    def __init__(self, shape: HeadShape, mode: str, device: torch.device):
        super().__init__(mode, device, grad=mode == "backward")
        self.shape = shape
        s = shape.scale
        self.x = self.draw(shape.N, shape.C, shape.H, shape.W).requires_grad_(mode == "backward")
        self.skip = self.draw(shape.N, shape.C, shape.H * s, shape.W * s) if mode == "skip" else None
        self.module = BilinearConvTranspose2d(shape.C, s, 2 * s).to(device, self.dtype).eval()

    @property
    def bytes_moved(self) -> float:
        """The least traffic of this file's header."""
        hi = (2 if self.mode == "skip" else 1) * self.shape.scale**2
        return (1 + hi) * self.x.numel() * self.dtype.itemsize

    def forms(self) -> dict[str, Callable[[Tensor, Tensor | None], Tensor]]:
        """provider -> upsampling of (x, skip)."""
        weight, options = self.module.weight, {"stride": self.shape.scale, "padding": self.shape.scale // 2}
        diagonal = weight.diagonal().permute(2, 0, 1)[:, None].contiguous()
        add = lambda y, skip: y if skip is None else y + skip
        dense = lambda x, skip: add(F.conv_transpose2d(x, weight.to(x.dtype), **options), skip)
        grouped = lambda x, skip: add(F.conv_transpose2d(x, diagonal.to(x.dtype), groups=self.shape.C, **options), skip)
        return {"fastseg": lambda x, skip: self.module(x, skip=skip), "eager": dense, "grouped": grouped}

    def function(self, upsample: Callable[[Tensor, Tensor | None], Tensor]) -> Callable[[], object]:
        """What is timed. A backward contains no forward: its forward runs here, once."""
        if self.mode != "backward":
            return lambda: upsample(self.x, self.skip)
        y = upsample(self.x, None)
        dy = self.gradient(y)
        return lambda: torch.autograd.grad(y, self.x, dy, retain_graph=True)


def cut(shape: HeadShape, size: str) -> HeadShape:
    """One image for a CPU; at most 5 channels and 3 x 4 pixels in a smoke test."""
    if size == "tiny":
        return replace(shape, C=min(shape.C, 5), H=3, W=4, N=1)
    return replace(shape, N=1) if size == "small" else shape


def name_of(shape: HeadShape) -> str:
    return f"{shape.C}x{shape.H}x{shape.W}_k{2 * shape.scale}_s{shape.scale}_n{shape.N}"


def dense_macs(shape: HeadShape) -> float:
    """Multiply-adds of the dense convolution: four taps of every class for every class."""
    return 4.0 * shape.N * shape.C**2 * shape.H * shape.W * shape.scale**2


def cases(size: str) -> list[problem.Case]:
    """Every shape in each mode."""
    out = []
    for mode in MODES:
        for shape in (*DECONV, *COARSE):
            lo, hi = shape.N * shape.C * shape.H * shape.W, shape.N * shape.C * shape.H * shape.W * shape.scale**2
            moved, dense = ITEM * (lo + hi), Cost(bytes=ITEM * (lo + hi), tensor=2 * dense_macs(shape))
            extra = [Cost(bytes=3 * ITEM * hi)] if mode == "skip" else []  # the addition as a kernel of its own
            floors = {"fastseg": [Cost(bytes=moved + (ITEM * hi if extra else 0))], "eager": [dense, *extra]}
            floors["grouped"] = [Cost(bytes=moved), *extra]
            shape = cut(shape, size)
            build = partial(Problem, shape, mode)
            out.append(problem.Case(OP, name_of(shape), shape.N, mode, build, floors, dense_macs(shape)))
    return out


@pytest.mark.parametrize("provider", PROVIDERS)
@problem.every(cases)
def bench_bilinear_conv_transpose(number, provider, run, device, size, benchmark):
    problem.bench(cases(size)[number], provider, run, device, size, benchmark)
