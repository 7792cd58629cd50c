"""What a call costs the host: Python, dispatcher, argument checks, configuration lookup; launches are not made.

    OMP_NUM_THREADS=1 python benchmarks/host_cost.py

Tiny CPU tensors take the kernels' path up to the launch, which is intercepted; eager's modules run whole, which on 1 K
elements is host time as well. A graph, ``Runner``'s or the caller's, pays none of it.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: CPU tensors then take the kernels' path

import torch
from torch import nn
from torch.nn import functional as F

from fastseg import nn as fnn
from fastseg.inference.comparison import eager_form
from fastseg.inference.timing import interleaved, medians
from fastseg.kernels import config


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


def main() -> None:
    """Print a line for each module."""
    torch.set_num_threads(1)
    x = torch.randn(1, 16, 8, 8).to(memory_format=torch.channels_last)
    with config.intercept(lambda *launch: None), torch.no_grad():
        for name, (ours, eager) in pairs().items():
            functions = {"ours": lambda f=ours: f(x), "eager": lambda f=eager: f(x)}
            us = {key: 1e6 * t for key, t in medians(interleaved(functions, repetitions=400, warmup=20)).items()}
            print(f"{name:22} {us['ours']:7.1f} us, eager {us['eager']:7.1f} us: {us['ours'] / us['eager']:.2f}")


if __name__ == "__main__":
    main()
