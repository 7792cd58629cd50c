"""The branches of an ASPP, a 1x1 and three atrous 3x3 convolutions to 256 channels with bias and ReLU, in one map.

    eval              y = relu(cat([conv2d(x, w, b, padding=rate, dilation=rate) ...], 1))   least traffic  A + Y + W
    train-backward    dx, and the gradients of every weight and bias                         least traffic  2A + 2Y + 2W

in elements: A = N C H W, Y = 4 N 256 H W, W = 28 C 256. A row's notes say what share of the dense products fastseg
executes, and which way its cost model chose.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import problem
from benchmarks.roofline.op_floors import WIDTH, atrous_kernels
from benchmarks.roofline.useful_macs import region_fraction
from benchmarks.workloads import ATROUS, ATROUS_OTHERS, AsppShape
from fastseg.ops.atrous_conv2d import atrous_branches

OP = "atrous_branches"
MODES = ("eval", "train-backward")
BRANCHES = 4


class Problem(problem.Problem):
    """One shape on one device, in channels_last.

    Args:
        shape: of ``workloads``.
        mode: of ``MODES``.
        device: where.
        width: output channels of each branch.
    """

    inputs = ("x", *(f"w{i}" for i in range(BRANCHES)), *(f"b{i}" for i in range(BRANCHES)))

    def __init__(self, shape: AsppShape, mode: str, device: torch.device, width: int = WIDTH):
        super().__init__(mode, device, grad=mode != "eval")
        self.shape, self.rates = shape, [1, *shape.rates]
        random = lambda *size: self.draw(*size).requires_grad_(self.grad)
        self.x = random(shape.N, shape.C, shape.H, shape.W)
        for i in range(BRANCHES):
            K = 3 if i else 1
            weight = self.draw(width, shape.C, K, K).div_(K * shape.C**0.5)
            setattr(self, f"w{i}", weight.requires_grad_(self.grad))
            setattr(self, f"b{i}", random(width))

    @property
    def weights(self) -> list[Tensor]:
        return [getattr(self, f"w{i}") for i in range(BRANCHES)]

    @property
    def biases(self) -> list[Tensor]:
        return [getattr(self, f"b{i}") for i in range(BRANCHES)]

    @property
    def bytes_moved(self) -> float:
        """The least traffic of this file's header."""
        pixels = self.shape.N * self.shape.H * self.shape.W
        Y, W = pixels * sum(w.shape[0] for w in self.weights), sum(w.numel() for w in self.weights)
        return (2 if self.backward else 1) * (self.x.numel() + Y + W) * self.dtype.itemsize

    def forms(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """provider -> the map of all branches."""

        def eager(x: Tensor) -> Tensor:
            tensors = zip(self.weights, self.biases, self.rates, strict=True)
            return F.relu(
                torch.cat([F.conv2d(x, w, b, padding=d * (w.shape[-1] // 2), dilation=d) for w, b, d in tensors], 1)
            )

        return {"fastseg": lambda x: atrous_branches(x, self.weights, self.biases, self.rates, "relu"), "eager": eager}

    def function(self, form: Callable) -> Callable[[], object]:
        if not self.backward:
            return lambda: form(self.x)
        y = form(self.x)
        dy = self.gradient(y)
        wanted = [self.x, *self.weights, *self.biases]
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)

    def notes(self, provider: str) -> dict[str, object]:
        if provider != "fastseg":
            return {}
        s = self.shape
        return {"executed": float(region_fraction(s.H, s.W, s.rates, s.N, 64 if s.N * s.H * s.W < 8192 else 128))}


def cut(shape: AsppShape, size: str) -> AsppShape:
    """One image for a CPU; few channels on a small map in a smoke test."""
    if size == "tiny":
        return replace(shape, C=min(shape.C, 16), H=min(shape.H, 12), W=min(shape.W, 12), N=1, rates=(2, 4, 6))
    return replace(shape, N=1) if size == "small" else shape


def cases_of(shapes: tuple[AsppShape, ...], modes: tuple[str, ...], size: str) -> list[problem.Case]:
    out = []
    for mode in modes:
        for shape in shapes:
            name = f"{shape.C} ch, {shape.H}x{shape.W}, N={shape.N}"
            strategies = {"fastseg": "fused", "eager": "eager", "compile": "compile"}
            floors = {p: atrous_kernels(shape, s, backward=mode != "eval") for p, s in strategies.items()}
            build = partial(Problem, cut(shape, size), mode, width=8 if size == "tiny" else WIDTH)
            macs = 28 * shape.C * WIDTH * shape.H * shape.W
            out.append(problem.Case(OP, name, shape.N, mode, build, floors, macs))
    return out


def cases(size: str) -> list[problem.Case]:
    """What is measured by default."""
    return [*cases_of(ATROUS, ("eval",), size), *cases_of(ATROUS[:2], ("train-backward",), size)]


def others(size: str) -> list[problem.Case]:
    """Every other map, width and batch, in evaluation."""
    return cases_of(ATROUS_OTHERS, ("eval",), size)


@pytest.mark.parametrize("provider", ["fastseg", "eager", "compile"])
@problem.every(cases)
def bench_atrous(number, provider, run, device, size, benchmark):
    problem.bench(cases(size)[number], provider, run, device, size, benchmark)


@pytest.mark.parametrize("provider", ["fastseg", "eager", "compile"])
@problem.every(others)
def bench_atrous_others(number, provider, run, device, size, benchmark):
    problem.bench(others(size)[number], provider, run, device, size, benchmark)
