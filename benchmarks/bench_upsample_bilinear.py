"""Bilinear upsampling against ``torch.nn.functional.interpolate``, eager and compiled.

    forward     y = interpolate(x, scale_factor=s, mode="bilinear")     least traffic  lo + hi  (x read, y written)
    backward    dx from dy                                              least traffic  hi + lo  (dy read, dx written)

in elements: lo = N C H W, hi = s^2 lo. GB/s is that traffic over the time, so that providers are comparable. torch's
CUDA backward fills dx with zeros and adds 4 hi elements to it atomically; this one gathers.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import harness
import pytest
import torch
from floors import Cost, find_device, floor_of
from torch import Tensor
from torch.nn import functional as F
from workloads import COARSE, UPSAMPLING, HeadShape

from fastseg.ops import upsample_bilinear

MODES = ("forward", "backward")
PROVIDERS = ("fastseg", "eager", "compile")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class Problem:
    """One shape in one layout on one device, and what each provider calls.

    Args:
        shape: of ``workloads``.
        mode: of ``MODES``.
        layout: of ``LAYOUTS``.
        align_corners: as ``interpolate``.
        device: where.
    """

    def __init__(self, shape: HeadShape, mode: str, layout: str, align_corners: bool, device: torch.device):
        self.shape, self.mode, self.layout, self.device = shape, mode, LAYOUTS[layout], device
        self.align_corners, self.dtype = align_corners, harness.dtype_for(device)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape.N, shape.C, shape.H, shape.W, generator=generator).to(device, self.dtype)
        self.x = x.contiguous(memory_format=self.layout).requires_grad_(mode == "backward")
        self.dy = torch.randn(shape.N, shape.C, shape.H * shape.scale, shape.W * shape.scale, generator=generator)
        self.dy = self.dy.to(device, self.dtype).contiguous(memory_format=self.layout)

    @property
    def name(self) -> str:
        """Shape, layout and ``align_corners``."""
        layout = next(name for name, layout in LAYOUTS.items() if layout == self.layout)
        return f"{name_of(self.shape)} {layout} {'corners' if self.align_corners else 'centres'}"

    @property
    def graph(self) -> bool:
        """Whether it may be timed as a CUDA graph."""
        return self.mode == "forward"

    @property
    def bytes_moved(self) -> float:
        """The least traffic of this file's header, the same both ways."""
        return (self.x.numel() + self.dy.numel()) * self.dtype.itemsize

    @property
    def floor_s(self) -> float | None:
        """Seconds at the device's ceilings, where known."""
        chip = find_device(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return floor_of([Cost(bytes=self.bytes_moved)], chip).us * 1e-6 if chip is not None else None

    def providers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """provider -> upsampling. ``torch.compile`` on a GPU only: a CPU would need a C++ compiler and minutes."""
        options = {"scale_factor": self.shape.scale, "align_corners": self.align_corners}
        eager = lambda x: F.interpolate(x, mode="bilinear", **options)
        providers = {"fastseg": lambda x: upsample_bilinear(x, **options), "eager": eager}
        if self.device.type == "cuda":
            torch._functorch.config.donated_buffer = False  # a timed backward runs many times on one graph
            torch._dynamo.reset()
            providers["compile"] = torch.compile(eager, mode="max-autotune-no-cudagraphs", dynamic=False)
        return providers

    def function(self, upsample: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        """What is timed. A backward contains no forward: its forward runs here, once."""
        if self.mode == "forward":
            return lambda: upsample(self.x)
        y = upsample(self.x)
        return lambda: torch.autograd.grad(y, self.x, self.dy, retain_graph=True)

    def functions(self, names: tuple[str, ...] = PROVIDERS) -> dict[str, Callable[[], object]]:
        """provider -> what is timed, for those of ``names`` that run here."""
        return {name: self.function(provider) for name, provider in self.providers().items() if name in names}

    def exact(self) -> list[Tensor]:
        """Eager's result in fp32."""
        saved = self.x, self.dy
        self.x = self.x.detach().float().requires_grad_(self.mode == "backward")
        self.dy = self.dy.float()
        try:
            return harness.floats(self.function(self.providers()["eager"])())
        finally:
            self.x, self.dy = saved

    def disagreement(self, functions: dict[str, Callable[[], object]]) -> str:
        """Why the providers do not compute the same, or "". Called before anything is timed."""
        results = {name: harness.floats(function()) for name, function in functions.items()}
        return harness.disagreement(results, self.exact(), self.dtype)


def small(shape: HeadShape) -> HeadShape:
    """One image; what a CPU is given."""
    return replace(shape, N=1)


def tiny(shape: HeadShape) -> HeadShape:
    """For a smoke test: at most 8 channels and 5 x 4 pixels."""
    return replace(shape, C=min(shape.C, 8), H=5, W=4, N=1)


def problems(tiny_shapes: bool, device: torch.device) -> Iterator[Problem]:
    """Each shape both ways in channels_last; one in the other layout; the first alone in a rehearsal."""
    for mode in MODES:
        for shape in UPSAMPLING[:1] if tiny_shapes else (*UPSAMPLING, *COARSE):
            yield Problem(tiny(shape) if tiny_shapes else shape, mode, "channels_last", False, device)
    if not tiny_shapes:
        for mode in MODES:
            yield Problem(UPSAMPLING[1], mode, "contiguous", True, device)


def name_of(shape: HeadShape) -> str:
    return f"{shape.C}x{shape.H}x{shape.W}_x{shape.scale}_n{shape.N}"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", (*UPSAMPLING, *COARSE), ids=name_of)
def bench_upsample_bilinear(shape, layout, align_corners, mode, provider, run, device, size, benchmark):
    if provider == "compile" and device.type == "cpu":
        pytest.skip("torch.compile is measured on a GPU")
    if size == "tiny" and (align_corners or layout == "contiguous") and shape != UPSAMPLING[0]:
        pytest.skip("one shape shows that it runs")
    shape = {"full": lambda s: s, "small": small, "tiny": tiny}[size](shape)
    problem = Problem(shape, mode, layout, align_corners, device)
    benchmark.group = f"upsample_bilinear {problem.name} {mode}"
    with torch.set_grad_enabled(mode == "backward"):
        functions = problem.functions(("eager", provider))
        wrong = problem.disagreement(functions)
        assert not wrong, wrong
        run(
            functions[provider], bytes_moved=problem.bytes_moved, floor_s=problem.floor_s, graph=problem.graph,
            shape=name_of(shape), N=shape.N, dtype=str(problem.dtype), provider=provider, mode=mode, layout=layout,
            align_corners=align_corners,
        )  # fmt: skip
