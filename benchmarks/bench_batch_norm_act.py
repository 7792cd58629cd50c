"""Batch norm + ReLU, and the end of a residual block, against eager and compiled PyTorch.

    train            y = relu(batch_norm(x) + residual), batch statistics    least traffic  3 Y  (4 with a residual)
    train-backward   dx, the norm's gradients (and the residual's)           least traffic  5 Y  (7)
    eval             the same with fixed statistics, without gradients       least traffic  2 Y  (3)

Y = N C H W elements. Batch statistics need a read of their own in both directions, so that x is read twice. GB/s is
that traffic over the time for every provider. Maps below the size of the L2 cache can beat the floor: their second
read does not come from DRAM.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness, problem
from benchmarks.roofline.op_floors import norm_act_kernels
from benchmarks.workloads import NORMS, NormShape
from fastseg.ops import BatchNormArgs, batch_norm_act

OP = "batch_norm_act"
MODES = ("train", "train-backward", "eval")
PROVIDERS = ("fastseg", "eager", "compile")


class Problem(problem.Problem):
    """One shape in one layout on one device.

    Args:
        shape: of ``workloads``.
        mode: of ``MODES``.
        last: channels_last, else contiguous.
        device: where.
    """

    inputs = ("x", "residual")

    def __init__(self, shape: NormShape, mode: str, last: bool, device: torch.device):
        super().__init__(mode, device, grad=mode != "eval")
        self.shape = shape
        draw = lambda: self.draw(shape.N, shape.C, shape.H, shape.W, last=last).requires_grad_(self.grad)
        self.x, self.residual = draw(), draw() if shape.residual else None
        rand = lambda: torch.rand(shape.C, generator=self.generator, device=device).add_(0.5)
        vector = lambda: torch.nn.Parameter(rand(), self.grad)
        running = torch.zeros(shape.C, device=device), torch.ones(shape.C, device=device)
        self.norm = BatchNormArgs(*running, vector(), vector(), training=self.grad)

    @property
    def bytes_moved(self) -> float:
        maps = {"train": 3, "train-backward": 5, "eval": 2}[self.mode]
        extra = {"train": 1, "train-backward": 2, "eval": 1}[self.mode] * self.shape.residual
        return (maps + extra) * self.x.numel() * self.dtype.itemsize

    def forms(self) -> dict[str, Callable[[Tensor, Tensor | None], Tensor]]:
        """provider -> function of the map and the residual."""

        def plain(x: Tensor, residual: Tensor | None) -> Tensor:
            y = F.batch_norm(x, *self.norm)
            return F.relu_(y if residual is None else y + residual)

        return {"fastseg": lambda x, residual: batch_norm_act(x, self.norm, "relu", residual), "eager": plain}

    def function(self, form: Callable[[Tensor, Tensor | None], Tensor]) -> Callable[[], object]:
        """What is timed. A backward contains no forward: its forward runs here, once."""
        if not self.backward:
            return partial(form, self.x, self.residual)
        y = form(self.x, self.residual)
        wanted = [t for t in (self.x, self.norm.weight, self.norm.bias, self.residual) if t is not None]
        dy = self.gradient(y)
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)

    def notes(self, provider: str) -> dict[str, object]:
        """Of a training forward: the bytes kept for its backward."""
        if self.mode != "train":
            return {}
        return {"kept_bytes": harness.kept_bytes(partial(self.providers()[provider], self.x, self.residual))}


def cut(shape: NormShape, size: str) -> NormShape:
    """One image for a CPU; 8 channels of 6 x 7 pixels in a smoke test."""
    if size == "tiny":
        return replace(shape, C=8, H=6, W=7, N=1)
    return replace(shape, N=1) if size == "small" else shape


def cases(size: str) -> list[problem.Case]:
    """Every shape channels_last, the large batch first; then the first of them as NCHW."""
    shapes = sorted(NORMS, key=lambda shape: -shape.N)
    rows = [(shape, mode, True) for mode in MODES for shape in shapes] + [(shapes[0], mode, False) for mode in MODES]
    out = []
    for shape, mode, last in rows:
        elements = shape.N * shape.C * shape.H * shape.W
        floors = {
            provider: norm_act_kernels(elements, mode, shape.residual, strategy)
            for provider, strategy in (("fastseg", "fused"), ("eager", "eager"), ("compile", "compile"))
        }
        name = f"{shape.name} n{shape.N}" + ("" if last else " NCHW")
        build = partial(Problem, cut(shape, size), mode, last)
        out.append(problem.Case(OP, name, shape.N, mode, build, floors))
    return out


@pytest.mark.parametrize("provider", PROVIDERS)
@problem.every(cases)
def bench_batch_norm_act(number, provider, run, device, size, benchmark):
    case = cases(size)[number]
    if size != "full" and case.N > 1:
        pytest.skip("one image on a CPU")
    problem.bench(case, provider, run, device, size, benchmark)
