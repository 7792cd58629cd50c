"""What a call costs the host: Python, dispatcher, argument checks, configuration lookup; launches are not made.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.host_cost

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
from fastseg.kernels.runtime.launch import intercept, launch
from fastseg.measure.timing import interleaved, medians
from fastseg.nn.fuse.children import batch_norm_args
from fastseg.nn.fuse.conv_norm_act import fold_all, foldable, source_of
from fastseg.ops.conv_act import conv2d_act
from fastseg.ops.core.autograd import run
from fastseg.ops.core.dispatch import runs_kernel
from fastseg.ops.core.torch_private import is_bare
from fastseg.ops.max_pool import pool_geometry
from fastseg.ops.registered.batch_norm_act import FORMS as NORM_FORMS
from fastseg.ops.registered.batch_norm_act import fwd_op as norm_op
from fastseg.ops.registered.pooling import INT64, POOL_FORMS, pool_op
from fastseg.ops.upsample_bilinear import FORMS, fwd_op, target_of


class EagerASPP(nn.Module):
    """As one writes it in PyTorch."""

    def __init__(self, C: int, rates: tuple[int, ...] = (6, 12, 18)):
        super().__init__()
        self.convs = nn.ModuleList([conv_norm_relu(C, C, 1), *(conv_norm_relu(C, C, 3, rate) for rate in rates)])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_norm_relu(C, C, 1))
        self.project = nn.Sequential(*conv_norm_relu(C * (len(rates) + 2), C, 1), nn.Dropout(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.interpolate(self.pool(x), x.shape[2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*(conv(x) for conv in self.convs), pooled], 1))


def conv_norm_relu(C: int, COUT: int, K: int, rate: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(C, COUT, K, padding=rate * (K // 2), dilation=rate, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(COUT), nn.ReLU())


def pairs() -> dict[str, tuple]:
    """name -> ours, and what eager PyTorch has for it: modules of ``torch.nn``, unpatched."""
    separable = nn.Sequential(*conv_norm_relu(16, 16, 3, groups=16), *conv_norm_relu(16, 16, 1))
    out = {
        "SeparableConv2d": (fnn.SeparableConv2d(16, 16, mid_norm=True, mid_act="relu").eval(), separable.eval()),
        "ConvNormAct2d": (fnn.ConvNormAct2d(16, 16, 3, padding=1).eval(), conv_norm_relu(16, 16, 3).eval()),
        "ASPP": (fnn.ASPP(16, 16).eval(), EagerASPP(16).eval()),
    }
    out["BatchNormAct2d"] = fnn.BatchNormAct2d(16).eval(), nn.Sequential(nn.BatchNorm2d(16), nn.ReLU()).eval()
    out["MaxPool2d, indices"] = fnn.MaxPool2d(2, return_indices=True), nn.MaxPool2d(2, return_indices=True)
    out["UpsamplingBilinear2d"] = fnn.UpsamplingBilinear2d(scale_factor=2), nn.UpsamplingBilinear2d(scale_factor=2)
    upsample = lambda v: F.interpolate(v, scale_factor=4, mode="bilinear").argmax(1)
    out["UpsampleArgmax"] = fnn.UpsampleArgmax(scale_factor=4), upsample
    return out


def sample() -> torch.Tensor:
    """What each of them is called with."""
    return torch.randn(1, 16, 8, 8).to(memory_format=torch.channels_last)


def python_calls(f: Callable[[], object], named: str = "") -> int:
    """Python functions that one call of ``f`` calls, itself included, after two that may remember things.

    ``named``: those of this name alone.
    """
    calls = 0

    def count(frame, event, argument) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_name.endswith(named)

    f(), f()
    counts = []
    for _ in range(3):  # the least: what is collected meanwhile may call functions of its own
        calls, before = 0, sys.getprofile()
        sys.setprofile(count)
        try:
            f()
        finally:
            sys.setprofile(before)
        counts.append(calls)
    return min(counts)


def parts() -> dict[str, dict[str, Callable]]:
    """What four modules do on their way, each part by itself: name -> part -> a call."""
    x, size, identity = sample(), (16, 16), nn.Identity()
    sizes = (2, 2, 0, 1, False, 2)
    geometry = pool_geometry(x.shape, *sizes)
    assert geometry is not None
    y = torch.empty(1, 16, 4, 4).to(memory_format=torch.channels_last)
    norm, block = fnn.BatchNormAct2d(16).eval(), fnn.ConvNormAct2d(16, 16, 3, padding=1).eval()
    conv = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
    own = next(m for m in block.modules() if isinstance(m, nn.BatchNorm2d))
    source = source_of(conv, own)
    args = batch_norm_args(norm)
    (folded,) = fold_all(x, (source,))
    options = ("relu", conv.stride, conv.padding, conv.dilation, conv.groups)
    last = {"memory_format": torch.channels_last}
    guard = lambda *tensors: launch(None, (1,), *tensors)
    return {
        "BatchNormAct2d": {
            "call of a module": lambda: identity(x),
            "tensors of the norm": lambda: batch_norm_args(norm),
            "decision": lambda: runs_kernel(NORM_FORMS, x, (x.shape, x.dtype, None, False), *args[:4]),
            "what is bare": lambda: is_bare((x, *args[:4])),
            "launcher": lambda: norm_op.direct["cpu"](x, *args[:4], None, False, args.eps, "relu"),
            "  of it launch guard": lambda: guard(x, x, x, x, x, x, x),
        },
        "ConvNormAct2d": {
            "call of a module": lambda: identity(x),
            "may be folded": lambda: foldable(x, (source_of(conv, own),)),
            "fold": lambda: fold_all(x, (source,)),
            "decision and torch's convolution": lambda: conv2d_act(x, *folded, *options),
            "  of it torch's convolution": lambda: F.relu_(F.conv2d(x, *folded, padding=1)),
        },
        "MaxPool2d, indices": {
            "call of a module": lambda: identity(x),
            "checks and sizes": lambda: pool_geometry(x.shape, *sizes),
            "decision": lambda: runs_kernel(POOL_FORMS, x, (geometry, x.shape)),
            "who follows, what is bare": lambda: (run(None, bare, x), is_bare((x, *geometry, INT64))),
            "launcher": lambda: pool_op.direct["cpu"](x, *geometry, INT64),
            "  of it outputs": lambda: (torch.empty(y.shape, **last), torch.empty(y.shape, dtype=torch.int64, **last)),
            "  of it launch guard": lambda: guard(x, y, y),
        },
        "UpsamplingBilinear2d": {
            "call of a module": lambda: identity(x),
            "checks and sizes": lambda: target_of(x.shape, size, None, None),
            "decision": lambda: runs_kernel(FORMS, x, (x.shape[1], x.shape[2:], size)),
            "who follows, what is bare": lambda: (run(None, bare, x), is_bare((x, size, True, None, None))),
            "launcher": lambda: fwd_op.direct["cpu"](x, size, True, None, None),
            "  of it outputs": lambda: torch.empty((1, 16, 16, 16), **last),
            "  of it launch guard": lambda: guard(x, y),
        },
    }


def bare(x: torch.Tensor) -> None:
    """An op that does nothing."""


def main() -> None:
    """Print a line for each module, and what four of them spend it on."""
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
        for name, found in parts().items():
            times = medians(interleaved(found, repetitions=400, warmup=20))
            print(name, *(f"{part} {1e6 * t:.1f}" for part, t in times.items()), sep=", ")


if __name__ == "__main__":
    main()
