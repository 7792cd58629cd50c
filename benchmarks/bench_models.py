"""Whole models: latency of a call, throughput, peak memory, kernels; and what a training step keeps for its backward.

Traffic has no formula short enough for this header; ``model_walk.py`` walks the layers. Providers are one model with
the same weights: "fastseg" as it is, "eager" its ``eager_form``, whose Conv2d, BatchNorm2d and activations run one by
one, "compile" that compiled. ``gpu.py`` times each by call + synchronise, as a user would see it, and again as a CUDA
graph, where nothing of the host is left. A training step is ``loss`` and its backward, without an optimizer, called.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.workloads import MODELS, MODELS_TRAINING, MODELS_WITHOUT_FLOOR, ModelShape
from fastseg.measure.comparison import eager_form
from fastseg.models import create

# model of `workloads` -> arguments of `create`; the others have floors already and no network yet.
CREATED = {
    "deeplabv3plus_mobilenet_v2": ("deeplabv3plus", {"backbone": "mobilenet_v2"}),
    "deeplabv3plus_xception65": (
        "deeplabv3plus",
        {"backbone": "xception", "preset": "google"},
    ),  # separable, as its floor
    "deeplabv3plus_xception65_dense": ("deeplabv3plus", {"backbone": "xception"}),
    "deeplabv3_resnet50": ("deeplabv3", {"backbone": "resnet50"}),
    "deeplabv2_resnet101": ("deeplabv2", {"backbone": "resnet101", "scales": ()}),
    "segnet": ("segnet", {}),
    "segnet_basic": ("segnet_basic", {}),
    "fcn8s": ("fcn", {"backbone": "vgg16", "stride": 8}),
    "unet": ("unet", {"padding": "same", "norm": True}),
    "unetplusplus": ("unetplusplus", {"norm": True, "up": "bilinear"}),
}
SHAPES = (*(shape for shape in MODELS if shape.model in CREATED), *MODELS_WITHOUT_FLOOR)
TRAINING = (
    *(shape for shape in MODELS_TRAINING if shape.model in CREATED),
    *(shape for shape in MODELS_WITHOUT_FLOOR if shape.N == 16 and shape.model == "unetplusplus"),
    *(ModelShape(model) for model in ("unet", "unetplusplus")),
)
MODES = {"eval": SHAPES, "train": TRAINING}


def label(shape: ModelShape) -> str:
    """``deeplabv3plus_mobilenet_v2 16x512x512 21c``."""
    return f"{shape.model} {shape.N}x{shape.H}x{shape.W} {shape.classes}c"


class Problem:
    """One model on one device, in one mode, with an input; random weights."""

    def __init__(self, shape: ModelShape, device: torch.device, mode: str = "eval", dtype: torch.dtype | None = None):
        """``dtype``: float64, where one rounding that moves a ReLU would show; None: what the device is timed in."""
        self.shape, self.device, self.mode, self.dtype = shape, device, mode, dtype or harness.dtype_for(device)
        name, options = CREATED[shape.model]
        torch.manual_seed(0)
        self.model = create(name, shape.classes, **options).train(mode == "train")
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # it would draw another mask for each provider
        weights = torch.float64 if dtype == torch.float64 else torch.float32  # autocast casts them
        self.model = self.model.to(device, weights, memory_format=torch.channels_last)
        self.plain = eager_form(self.model)
        generator = torch.Generator(device).manual_seed(0)
        x = torch.empty(
            (shape.N, 3, shape.H, shape.W), device=device, dtype=self.dtype, memory_format=torch.channels_last
        )
        self.x = x.normal_(generator=generator)
        self.target = torch.randint(shape.classes, (shape.N, shape.H, shape.W), device=device, generator=generator)

    @contextmanager
    def context(self) -> Iterator[None]:
        """Gradients in training only; autocast on a GPU, entered outside the timed call."""
        autocast = torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda")
        with torch.set_grad_enabled(self.mode == "train"), autocast:
            yield

    def functions(self) -> dict[str, Callable[[], object]]:
        """provider -> one forward, or one training step: its loss, and the gradients of the outermost weights."""
        training = self.mode == "train"
        calls = {"fastseg": self.model.loss, "eager": self._loss} if training else self._forwards()
        if self.device.type == "cuda":
            torch._dynamo.reset()  # else all shapes share one cache, and past its limit run uncompiled
            calls["compile"] = torch.compile(calls["eager"], mode="max-autotune-no-cudagraphs", dynamic=False)
        if not training:
            return {name: partial(call, self.x) for name, call in calls.items()}
        models = {name: self.model if name == "fastseg" else self.plain for name in calls}
        return {name: partial(self._step, models[name], call, self.x) for name, call in calls.items()}

    def kept_bytes(self, provider: str) -> int | None:
        """Bytes that a training step of "fastseg" or "eager" keeps for its backward; None in eval."""
        if self.mode == "eval" or provider == "compile":
            return None
        loss = self.model.loss if provider == "fastseg" else self._loss
        return harness.kept_bytes(partial(loss, self.x, self.target))

    def exact(self) -> list[Tensor]:
        """The plain form's result in fp32, without tf32."""
        saved = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            with torch.autocast(self.device.type, enabled=False):
                x = self.x if self.dtype == torch.float64 else self.x.float()
                if self.mode == "train":
                    return harness.floats(self._step(self.plain, self._loss, x))
                with torch.no_grad():
                    return [self.plain(x)]
        finally:
            torch.backends.cudnn.allow_tf32 = saved

    def disagreement(self, functions: dict[str, Callable[[], object]]) -> str:
        """Why the providers do not compute the same, or "". Called before anything is timed."""
        return harness.disagreement(
            {name: harness.floats(function()) for name, function in functions.items()}, self.exact(), self.dtype
        )

    def _forwards(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"fastseg": self.model, "eager": self.plain}

    def _loss(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.plain(x), target)

    def _step(self, model: torch.nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> list[Tensor]:
        learnt = [p for p in model.parameters() if p.requires_grad]
        with torch.enable_grad():
            value = loss(x, self.target)
            gradients = torch.autograd.grad(value, learnt)
        outermost = [g for g in gradients if g.dim() == 4]
        return [value.detach(), outermost[0], outermost[-1]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("provider", ["fastseg", "eager", "compile"])
@pytest.mark.parametrize("shape", dict.fromkeys((*SHAPES, *TRAINING)), ids=label)
def bench_model(shape, provider, mode, run, device, size, benchmark):
    if shape not in MODES[mode]:
        pytest.skip(f"not among the shapes of {mode}")
    if provider == "compile" and device.type == "cpu":
        pytest.skip("torch.compile is measured on a GPU")
    if size != "full" and shape != MODES[mode][0]:
        pytest.skip("one shape on a CPU; the rest on a GPU, or with --full")
    pixels = {"full": (shape.H, shape.W), "small": (256, 256), "tiny": (64, 64)}[size]
    shape = replace(shape, H=pixels[0], W=pixels[1], N=shape.N if size == "full" else min(shape.N, 2))
    benchmark.group = f"model {label(shape)} {mode}"
    problem = Problem(shape, device, mode, torch.float64 if size == "tiny" and device.type == "cpu" else None)
    with problem.context():
        functions = problem.functions()
        chosen = {name: functions[name] for name in dict.fromkeys(["eager", provider])}
        wrong = problem.disagreement(chosen)
        assert not wrong, wrong
        forward = functions[provider]
        run(
            forward, shape=label(shape), N=shape.N, mode=mode, dtype=str(problem.dtype), provider=provider,
            graph=mode == "eval", kept_bytes=problem.kept_bytes(provider),
            launches=harness.launch_count(forward), kernels=harness.kernel_count(forward, device),
        )  # fmt: skip
