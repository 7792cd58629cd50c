"""The fused heads against torch's two steps at full resolution, eager and compiled.

    argmax     interpolate(logits).argmax(1)                 least traffic  lo + pixels bytes of classes
    loss       cross_entropy(interpolate(logits), target)    least traffic  lo + 8 of labels + 4 of log-sum-exp a pixel
    backward   the gradient at the logits                    least traffic  2 lo + the same

lo = N C h w logits of 16 bits (32 on a CPU); labels are int64. "Least" means each tensor once: GB/s is that traffic
over the time, so that providers are comparable. The loss is bound by its exponentials: ``op_floors.upsampled_loss``
has the floor of both halves together, the forward and the backward have none of their own.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness, problem
from benchmarks.roofline.floors import Cost
from benchmarks.roofline.op_floors import argmax_kernels
from benchmarks.workloads import ARGMAX, COARSE, CROSS_ENTROPY, HeadShape
from fastseg.ops import upsample_argmax, upsample_cross_entropy

OP = "upsample_heads"
IGNORED = 255
MODES = ("argmax", "loss", "loss-backward")


class Problem(problem.Problem):
    """One shape on one device: logits in channels_last, labels, and what each provider calls.

    Args:
        shape: of ``workloads``.
        mode: of ``MODES``.
        device: where.
    """

    def __init__(self, shape: HeadShape, mode: str, device: torch.device):
        super().__init__(mode, device, grad=mode != "argmax")
        self.shape = shape
        self.size = (shape.H * shape.scale, shape.W * shape.scale)
        # smooth, as a network's are: noise at a quarter of the size, upsampled; pruning depends on it
        noise = self.draw(shape.N, shape.C, -(-shape.H // 4), -(-shape.W // 4))
        self.logits = F.interpolate(noise, (shape.H, shape.W), mode="bilinear").mul_(4)
        self.logits = self.logits.contiguous(memory_format=torch.channels_last).requires_grad_(mode != "argmax")
        self.target = None
        if mode != "argmax":
            self.target = torch.randint(shape.C, (shape.N, *self.size), generator=self.generator, device=device)
            self.target[:, :: max(2, self.size[0] // 8)] = IGNORED

    @property
    def bytes_moved(self) -> float:
        """The least traffic of this file's header."""
        lo, pixels = self.logits.nbytes, self.shape.N * self.size[0] * self.size[1]
        return {"argmax": lo + pixels, "loss": lo + 12 * pixels, "loss-backward": 2 * lo + 12 * pixels}[self.mode]

    def forms(self) -> dict[str, Callable[..., Tensor]]:
        """provider -> function of logits and labels."""
        upsampled = lambda x: F.interpolate(x, self.size, mode="bilinear")
        if self.mode == "argmax":
            return {
                "fastseg": lambda x, target: upsample_argmax(x, self.size),
                "eager": lambda x, target: upsampled(x).argmax(1),
            }
        return {
            "fastseg": lambda x, target: upsample_cross_entropy(x, target, ignore_index=IGNORED),
            "eager": lambda x, target: F.cross_entropy(upsampled(x).float(), target, ignore_index=IGNORED),
        }

    def function(self, provider: Callable[..., Tensor]) -> Callable[[], object]:
        """What is timed. A backward contains no forward: its forward runs here, once."""
        if self.mode != "loss-backward":
            return partial(provider, self.logits, self.target)
        loss = provider(self.logits, self.target)
        return lambda: torch.autograd.grad(loss, self.logits, retain_graph=True)

    def disagreement(self, functions: dict[str, Callable[[], object]]) -> str:
        """Why the providers do not compute the same, or "". Called before anything is timed."""
        results = {name: harness.floats(function()) for name, function in functions.items()}
        exact = self.logits.detach().float().requires_grad_(self.mode != "argmax")
        full = F.interpolate(exact, self.size, mode="bilinear")
        if (
            self.mode == "argmax"
        ):  # classes: as good as the best, up to what the rounding of full-size logits makes a tie
            best, slack = full.amax(1), 2 * harness.AGREEMENT[self.dtype] * full.abs().max()
            worse = {
                name: int((best - full.gather(1, classes.long()[:, None])[:, 0] > slack).sum())
                for name, (classes,) in results.items()
            }
            return "; ".join(f"{name} is wrong in {count} pixels" for name, count in worse.items() if count)
        loss = F.cross_entropy(full, self.target, ignore_index=IGNORED)
        want = [loss.detach()] if self.mode == "loss" else list(torch.autograd.grad(loss, exact))
        return harness.disagreement(results, want, self.dtype)


def cut(shape: HeadShape, size: str) -> HeadShape:
    """One image for a CPU; 12 x 12 pixels of at most 24 classes in a smoke test."""
    if size == "tiny":
        return replace(shape, C=min(shape.C, 24), H=min(shape.H, 3), W=min(shape.W, 3), N=1)
    return replace(shape, N=1) if size == "small" else shape


def name_of(shape: HeadShape) -> str:
    return f"{shape.C}x{shape.H}x{shape.W}_x{shape.scale}_n{shape.N}"


def floors_of(shape: HeadShape, mode: str) -> dict[str, list[Cost]]:
    """provider -> its kernels: of argmax; the loss has a floor for both halves together."""
    lo = shape.N * shape.C * shape.H * shape.W
    hi, strategies = lo * shape.scale**2, {"fastseg": "fused", "eager": "eager", "compile": "compile"}
    if mode != "argmax":
        return {}
    return {provider: argmax_kernels(lo, hi, hi // shape.C, strategy) for provider, strategy in strategies.items()}


def cases(size: str) -> list[problem.Case]:
    """Every shape in each mode."""
    return [
        problem.Case(
            OP, name_of(shape), shape.N, mode, partial(Problem, cut(shape, size), mode), floors_of(shape, mode)
        )
        for mode in MODES
        for shape in (*(ARGMAX if mode == "argmax" else CROSS_ENTROPY), *COARSE)
    ]  # fmt: skip


@pytest.mark.parametrize("provider", ["fastseg", "eager", "compile"])
@problem.every(cases)
def bench_upsample_heads(number, provider, run, device, size, benchmark):
    problem.bench(cases(size)[number], provider, run, device, size, benchmark)
