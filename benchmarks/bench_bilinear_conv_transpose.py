"""FCN's bilinear transposed convolution against torch's, dense and grouped, with and without the skip addition.

    forward     y = conv_transpose2d(x, bilinear_kernel, k = 2s, padding = s / 2)     least traffic  lo + hi
    skip        y + skip                                                              least traffic  lo + 2 hi
    backward    dx from dy                                                            least traffic  hi + lo

in elements: lo = N C H W, hi = s^2 lo. The dense weight is what FCN code holds: C times the multiply-adds, all but one
in C of them with 0. "grouped" takes its diagonal, "compile" compiles the dense module, "grouped-compile" the other.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import harness
import pytest
import torch
from floors import Cost, find_device, floor_of
from torch import Tensor
from torch.nn import functional as F
from workloads import COARSE, DECONV, HeadShape

from fastseg.nn import BilinearConvTranspose2d

MODES = ("forward", "skip", "backward")
PROVIDERS = ("fastseg", "eager", "grouped", "compile", "grouped-compile")
DENSE_MACS = 2e9  # on a CPU; 150 classes take half a minute a call


class Problem:
    """One shape on one device, in channels_last, and what each provider calls.

    Args:
        shape: of ``workloads``.
        mode: of ``MODES``.
        device: where.
    """

    def __init__(self, shape: HeadShape, mode: str, device: torch.device):
        self.shape, self.mode, self.device, self.dtype = shape, mode, device, harness.dtype_for(device)
        generator = torch.Generator().manual_seed(0)
        draw = lambda *size: torch.randn(size, generator=generator).to(device, self.dtype)
        last = lambda t: t.contiguous(memory_format=torch.channels_last)
        s = shape.scale
        self.x = last(draw(shape.N, shape.C, shape.H, shape.W)).requires_grad_(mode == "backward")
        self.hi = last(draw(shape.N, shape.C, shape.H * s, shape.W * s))  # the skip, or the gradient
        self.module = BilinearConvTranspose2d(shape.C, s, 2 * s).to(device, self.dtype).eval()

    @property
    def name(self) -> str:
        return name_of(self.shape)

    @property
    def graph(self) -> bool:
        """Whether it may be timed as a CUDA graph."""
        return self.mode != "backward"

    @property
    def bytes_moved(self) -> float:
        """The least traffic of this file's header."""
        hi = 2 if self.mode == "skip" else 1
        return (self.x.numel() + hi * self.hi.numel()) * self.dtype.itemsize

    @property
    def floor_s(self) -> float | None:
        """Seconds at the device's ceilings, where known."""
        chip = find_device(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return floor_of([Cost(bytes=self.bytes_moved)], chip).us * 1e-6 if chip is not None else None

    def providers(self) -> dict[str, Callable[[Tensor, Tensor | None], Tensor]]:
        """provider -> upsampling of (x, skip). ``torch.compile`` on a GPU only."""
        weight, options = self.module.weight, {"stride": self.shape.scale, "padding": self.shape.scale // 2}
        diagonal = weight.diagonal().permute(2, 0, 1)[:, None].contiguous()
        add = lambda y, skip: y if skip is None else y + skip
        dense = lambda x, skip: add(F.conv_transpose2d(x, weight.to(x.dtype), **options), skip)
        grouped = lambda x, skip: add(F.conv_transpose2d(x, diagonal.to(x.dtype), groups=self.shape.C, **options), skip)
        providers = {"fastseg": lambda x, skip: self.module(x, skip=skip), "eager": dense, "grouped": grouped}
        if self.device.type == "cuda":
            torch._functorch.config.donated_buffer = False  # a timed backward runs many times on one graph
            torch._dynamo.reset()
            for name, function in (("compile", dense), ("grouped-compile", grouped)):
                providers[name] = torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)
        return providers

    def function(self, upsample: Callable[[Tensor, Tensor | None], Tensor]) -> Callable[[], object]:
        """What is timed. A backward contains no forward: its forward runs here, once."""
        if self.mode != "backward":
            return lambda: upsample(self.x, self.hi if self.mode == "skip" else None)
        y = upsample(self.x, None)
        return lambda: torch.autograd.grad(y, self.x, self.hi, retain_graph=True)

    def functions(self, names: tuple[str, ...] = PROVIDERS) -> dict[str, Callable[[], object]]:
        """provider -> what is timed, for those of ``names`` that run here."""
        return {name: self.function(provider) for name, provider in self.providers().items() if name in names}

    def exact(self) -> list[Tensor]:
        """The grouped convolution in fp32, without tf32."""
        saved = self.x, self.hi, torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        self.x = self.x.detach().float().requires_grad_(self.mode == "backward")
        self.hi = self.hi.float()
        try:
            return harness.floats(self.function(self.providers()["grouped"])())
        finally:
            self.x, self.hi, torch.backends.cudnn.allow_tf32 = saved

    def disagreement(self, functions: dict[str, Callable[[], object]]) -> str:
        """Why the providers do not compute the same, or "". Called before anything is timed."""
        results = {name: harness.floats(function()) for name, function in functions.items()}
        return harness.disagreement(results, self.exact(), self.dtype, baseline="grouped")


def small(shape: HeadShape) -> HeadShape:
    """One image; what a CPU is given."""
    return replace(shape, N=1)


def tiny(shape: HeadShape) -> HeadShape:
    """For a smoke test: at most 5 channels and 3 x 4 pixels."""
    return replace(shape, C=min(shape.C, 5), H=3, W=4, N=1)


def problems(tiny_shapes: bool, device: torch.device) -> Iterator[Problem]:
    """Each shape in each mode; the first alone in a rehearsal."""
    for mode in MODES:
        for shape in DECONV[:1] if tiny_shapes else (*DECONV, *COARSE):
            yield Problem(tiny(shape) if tiny_shapes else shape, mode, device)


def name_of(shape: HeadShape) -> str:
    return f"{shape.C}x{shape.H}x{shape.W}_k{2 * shape.scale}_s{shape.scale}_n{shape.N}"


def dense_macs(shape: HeadShape) -> float:
    """Multiply-adds of the dense convolution: four taps of every class for every class."""
    return 4.0 * shape.N * shape.C**2 * shape.H * shape.W * shape.scale**2


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", (*DECONV, *COARSE), ids=name_of)
def bench_bilinear_conv_transpose(shape, mode, provider, run, device, size, benchmark):
    if "compile" in provider and device.type == "cpu":
        pytest.skip("torch.compile is measured on a GPU")
    shape = {"full": lambda s: s, "small": small, "tiny": tiny}[size](shape)
    if size == "small" and provider == "eager" and dense_macs(shape) > DENSE_MACS:
        pytest.skip(f"{dense_macs(shape):.1e} multiply-adds: on a GPU, or with --full")
    benchmark.group = f"bilinear_conv_transpose {name_of(shape)} {mode}"
    problem = Problem(shape, mode, device)
    with torch.set_grad_enabled(mode == "backward"):
        functions = problem.functions(("grouped", provider))
        wrong = problem.disagreement(functions)
        assert not wrong, wrong
        run(
            functions[provider], bytes_moved=problem.bytes_moved, floor_s=problem.floor_s, graph=problem.graph,
            shape=name_of(shape), N=shape.N, dtype=str(problem.dtype), provider=provider, mode=mode,
        )  # fmt: skip
