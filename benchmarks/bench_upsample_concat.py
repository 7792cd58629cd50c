"""A U-Net's skip connection: a map upsampled beside another, against ``cat`` of ``interpolate``, eager and compiled.

    forward     y = cat([skip, interpolate(x, scale_factor=s, mode="bilinear")], 1)    least traffic  lo + 3 hi
    backward    dx from the channels of dy                                             least traffic  hi + lo

in elements: lo = N C H W, hi = s^2 lo, the skip having as many channels as x. Eager moves lo + 5 hi: it writes the
upsampled map, reads it and writes it again.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import bench_upsample_bilinear, problem
from benchmarks.roofline.floors import ITEM, Cost
from benchmarks.workloads import SKIPS, HeadShape
from fastseg.ops import upsample_concat

OP = "upsample_concat"
MODES = ("forward", "backward")


class Problem(bench_upsample_bilinear.Problem):
    """One shape on one device, in channels_last, aligned at the corners as U-Net's is.

    Args:
        shape: of ``workloads``.
        mode: of ``MODES``.
        device: where.
    """

    inputs = ("x", "skip")

    def __init__(self, shape: HeadShape, mode: str, device: torch.device):
        super().__init__(shape, mode, "channels_last", True, device)
        self.skip = self.draw(shape.N, shape.C, shape.H * shape.scale, shape.W * shape.scale)

    @property
    def bytes_moved(self) -> float:
        """The least traffic of this file's header."""
        return (self.x.numel() + (3 if self.mode == "forward" else 1) * self.skip.numel()) * self.dtype.itemsize

    def forms(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """provider -> the joined map."""
        size = self.skip.shape[2:]
        up = lambda x: F.interpolate(x, size, mode="bilinear", align_corners=True)
        return {
            "fastseg": lambda x: upsample_concat(x, [self.skip], align_corners=True),
            "eager": lambda x: torch.cat([self.skip, up(x)], 1),
        }


def cases(size: str) -> list[problem.Case]:
    """Every shape in each mode."""
    out = []
    for mode in MODES:
        for shape in SKIPS:
            lo = ITEM * shape.N * shape.C * shape.H * shape.W
            hi = lo * shape.scale**2
            floors = {"fastseg": [Cost(bytes=lo + (3 if mode == "forward" else 1) * hi)]}
            if mode == "forward":
                floors["eager"] = [Cost(bytes=lo + hi), Cost(bytes=4 * hi)]
            small = bench_upsample_bilinear.cut(shape, size)
            build = partial(Problem, small, mode)
            out.append(problem.Case(OP, bench_upsample_bilinear.name_of(shape), shape.N, mode, build, floors))
    return out


@pytest.mark.parametrize("provider", ["fastseg", "eager", "compile"])
@problem.every(cases)
def bench_upsample_concat(number, provider, run, device, size, benchmark):
    problem.bench(cases(size)[number], provider, run, device, size, benchmark)
