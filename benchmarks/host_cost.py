"""What a call costs the host: Python, dispatcher, argument checks, configuration lookup; launches are not made.

    OMP_NUM_THREADS=1 python benchmarks/host_cost.py

Tiny CPU tensors take the kernels' path up to the launch, which is intercepted; eager's modules run whole, which on 1 K
elements is host time as well. A graph, ``Runner``'s or the caller's, pays none of it. Calls of Python functions are
counted beside: they do not depend on the machine, and ``tests/test_budgets.py`` holds them down.
"""

import os
import sys
from collections.abc import Callable

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: CPU tensors then take the kernels' path

import torch
from torch import nn
from torch.nn import functional as F

from fastseg import nn as fnn
from fastseg.kernels.runtime.launch import intercept
from fastseg.measure.comparison import eager_form
from fastseg.measure.timing import interleaved, medians


def pairs() -> dict[str, tuple]:
    """name -> ours, eager's."""
    modules = {
        "SeparableConv2d": fnn.SeparableConv2d(16, 16, mid_norm=True, mid_act="relu"),
        "ConvNormAct2d": fnn.ConvNormAct2d(16, 16, 3, padding=1),
        "ASPP": fnn.ASPP(16, 16),
    }
    out = {name: (module.eval(), eager_form(module.eval())) for name, module in modules.items()}
    out["BatchNormAct2d"] = fnn.BatchNormAct2d(16).eval(), nn.Sequential(nn.BatchNorm2d(16), nn.ReLU()).eval()
    out["MaxPool2d, indices"] = fnn.MaxPool2d(2, return_indices=True), nn.MaxPool2d(2, return_indices=True)
    out["UpsamplingBilinear2d"] = fnn.UpsamplingBilinear2d(scale_factor=2), nn.UpsamplingBilinear2d(scale_factor=2)
    upsample = lambda v: F.interpolate(v, scale_factor=4, mode="bilinear").argmax(1)
    out["UpsampleArgmax"] = fnn.UpsampleArgmax(scale_factor=4), upsample
    return out


def sample() -> torch.Tensor:
    """What each of them is called with."""
    return torch.randn(1, 16, 8, 8).to(memory_format=torch.channels_last)


def python_calls(f: Callable[[], object]) -> int:
    """Python functions that one call of ``f`` calls, itself included, after two that may remember things."""
    calls = 0

    def count(frame, event, argument) -> None:
        nonlocal calls
        calls += event == "call"

    f(), f()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        f()
    finally:
        sys.setprofile(before)
    return calls


def main() -> None:
    """Print a line for each module."""
    torch.set_num_threads(1)
    x = sample()
    with intercept(lambda *launch: None), torch.no_grad():
        for name, (ours, eager) in pairs().items():
            functions = {"ours": lambda f=ours: f(x), "eager": lambda f=eager: f(x)}
            us = {key: 1e6 * t for key, t in medians(interleaved(functions, repetitions=400, warmup=20)).items()}
            ratio, calls = us["ours"] / us["eager"], [python_calls(f) for f in functions.values()]
            print(
                f"{name:22} {us['ours']:6.1f} us, eager {us['eager']:6.1f}: {ratio:.2f}; "
                f"{calls[0]:3} calls in Python, eager {calls[1]:3}"
            )


if __name__ == "__main__":
    main()
