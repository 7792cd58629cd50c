"""Separable convolution against plain modules and ``torch.compile``.

    eval              y = relu(bn(pw(relu(bn(dw(x))))))      least traffic  A + Y + W
    train-forward     the same with batch statistics         least traffic  A + 2Y + W    (z is kept for the backward)
    train-backward    dx and every parameter's gradient      least traffic  2A + 2Y + 2W  (x, z, dy read; dx written)

in elements: A = N C H W, Y = N COUT OH OW, W = C K^2 + C COUT. "Least" means each tensor once: GB/s is that traffic
over the time, so that providers are comparable, and a kernel that reads something twice shows a lower figure.
``floors.py`` has the traffic of a whole training step.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import problem
from benchmarks.roofline.floors import separable_inference
from benchmarks.workloads import SEPARABLE, SEPARABLE_TRAINING, SeparableShape, tiny
from fastseg.nn import SeparableConv2d

OP = "separable_conv"
MODES = ("eval", "train-forward", "train-backward")


class Problem(problem.Problem):
    """One shape on one device: input, modules with the same parameters, and what each provider calls.

    Args:
        shape: of ``workloads``.
        mode: of ``MODES``.
        device: where.
    """

    autocast = True

    def __init__(self, shape: SeparableShape, mode: str, device: torch.device):
        super().__init__(mode, device, grad=mode != "eval")
        self.shape = shape
        generator = torch.Generator().manual_seed(0)  # of vectors
        self.fused = SeparableConv2d(
            shape.C, shape.COUT, shape.kernel_size, stride=shape.stride, dilation=shape.dilation,
            mid_norm=True, mid_act="relu", post_norm=True, post_act="relu",
        )  # fmt: skip
        with torch.no_grad():
            for norm in (self.fused.mid_norm, self.fused.post_norm):  # statistics of a trained net, not 0 and 1
                norm.running_mean.copy_(0.1 * torch.randn(norm.num_features, generator=generator))
                norm.running_var.copy_(0.5 + torch.rand(norm.num_features, generator=generator))
        self.fused = self.fused.to(device, memory_format=torch.channels_last).train(mode != "eval")
        f = copy.deepcopy(self.fused)
        self.plain = nn.Sequential(f.depthwise, f.mid_norm, nn.ReLU(), f.pointwise, f.post_norm, nn.ReLU())
        self.plain.train(mode != "eval")
        self.x = self.draw(shape.N, shape.C, shape.H, shape.W).requires_grad_(mode != "eval")

    @property
    def bytes_moved(self) -> float:
        A, Y = self.shape.inputs, self.shape.outputs
        W = self.shape.C * (self.shape.kernel_size**2 + self.shape.COUT)
        elements = {"eval": A + Y + W, "train-forward": A + 2 * Y + W, "train-backward": 2 * A + 2 * Y + 2 * W}
        return elements[self.mode] * self.dtype.itemsize

    def forms(self) -> dict[str, nn.Module]:
        """provider -> module."""
        return {"fastseg": self.fused, "eager": self.plain}

    def function(self, network: nn.Module) -> Callable[[], object]:
        if self.mode != "train-backward":
            return partial(network, self.x)
        y = network(self.x)
        dy = self.gradient(y)
        wanted = [self.x, *network.parameters()]
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def macs(shape: SeparableShape) -> int:
    """Multiply-adds of one forward."""
    return shape.hidden * (shape.kernel_size**2 + shape.COUT)


def cut(shape: SeparableShape, size: str) -> SeparableShape:
    """One image for a CPU, ``tiny`` in a smoke test."""
    return tiny(shape) if size == "tiny" else replace(shape, N=1) if size == "small" else shape


def cases(size: str) -> list[problem.Case]:
    """Every shape in evaluation, a few in training, whose floor is that of the step and so of neither half."""
    out = []
    for mode in MODES:
        for shape in SEPARABLE if mode == "eval" else SEPARABLE_TRAINING:
            strategies = {"fastseg": "fused", "eager": "eager", "compile": "compile"} if mode == "eval" else {}
            floors = {provider: separable_inference(shape, strategy) for provider, strategy in strategies.items()}
            shape = cut(shape, size)
            out.append(
                problem.Case(OP, shape.name, shape.N, mode, partial(Problem, shape, mode), floors, 2 * macs(shape))
            )
    return out


@pytest.mark.parametrize("provider", ["fastseg", "eager", "compile"])
@problem.every(cases)
def bench_separable_conv(number, provider, run, device, size, benchmark):
    problem.bench(cases(size)[number], provider, run, device, size, benchmark)
