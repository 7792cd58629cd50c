"""Pooling and unpooling at SegNet's five stages, against torch's in both layouts and compiled.

    pool            values and indices of 2x2 windows              least traffic  hi + lo + index
    pool-backward   the gradient at the pooled map                 least traffic  hi + lo + index
    unpool          values back to their cells, zeros elsewhere    least traffic  hi + lo + index
    unpool-backward                                                least traffic  hi + lo + index
    stage           maxpool(relu(bn(z))) in evaluation             least traffic  hi + lo + index
    stage-train     the same with batch statistics                 least traffic  2 hi + lo + index
    stage-backward  its gradients                                  least traffic  2 hi + 2 lo + index, and z read twice

hi cells and lo windows of 16 bits (32 on a CPU); index is a quarter byte a window. "Least" means each tensor once and 2
bits a window: GB/s is that traffic over the time, so that providers are comparable whatever they keep.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import harness
import pytest
import torch
from floors import Cost, find_device, floor_of
from torch import Tensor
from torch.nn import functional as F
from workloads import SEGNET_STAGES, PoolShape

from fastseg.ops import BatchNormArgs, batch_norm_act_max_pool2d, max_pool2d, max_unpool2d

MODES = ("pool", "pool-backward", "unpool", "unpool-backward", "stage", "stage-train", "stage-backward")
PROVIDERS = ("fastseg", "fastseg int64", "eager", "eager NCHW", "compile")
WINDOW = {"kernel_size": 2, "stride": 2, "ceil_mode": True}


class Problem:
    """One stage on one device, and what each provider calls.

    Args:
        shape: of ``workloads``.
        mode: of ``MODES``.
        device: where.
    """

    def __init__(self, shape: PoolShape, mode: str, device: torch.device):
        self.shape, self.mode, self.device, self.dtype = shape, mode, device, harness.dtype_for(device)
        generator = torch.Generator().manual_seed(0)
        draw = lambda *size: torch.randn(size, generator=generator).to(device, self.dtype)
        self.z = draw(shape.N, shape.C, shape.H, shape.W).contiguous(memory_format=torch.channels_last)
        self.size = (shape.H, shape.W)
        self.dy = {
            "lo": draw(shape.N, shape.C, -(-shape.H // 2), -(-shape.W // 2)),
            "hi": draw(shape.N, shape.C, shape.H, shape.W),
        }
        vector = lambda low: (torch.rand(shape.C, generator=generator) + low).to(device)
        self.norm = BatchNormArgs(vector(-0.5), vector(0.5), vector(0.5), vector(-0.5), mode != "stage")
        self.graph = not mode.endswith("backward")

    @property
    def name(self) -> str:
        """``64x360x480 n16``."""
        s = self.shape
        return f"{s.C}x{s.H}x{s.W} n{s.N}"

    @property
    def bytes_moved(self) -> float:
        """The least traffic of this file's header."""
        hi, lo = self.z.nbytes, self.dy["lo"].nbytes
        index = self.dy["lo"].numel() / 4
        passes = {"stage-train": (2, 1), "stage-backward": (3, 2)}.get(self.mode, (1, 1))
        return passes[0] * hi + passes[1] * lo + index

    @property
    def floor_s(self) -> float | None:
        """Seconds at the device's ceilings, where known."""
        chip = find_device(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return floor_of([Cost(bytes=self.bytes_moved)], chip).us * 1e-6 if chip is not None else None

    def providers(self) -> dict[str, Callable[[Tensor], tuple[Tensor, Callable[[], object]]]]:
        """provider -> what runs on a map, in its layout. ``torch.compile`` on a GPU only: a CPU would need minutes."""
        eager = partial(self._run, F.max_pool2d, F.max_unpool2d, self._torch_stage)
        stage = partial(self._fused_stage, index_format="compact")
        providers = {
            "fastseg": partial(self._run, partial(max_pool2d, index_format="compact"), max_unpool2d, stage),
            "fastseg int64": partial(
                self._run, max_pool2d, max_unpool2d, partial(self._fused_stage, index_format="int64")
            ),
            "eager": eager,
            "eager NCHW": eager,
        }
        if self.device.type == "cuda":
            torch._functorch.config.donated_buffer = False  # a timed backward runs many times on one graph
            torch._dynamo.reset()
            compiled = partial(torch.compile, mode="max-autotune-no-cudagraphs", dynamic=False)
            functions = (compiled(f) for f in (F.max_pool2d, F.max_unpool2d, self._torch_stage))
            providers["compile"] = partial(self._run, *functions)
        return providers

    def _torch_stage(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, var, *affine, training, momentum, eps = self.norm
        y = F.batch_norm(z, mean.clone(), var.clone(), *affine, training, momentum, eps)
        return F.max_pool2d(F.relu_(y), **WINDOW, return_indices=True)

    def _fused_stage(self, z: Tensor, index_format: str):
        norm = self.norm._replace(
            running_mean=self.norm.running_mean.clone(), running_var=self.norm.running_var.clone()
        )
        return batch_norm_act_max_pool2d(z, norm, "relu", **WINDOW, return_indices=True, index_format=index_format)

    def _run(self, pool: Callable, unpool: Callable, stage: Callable, layout: torch.memory_format):
        """What is timed, prepared: a backward contains no forward, an unpooling no pooling."""
        z = self.z.detach().contiguous(memory_format=layout).requires_grad_(self.mode.endswith("backward"))
        dy = {name: t.contiguous(memory_format=layout) for name, t in self.dy.items()}
        if self.mode.startswith("stage"):
            if self.mode != "stage-backward":
                return lambda: stage(z)[0]
            y = stage(z)[0]
            return lambda: torch.autograd.grad(y, z, dy["lo"], retain_graph=True)
        run = lambda: pool(z, **WINDOW, return_indices=True)
        if self.mode == "pool":
            return lambda: run()[0]
        values, indices = run()
        if self.mode == "pool-backward":
            return lambda: torch.autograd.grad(values, z, dy["lo"], retain_graph=True)
        v = values.detach().requires_grad_(self.mode.endswith("backward"))
        up = lambda: unpool(v, indices, 2, 2, output_size=self.size)
        if self.mode == "unpool":
            return up
        y = up()
        return lambda: torch.autograd.grad(y, v, dy["hi"], retain_graph=True)

    def functions(self, names: tuple[str, ...] = PROVIDERS) -> dict[str, Callable[[], object]]:
        """provider -> what is timed, for those of ``names`` that run here."""
        layout = lambda name: torch.contiguous_format if name.endswith("NCHW") else torch.channels_last
        return {name: run(layout(name)) for name, run in self.providers().items() if name in names}

    def disagreement(self, functions: dict[str, Callable[[], object]]) -> str:
        """Why the providers do not compute the same, or "". Called before anything is timed."""
        results = {name: harness.floats(function()) for name, function in functions.items()}
        saved = self.z, self.dy
        self.z, self.dy = self.z.float(), {name: t.float() for name, t in self.dy.items()}
        try:
            exact = harness.floats(self.functions(("eager",))["eager"]())
        finally:
            self.z, self.dy = saved
        return harness.disagreement(results, exact, self.dtype)


def problems(tiny: bool, device: torch.device) -> Iterator[Problem]:
    """Every stage and mode, the largest and most used first; few and small ones in a rehearsal."""
    for shape in SEGNET_STAGES[:1] if tiny else SEGNET_STAGES:
        for mode in MODES:
            yield Problem(cut(shape, "tiny") if tiny else shape, mode, device)


def cut(shape: PoolShape, size: str) -> PoolShape:
    """One image for a CPU; at most 16 channels and 12 x 12 pixels in a smoke test."""
    if size == "tiny":
        return replace(shape, C=min(shape.C, 16), H=min(shape.H, 12), W=min(shape.W, 12), N=1)
    return shape


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SEGNET_STAGES, ids=lambda s: f"{s.C}x{s.H}x{s.W}-n{s.N}")
def bench_pooling(shape, mode, provider, run, device, size, benchmark):
    if provider == "compile" and device.type == "cpu":
        pytest.skip("torch.compile is measured on a GPU")
    if size != "full" and shape.N > 1:
        pytest.skip("one image on a CPU; more on a GPU, or with --full")
    problem = Problem(cut(shape, size), mode, device)
    benchmark.group = f"pooling {problem.name} {mode}"
    functions = problem.functions(tuple(dict.fromkeys(["eager", provider])))
    wrong = problem.disagreement(functions)
    assert not wrong, wrong
    run(
        functions[provider], bytes_moved=problem.bytes_moved, floor_s=problem.floor_s, graph=problem.graph,
        shape=problem.name, N=shape.N, dtype=str(problem.dtype), provider=provider, mode=mode,
    )  # fmt: skip
