"""Bilinear upsampling against ``torch.nn.functional.interpolate``, eager and compiled.

    forward     y = interpolate(x, scale_factor=s, mode="bilinear")     least traffic  lo + hi  (x read, y written)
    backward    dx from dy                                              least traffic  hi + lo  (dy read, dx written)

in elements: lo = N C H W, hi = s^2 lo. GB/s is that traffic over the time, so that providers are comparable. torch's
CUDA backward fills dx with zeros and adds 4 hi elements to it atomically; this one gathers.
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
from benchmarks.workloads import COARSE, UPSAMPLING, HeadShape
from fastseg.ops import upsample_bilinear

OP = "upsample_bilinear"
MODES = ("forward", "backward")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class Problem(problem.Problem):
    """One shape in one layout on one device, and what each provider calls.

    Args:
        shape: of ``workloads``.
        mode: of ``MODES``.
        layout: of ``LAYOUTS``.
        align_corners: as ``interpolate``.
        device: where.
    """

    def __init__(self, shape: HeadShape, mode: str, layout: str, align_corners: bool, device: torch.device):
        super().__init__(mode, device, grad=mode == "backward")
        self.shape, self.layout, self.align_corners = shape, LAYOUTS[layout], align_corners
        x = self.draw(shape.N, shape.C, shape.H, shape.W, last=layout == "channels_last")
        self.x = x.requires_grad_(mode == "backward")

    @property
    def bytes_moved(self) -> float:
        """The least traffic of this file's header, the same both ways."""
        return (1 + self.shape.scale**2) * self.x.numel() * self.dtype.itemsize

    def forms(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """provider -> upsampling."""
        options = {"scale_factor": self.shape.scale, "align_corners": self.align_corners}
        return {
            "fastseg": lambda x: upsample_bilinear(x, **options),
            "eager": lambda x: F.interpolate(x, mode="bilinear", **options),
        }

    def function(self, upsample: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        """What is timed. A backward contains no forward: its forward runs here, once."""
        if self.mode == "forward":
            return lambda: upsample(self.x)
        y = upsample(self.x)
        dy = self.gradient(y)
        return lambda: torch.autograd.grad(y, self.x, dy, retain_graph=True)


def cut(shape: HeadShape, size: str) -> HeadShape:
    """One image for a CPU; at most 8 channels and 5 x 4 pixels in a smoke test."""
    if size == "tiny":
        return replace(shape, C=min(shape.C, 8), H=5, W=4, N=1)
    return replace(shape, N=1) if size == "small" else shape


def name_of(shape: HeadShape) -> str:
    return f"{shape.C}x{shape.H}x{shape.W}_x{shape.scale}_n{shape.N}"


def cases(size: str) -> list[problem.Case]:
    """Every shape as models use it, channels_last and align_corners=False; then aligned, and NCHW."""
    out = []
    for layout, align_corners in (("channels_last", False), ("channels_last", True), ("contiguous", False)):
        way = "" if (layout, align_corners) == ("channels_last", False) else " corners" if align_corners else " NCHW"
        for mode in MODES:
            for shape in (*UPSAMPLING, *COARSE):
                lo = shape.N * shape.C * shape.H * shape.W
                floor = [Cost(bytes=ITEM * (1 + shape.scale**2) * lo)]
                build = partial(Problem, cut(shape, size), mode, layout, align_corners)
                floors = {"fastseg": floor} | ({"eager": floor, "compile": floor} if mode == "forward" else {})
                out.append(problem.Case(OP, name_of(shape) + way, shape.N, mode, build, floors))
    return out


@pytest.mark.parametrize("provider", ["fastseg", "eager", "compile"])
@problem.every(cases)
def bench_upsample_bilinear(number, provider, run, device, size, benchmark):
    problem.bench(cases(size)[number], provider, run, device, size, benchmark)
