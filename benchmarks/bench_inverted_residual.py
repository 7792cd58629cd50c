"""MobileNetV2's inverted residual blocks in evaluation, against plain modules and ``torch.compile``.

    y = bn(project(relu6(bn(depthwise(relu6(bn(expand(x))))))))      (+ x)      least traffic  A + Y + W

in elements: A = N C H W, Y = N COUT OH OW, W = HIDDEN (C + 9 + COUT). "fastseg" is what the cost model chooses of the
two forms that are timed beside it: "whole block", one launch, and "parts", the expansion (A + E) and the fused pair
(E + Y), E = HIDDEN / C times A.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks import problem
from benchmarks.roofline.floors import DEVICES, floor_of
from benchmarks.roofline.op_floors import mbconv_kernels
from benchmarks.workloads import BLOCKS, BlockShape
from fastseg.models.encoders.mobilenet_v2 import InvertedResidual
from fastseg.nn.fuse.conv_norm_act import folded, run_conv_norm_act
from fastseg.nn.fuse.separable import run_separable
from fastseg.ops.inverted_residual import inverted_residual

OP = "inverted_residual"
MODES = ("eval",)


class Problem(problem.Problem):
    """One block on one device, in channels_last: modules with the same parameters for each provider.

    Args:
        shape: of ``workloads``.
        device: where.
    """

    autocast = True

    def __init__(self, shape: BlockShape, device: torch.device):
        super().__init__("eval", device, grad=False)
        self.shape = shape
        generator = torch.Generator().manual_seed(0)  # of vectors
        self.block = InvertedResidual(
            shape.C, shape.COUT, stride=shape.stride, dilation=shape.dilation, expansion=shape.expansion,
            residual=shape.residual,
        )  # fmt: skip
        for norm in self.block.modules():
            if isinstance(norm, nn.BatchNorm2d):  # statistics of a trained net, not 0 and 1
                norm.running_mean.copy_(0.1 * torch.randn(norm.num_features, generator=generator))
                norm.running_var.copy_(0.5 + torch.rand(norm.num_features, generator=generator))
        self.block = self.block.to(device, memory_format=torch.channels_last).eval()
        self.plain = copy.deepcopy(self.block.conv)
        self.x = self.draw(shape.N, shape.C, shape.H, shape.W)

    @property
    def bytes_moved(self) -> float:
        """The least traffic of this file's header."""
        s = self.shape
        pixels = s.N * -(-s.H // s.stride) * -(-s.W // s.stride)
        weights = s.expansion * s.C * (s.C + 9 + s.COUT)
        return (self.x.numel() + pixels * s.COUT + weights) * self.dtype.itemsize

    def forms(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """provider -> block; "whole block" and "parts" whatever the cost model says."""
        shape, (expand, norm, _, depthwise, mid, _, pointwise, post) = self.shape, self.block.conv
        skip = lambda x: x if shape.residual else None
        options = {"stride": shape.stride, "dilation": shape.dilation, "residual": shape.residual}
        pairs = ((expand, norm), (depthwise, mid), (pointwise, post))

        def parts(x: Tensor) -> Tensor:
            y = run_conv_norm_act(x, expand, norm, "relu6")
            return run_separable(y, depthwise, mid, "relu6", pointwise, post, None, residual=skip(x))

        return {
            "fastseg": self.block,
            "eager": lambda x: self.plain(x) + x if shape.residual else self.plain(x),
            "whole block": lambda x: inverted_residual(x, *(t for pair in pairs for t in folded(x, *pair)), **options),
            "parts": parts,
        }

    def function(self, form: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: form(self.x)


def floors(shape: BlockShape) -> dict[str, list]:
    """provider -> kernels; fastseg's are those of the form with the lower floor on an H200."""
    sizes = (shape.C, shape.COUT, shape.H, shape.W, shape.N, shape.expansion, shape.stride, shape.dilation)
    whole, parts, eager = (mbconv_kernels(*sizes, form) for form in ("block", "pair", "eager"))
    return {"fastseg": min(whole, parts, key=lambda kernels: floor_of(kernels, DEVICES["H200"]).us), "eager": eager,
            "whole block": whole, "parts": parts}  # fmt: skip


def cut(shape: BlockShape, size: str) -> BlockShape:
    """One image for a CPU, small sides besides in a smoke test."""
    if size == "tiny":
        return replace(shape, N=1, H=12, W=12, expansion=2)
    return replace(shape, N=1) if size == "small" else shape


def cases(size: str) -> list[problem.Case]:
    """Every block."""
    out = []
    for full in BLOCKS:
        shape = cut(full, size)
        hidden = shape.expansion * shape.C * shape.H * shape.W * shape.N
        macs = hidden * (shape.C + (9 + shape.COUT) / shape.stride**2)
        out.append(problem.Case(OP, full.name, shape.N, "eval", partial(Problem, shape), floors(full), macs))
    return out


@pytest.mark.parametrize("provider", ["fastseg", "eager", "whole block", "parts", "compile"])
@problem.every(cases)
def bench_inverted_residual(number, provider, run, device, size, benchmark):
    problem.bench(cases(size)[number], provider, run, device, size, benchmark)
