"""Separable convolution against plain modules and ``torch.compile``.

    eval              y = relu(bn(pw(relu(bn(dw(x))))))      least traffic  A + Y + W
    train-forward     the same with batch statistics         least traffic  A + 2Y + W    (z is kept for the backward)
    train-backward    dx and every parameter's gradient      least traffic  2A + 2Y + 2W  (x, z, dy read; dx written)

in elements: A = N C H W, Y = N COUT OH OW, W = C K^2 + C COUT. "Least" means each tensor once: GB/s is that traffic
over the time, so that providers are comparable, and a kernel that reads something twice shows a lower figure.
``floors.py`` has the traffic of a whole training step.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import harness
import pytest
import torch
from floors import find_device, floor_us
from torch import Tensor, nn
from workloads import SEPARABLE, SeparableShape, tiny

from fastseg.nn import SeparableConv2d

MODES = ("eval", "train-forward", "train-backward")


class Problem:
    """One shape on one device: input, modules with the same parameters, and what each provider calls.

    Args:
        shape: of ``workloads``.
        mode: of ``MODES``.
        device: where.
    """

    def __init__(self, shape: SeparableShape, mode: str, device: torch.device):
        self.shape, self.mode, self.device, self.dtype = shape, mode, device, harness.dtype_for(device)
        generator = torch.Generator().manual_seed(0)
        self.fused = SeparableConv2d(
            shape.C, shape.COUT, shape.kernel_size, stride=shape.stride, dilation=shape.dilation,
            mid_norm=True, mid_act="relu", post_norm=True, post_act="relu",
        )  # fmt: skip
        with torch.no_grad():
            for norm in (self.fused.mid_norm, self.fused.post_norm):  # statistics of a trained net, not 0 and 1
                norm.running_mean.copy_(0.1 * torch.randn(norm.num_features, generator=generator))
                norm.running_var.copy_(0.5 + torch.rand(norm.num_features, generator=generator))
        self.fused = self.fused.to(device, memory_format=torch.channels_last).train(mode != "eval")
        f = copy.deepcopy(self.fused)
        self.plain = nn.Sequential(f.depthwise, f.mid_norm, nn.ReLU(), f.pointwise, f.post_norm, nn.ReLU())
        self.plain.train(mode != "eval")
        x = torch.randn(shape.N, shape.C, shape.H, shape.W, generator=generator).to(device, self.dtype)
        self.x = x.contiguous(memory_format=torch.channels_last).requires_grad_(mode != "eval")

    @property
    def bytes_moved(self) -> float:
        """The least traffic of this file's header."""
        A, Y = self.shape.inputs, self.shape.outputs
        W = self.shape.C * (self.shape.kernel_size**2 + self.shape.COUT)
        elements = {"eval": A + Y + W, "train-forward": A + 2 * Y + W, "train-backward": 2 * A + 2 * Y + 2 * W}
        return elements[self.mode] * self.dtype.itemsize

    @property
    def floor_s(self) -> float | None:
        """Seconds at the device's ceilings, where known. Training has a floor for the step, not for its halves."""
        chip = find_device(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return floor_us(self.shape, chip).us * 1e-6 if chip is not None and self.mode == "eval" else None

    @contextmanager
    def context(self) -> Iterator[None]:
        """Autocast on a GPU, entered outside the timed call: it then casts each weight once, as inside a model."""
        cuda = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda), torch.set_grad_enabled(self.mode != "eval"):
            yield

    def networks(self) -> dict[str, nn.Module]:
        """provider -> module. ``torch.compile`` on a GPU only: a CPU would need a C++ compiler and minutes."""
        networks = {"fastseg": self.fused, "eager": self.plain}
        if self.device.type == "cuda":
            torch._functorch.config.donated_buffer = False  # a timed backward runs many times on one graph
            torch._dynamo.reset()  # else all shapes share one cache, and past its limit run uncompiled
            networks["compile"] = torch.compile(self.plain, mode="max-autotune-no-cudagraphs", dynamic=False)
        return networks

    def function(self, network: nn.Module) -> Callable[[], object]:
        """What is timed. A backward contains no forward: its forward runs here, once."""
        if self.mode != "train-backward":
            return partial(network, self.x)
        y = network(self.x)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(self.dtype).to(y)
        dy = dy.contiguous(memory_format=torch.channels_last)
        wanted = [self.x, *network.parameters()]
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)

    def exact(self) -> list[Tensor]:
        """The plain modules' result in fp32, without tf32."""
        saved = self.x, torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        self.x = self.x.detach().float().requires_grad_(self.mode != "eval")
        try:
            with torch.autocast(self.device.type, enabled=False), torch.set_grad_enabled(self.mode != "eval"):
                return harness.floats(self.function(self.plain)())
        finally:
            self.x, torch.backends.cudnn.allow_tf32 = saved

    def disagreement(self, functions: dict[str, Callable[[], object]]) -> str:
        """Why the providers do not compute the same, or "". Called before anything is timed."""
        results = {name: harness.floats(function()) for name, function in functions.items()}
        return harness.disagreement(results, self.exact(), self.dtype)


@contextmanager
def forced(form: str) -> Iterator[None]:
    """Inside the block the op's kernels take ``form`` ("fused" or "split"), whatever the cost model says."""
    from fastseg.kernels import separable_conv
    from fastseg.kernels.separable_conv_plan import Plan

    nan = float("nan")
    with mock.patch.object(separable_conv, "plan", lambda *sizes, **options: Plan(form, nan, nan)):
        yield


def small(shape: SeparableShape) -> SeparableShape:
    """One image; what a CPU is given."""
    return replace(shape, N=1)


def macs(shape: SeparableShape) -> int:
    """Multiply-adds of one forward."""
    return shape.hidden * (shape.kernel_size**2 + shape.COUT)


@pytest.mark.parametrize("provider", ["fastseg", "eager", "compile"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SEPARABLE, ids=lambda shape: shape.name)
def bench_separable_conv(shape, mode, provider, run, device, size, benchmark):
    if provider == "compile" and device.type == "cpu":
        pytest.skip("torch.compile is measured on a GPU")
    shape = {"full": lambda s: s, "small": small, "tiny": tiny}[size](shape)
    if size == "small" and macs(shape) > 1e9:
        pytest.skip(f"{macs(shape):.1e} multiply-adds: on a GPU, or with --full")
    benchmark.group = f"separable_conv {shape.name} {mode}"
    problem = Problem(shape, mode, device)
    networks = problem.networks()
    with problem.context():
        functions = {name: problem.function(networks[name]) for name in dict.fromkeys(["eager", provider])}
        wrong = problem.disagreement(functions)
        assert not wrong, wrong
        run(
            functions[provider], bytes_moved=problem.bytes_moved, floor_s=problem.floor_s,
            graph=mode != "train-backward", shape=shape.name, N=shape.N, dtype=str(problem.dtype), provider=provider,
            mode=mode,
        )  # fmt: skip
