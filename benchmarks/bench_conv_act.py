"""Convolution, folded batch norm and activation in evaluation: 1x1 and stems, which have kernels of their own.

    y = act(bn(conv(x)))      least traffic  A + Y + W

in elements: A = N C H W, Y = N COUT OH OW, W = K^2 C COUT. Eager moves 4Y more for the norm and the activation; with
the norm folded, cuDNN's convolution still leaves bias and ReLU6 to passes of their own.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import problem
from benchmarks.roofline.floors import ITEM, Cost
from benchmarks.workloads import CONVOLUTIONS, ConvShape
from fastseg.nn import ConvNormAct2d

OP = "conv_act"
MODES = ("eval",)


class Problem(problem.Problem):
    """One convolution on one device, in channels_last.

    Args:
        shape: of ``workloads``.
        device: where.
    """

    autocast = True

    def __init__(self, shape: ConvShape, device: torch.device):
        super().__init__("eval", device, grad=False)
        self.shape = shape
        generator = torch.Generator().manual_seed(0)  # of vectors
        module = ConvNormAct2d(shape.C, shape.COUT, shape.kernel_size, stride=shape.stride, act=shape.act)
        norm = module.norm  # statistics of a trained net, not 0 and 1
        norm.running_mean.copy_(0.1 * torch.randn(norm.num_features, generator=generator))
        norm.running_var.copy_(0.5 + torch.rand(norm.num_features, generator=generator))
        self.fused = module.to(device, memory_format=torch.channels_last).eval()
        twin = copy.deepcopy(self.fused)
        self.plain = nn.Sequential(twin.conv, twin.norm, nn.ReLU6() if shape.act == "relu6" else nn.ReLU())
        self.x = self.draw(shape.N, shape.C, shape.H, shape.W)

    @property
    def bytes_moved(self) -> float:
        """The least traffic of this file's header."""
        return least(self.shape) * self.dtype.itemsize

    def forms(self) -> dict[str, nn.Module]:
        """provider -> module."""
        return {"fastseg": self.fused, "eager": self.plain}

    def function(self, form: nn.Module) -> Callable[[], object]:
        return lambda: form(self.x)


def least(shape: ConvShape) -> int:
    """Elements of input, output and weights."""
    return shape.inputs + shape.outputs + shape.kernel_size**2 * shape.C * shape.COUT


def cases(size: str) -> list[problem.Case]:
    """Every shape."""
    out = []
    for full in CONVOLUTIONS:
        macs = lambda shape: shape.kernel_size**2 * shape.C * shape.outputs
        conv = Cost(bytes=ITEM * least(full), tensor=2.0 * macs(full))
        floors = {"fastseg": [conv], "eager": [conv, *[Cost(bytes=2 * ITEM * full.outputs)] * 2]}
        shape = full if size == "full" else replace(full, N=1)
        if size == "tiny":
            shape = replace(shape, C=min(shape.C, 16), COUT=8, H=12, W=12)
        out.append(problem.Case(OP, full.name, shape.N, "eval", partial(Problem, shape), floors, macs(shape)))
    return out


@pytest.mark.parametrize("provider", ["fastseg", "eager", "compile"])
@problem.every(cases)
def bench_conv_act(number, provider, run, device, size, benchmark):
    problem.bench(cases(size)[number], provider, run, device, size, benchmark)
