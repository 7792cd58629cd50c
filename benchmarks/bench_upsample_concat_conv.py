"""A decoder's first convolution: of an upsampled map beside another, from nine taps at low resolution.

    y = relu(conv2d(cat([interpolate(deep, scale_factor=s, mode="bilinear"), low], 1), weight, bias, padding=1))

With p = N h w pixels of the small map, P = s^2 p of the large one, C and CL channels of deep and low, the least that is
to be done are the products, 9 p C COUT of the taps and 9 P CL COUT of low's half (upsampled first: 9 P (C + CL) COUT),
and as traffic, in elements, p C + P CL + P COUT and the weights, each once. DeepLabV3+ at 512^2: 4.8 GFLOP of 22.9.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import problem
from benchmarks.roofline.floors import ITEM, Cost
from benchmarks.workloads import DECODERS, DecoderShape
from fastseg.ops import upsample_concat_conv2d

OP = "upsample_concat_conv2d"
MODES = ("forward",)


class Problem(problem.Problem):
    """One shape on one device, in channels_last, aligned at the corners as DeepLabV3+'s is.

    Args:
        shape: of ``workloads``.
        mode: of ``MODES``.
        device: where.
    """

    inputs = ("x", "low", "weight", "bias")

    def __init__(self, shape: DecoderShape, mode: str, device: torch.device):
        super().__init__(mode, device, grad=False)
        self.shape = shape
        s, fan_in = shape, 9 * (shape.C + shape.CL)
        self.x, self.low = self.draw(s.N, s.C, s.H, s.W), self.draw(s.N, s.CL, s.H * s.scale, s.W * s.scale)
        self.weight, self.bias = self.draw(s.COUT, s.C + s.CL, 3, 3).mul_(fan_in**-0.5), self.draw(s.COUT)

    @property
    def bytes_moved(self) -> float:
        """The least traffic of this file's header."""
        s = self.shape
        return (s.pixels * s.C + s.large * (s.CL + s.COUT) + self.weight.numel()) * self.dtype.itemsize

    def forms(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """provider -> the convolution."""

        def eager(x: Tensor) -> Tensor:
            up = F.interpolate(x, self.low.shape[2:], mode="bilinear", align_corners=True)
            return F.relu(F.conv2d(torch.cat([up, self.low], 1), self.weight, self.bias, padding=1))

        ours = lambda x: upsample_concat_conv2d(x, self.low, self.weight, self.bias, act="relu", align_corners=True)
        return {"fastseg": ours, "eager": eager}

    def function(self, form: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        """What is timed."""
        return lambda: form(self.x)


def cut(shape: DecoderShape, size: str) -> DecoderShape:
    """One image for a CPU; few channels and pixels in a smoke test."""
    if size == "tiny":
        return replace(shape, C=8, CL=4, COUT=8, H=3, W=2, N=1)
    return replace(shape, N=1) if size == "small" else shape


def floors(s: DecoderShape) -> dict[str, list[Cost]]:
    """fastseg: all in one. Eager: the upsampled map, its copy beside low, the convolution, ReLU."""
    weights, products = 9 * (s.C + s.CL) * s.COUT, 18.0 * s.COUT * (s.pixels * s.C + s.large * s.CL)
    cost = lambda elements, flop=0.0: Cost(bytes=ITEM * elements, tensor=flop)
    return {
        "fastseg": [cost(s.pixels * s.C + s.large * (s.CL + s.COUT) + weights, products)],
        "eager": [
            cost(s.pixels * s.C + s.large * s.C),
            cost(2 * s.large * (s.C + s.CL)),
            cost(s.large * (s.C + s.CL + s.COUT) + weights, 18.0 * s.large * (s.C + s.CL) * s.COUT),
            cost(2 * s.large * s.COUT),
        ],
    }


def cases(size: str) -> list[problem.Case]:
    """Every decoder."""
    out = []
    for shape in DECODERS:
        small = cut(shape, size)
        macs = 9.0 * small.large * (small.C + small.CL) * small.COUT
        name = f"{shape.C}+{shape.CL}->{shape.COUT}_{shape.H}x{shape.W}_x{shape.scale}_n{shape.N}"
        build = partial(Problem, small, "forward")
        out.append(problem.Case(OP, name, shape.N, "forward", build, floors(shape), macs))
    return out


@pytest.mark.parametrize("provider", ["fastseg", "eager", "compile"])
@problem.every(cases)
def bench_upsample_concat_conv(number, provider, run, device, size, benchmark):
    problem.bench(cases(size)[number], provider, run, device, size, benchmark)
