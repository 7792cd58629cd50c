"""Whole models, inference: latency of a call, throughput, peak memory, and kernels per forward.

Traffic has no formula short enough for this header; ``model_walk.py`` walks the layers. Providers are one model with
the same weights: "fastseg" as it is, "eager" its ``eager_form``, whose Conv2d, BatchNorm2d and activations run one by
one, "compile" that compiled. ``gpu.py`` times each by call + synchronise, as a user would see it, and again as a CUDA
graph, where nothing of the host is left.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import harness
import pytest
import torch
from torch import Tensor
from workloads import MODELS, MODELS_WITHOUT_FLOOR, ModelShape

from fastseg.inference.comparison import eager_form
from fastseg.models import create

# model of `workloads` -> arguments of `create`; the others have floors already and no network yet.
CREATED = {
    "deeplabv3plus_mobilenet_v2": ("deeplabv3plus", {"backbone": "mobilenet_v2"}),
    "segnet": ("segnet", {}),
    "segnet_basic": ("segnet_basic", {}),
    "fcn8s": ("fcn", {"backbone": "vgg16", "stride": 8}),
}
SHAPES = (*(shape for shape in MODELS if shape.model in CREATED), *MODELS_WITHOUT_FLOOR)


def label(shape: ModelShape) -> str:
    """``deeplabv3plus_mobilenet_v2 16x512x512 21c``."""
    return f"{shape.model} {shape.N}x{shape.H}x{shape.W} {shape.classes}c"


class Problem:
    """One model on one device, in eval mode, with an input; random weights."""

    def __init__(self, shape: ModelShape, device: torch.device):
        self.shape, self.device, self.dtype = shape, device, harness.dtype_for(device)
        name, options = CREATED[shape.model]
        torch.manual_seed(0)
        self.model = create(name, shape.classes, **options).eval().to(device, memory_format=torch.channels_last)
        self.plain = eager_form(self.model)
        x = torch.randn(shape.N, 3, shape.H, shape.W, generator=torch.Generator().manual_seed(0))
        self.x = x.to(device, self.dtype).contiguous(memory_format=torch.channels_last)

    @contextmanager
    def context(self) -> Iterator[None]:
        """No gradients; autocast on a GPU, entered outside the timed call."""
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            yield

    def functions(self) -> dict[str, Callable[[], Tensor]]:
        """provider -> one forward."""
        functions = {"fastseg": lambda: self.model(self.x), "eager": lambda: self.plain(self.x)}
        if self.device.type == "cuda":
            torch._dynamo.reset()  # else all shapes share one cache, and past its limit run uncompiled
            compiled = torch.compile(self.plain, mode="max-autotune-no-cudagraphs", dynamic=False)
            functions["compile"] = lambda: compiled(self.x)
        return functions

    def exact(self) -> Tensor:
        """The plain form's logits in fp32, without tf32."""
        saved = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            with torch.autocast(self.device.type, enabled=False), torch.no_grad():
                return self.plain(self.x.float())
        finally:
            torch.backends.cudnn.allow_tf32 = saved

    def disagreement(self, functions: dict[str, Callable[[], Tensor]]) -> str:
        """Why the providers do not compute the same, or "". Called before anything is timed."""
        return harness.disagreement(
            {name: harness.floats(function()) for name, function in functions.items()}, [self.exact()], self.dtype
        )


@pytest.mark.parametrize("provider", ["fastseg", "eager", "compile"])
@pytest.mark.parametrize("shape", SHAPES, ids=label)
def bench_model(shape, provider, run, device, size, benchmark):
    if provider == "compile" and device.type == "cpu":
        pytest.skip("torch.compile is measured on a GPU")
    if size != "full" and shape != SHAPES[0]:
        pytest.skip("one shape on a CPU; the rest on a GPU, or with --full")
    pixels = {"full": (shape.H, shape.W), "small": (256, 256), "tiny": (64, 64)}[size]
    shape = replace(shape, H=pixels[0], W=pixels[1])
    benchmark.group = f"model {label(shape)}"
    problem = Problem(shape, device)
    with problem.context():
        functions = problem.functions()
        chosen = {name: functions[name] for name in dict.fromkeys(["eager", provider])}
        wrong = problem.disagreement(chosen)
        assert not wrong, wrong
        forward = functions[provider]
        run(
            forward, shape=label(shape), N=shape.N, dtype=str(problem.dtype), provider=provider,
            launches=harness.launch_count(forward), kernels=harness.kernel_count(forward, device),
        )  # fmt: skip
