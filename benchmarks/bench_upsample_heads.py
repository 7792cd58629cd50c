"""The fused heads against torch's two steps at full resolution, eager and compiled.

    argmax     interpolate(logits).argmax(1)                 least traffic  lo + pixels bytes of classes
    loss       cross_entropy(interpolate(logits), target)    least traffic  lo + 8 of labels + 4 of log-sum-exp a pixel
    backward   the gradient at the logits                    least traffic  2 lo + the same

lo = N C h w logits of 16 bits (32 on a CPU); labels are int64. "Least" means each tensor once: GB/s is that traffic
over the time, so that providers are comparable. The loss is bound by its exponentials: ``op_floors.upsampled_loss``
has the floor of both halves together, the forward and the backward have none of their own.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import harness
import pytest
import torch
from floors import find_device, floor_of
from op_floors import argmax_kernels
from torch import Tensor
from torch.nn import functional as F
from workloads import ARGMAX, COARSE, CROSS_ENTROPY, HeadShape

from fastseg.ops import upsample_argmax, upsample_cross_entropy

IGNORED = 255
MODES = ("argmax", "loss", "loss-backward")
PROVIDERS = ("fastseg", "eager", "compile")


class Problem:
    """One shape on one device: logits in channels_last, labels, and what each provider calls.

    Args:
        shape: of ``workloads``.
        mode: of ``MODES``.
        device: where.
    """

    def __init__(self, shape: HeadShape, mode: str, device: torch.device):
        self.shape, self.mode, self.device, self.dtype = shape, mode, device, harness.dtype_for(device)
        generator = torch.Generator().manual_seed(0)
        self.size = (shape.H * shape.scale, shape.W * shape.scale)
        # smooth, as a network's are: noise at a quarter of the size, upsampled; pruning depends on it
        noise = torch.randn(shape.N, shape.C, -(-shape.H // 4), -(-shape.W // 4), generator=generator)
        logits = 4 * F.interpolate(noise, (shape.H, shape.W), mode="bilinear")
        self.logits = logits.to(device, self.dtype).contiguous(memory_format=torch.channels_last)
        self.logits.requires_grad_(mode != "argmax")
        target = torch.randint(shape.C, (shape.N, *self.size), generator=generator)
        target[:, :: max(2, self.size[0] // 8)] = IGNORED
        self.target = target.to(device)

    @property
    def name(self) -> str:
        """``21x128x128x4-n16``."""
        s = self.shape
        return f"{s.C}x{s.H}x{s.W}x{s.scale}-n{s.N}"

    @property
    def graph(self) -> bool:
        """Whether it may be timed as a CUDA graph."""
        return self.mode != "loss-backward"

    @property
    def bytes_moved(self) -> float:
        """The least traffic of this file's header."""
        lo, pixels = self.logits.nbytes, self.shape.N * self.size[0] * self.size[1]
        return {"argmax": lo + pixels, "loss": lo + 12 * pixels, "loss-backward": 2 * lo + 12 * pixels}[self.mode]

    @property
    def floor_s(self) -> float | None:
        """Seconds of the pruned argmax at the device's ceilings, where known."""
        chip = find_device(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        if chip is None or self.mode != "argmax":
            return None
        pixels = self.target.numel()
        return floor_of(argmax_kernels(self.logits.numel(), self.shape.C * pixels, pixels, "fused"), chip).us * 1e-6

    def providers(self) -> dict[str, Callable[..., Tensor]]:
        """provider -> function of logits and labels. ``torch.compile`` on a GPU only: a CPU would need minutes."""
        upsampled = lambda x: F.interpolate(x, self.size, mode="bilinear")
        if self.mode == "argmax":
            functions = {
                "fastseg": lambda x, target: upsample_argmax(x, self.size),
                "eager": lambda x, target: upsampled(x).argmax(1),
            }
        else:
            functions = {
                "fastseg": lambda x, target: upsample_cross_entropy(x, target, ignore_index=IGNORED),
                "eager": lambda x, target: F.cross_entropy(upsampled(x).float(), target, ignore_index=IGNORED),
            }
        if self.device.type == "cuda":
            torch._functorch.config.donated_buffer = False  # a timed backward runs many times on one graph
            torch._dynamo.reset()
            functions["compile"] = torch.compile(functions["eager"], mode="max-autotune-no-cudagraphs", dynamic=False)
        return functions

    def function(self, provider: Callable[..., Tensor]) -> Callable[[], object]:
        """What is timed. A backward contains no forward: its forward runs here, once."""
        if self.mode != "loss-backward":
            return partial(provider, self.logits, self.target)
        loss = provider(self.logits, self.target)
        return lambda: torch.autograd.grad(loss, self.logits, retain_graph=True)

    def functions(self, names: tuple[str, ...] = PROVIDERS) -> dict[str, Callable[[], object]]:
        """provider -> what is timed, for those of ``names`` that run here."""
        return {name: self.function(provider) for name, provider in self.providers().items() if name in names}

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


CASES = [(mode, s) for mode in MODES for s in (*(ARGMAX if mode == "argmax" else CROSS_ENTROPY), *COARSE)]


def problems(tiny: bool, device: torch.device) -> Iterator[Problem]:
    """Every case; the first of each mode in a rehearsal."""
    for mode, shape in [(mode, ARGMAX[0]) for mode in MODES] if tiny else CASES:
        yield Problem(cut(shape, "tiny" if tiny else "full"), mode, device)


def name_of(case: tuple[str, HeadShape]) -> str:
    mode, s = case
    return f"{mode}-{s.C}x{s.H}x{s.W}x{s.scale}-n{s.N}"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def bench_upsample_heads(case, provider, run, device, size, benchmark):
    if provider == "compile" and device.type == "cpu":
        pytest.skip("torch.compile is measured on a GPU")
    mode, shape = case
    benchmark.group = name_of(case)
    problem = Problem(cut(shape, size), mode, device)
    with torch.set_grad_enabled(mode != "argmax"):
        functions = problem.functions(("eager", provider))
        wrong = problem.disagreement(functions)
        assert not wrong, wrong
        run(
            functions[provider], bytes_moved=problem.bytes_moved, floor_s=problem.floor_s,
            graph=problem.graph, shape=name_of(case), N=problem.shape.N, dtype=str(problem.dtype),
            provider=provider, mode=mode,
        )  # fmt: skip
