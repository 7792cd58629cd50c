"""fastseg against eager PyTorch: the same layers and parameters, run as one op or as plain torch modules."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.measure.timing import interleaved, medians
from fastseg.nn.conv import SeparableConv2d
from fastseg.nn.loss import UpsampleCrossEntropyLoss
from fastseg.nn.upsampling import BilinearConvTranspose2d, UpsampleArgmax

# (C, OUT, H = W, dilation) in DeepLabV3+ on 512 x 512 pixels: Xception's entry flow, its middle flow, an ASPP branch.
SEPARABLE_SHAPES = ((128, 128, 128, 1), (728, 728, 32, 1), (256, 256, 32, 12))


@dataclass(frozen=True)
class Case:
    """One comparison: what is computed, on which shape, and the two functions that compute it."""

    name: str
    shape: str
    fastseg: Callable[[], Tensor]
    eager: Callable[[], Tensor]


@dataclass(frozen=True)
class Result:
    """Median latencies in seconds, and the largest difference of the two results over their largest value."""

    case: Case
    fastseg: float
    eager: float
    difference: float


def op_cases(device: torch.device, dtype: torch.dtype, side_divisor: int = 1) -> list[Case]:
    """Each op of the library, batch 1; ``side_divisor`` makes the maps smaller."""
    cases = []
    for channels, out_channels, side, dilation in SEPARABLE_SHAPES:
        side = max(1, side // side_divisor)
        module = SeparableConv2d(channels, out_channels, dilation=dilation, mid_norm=True, mid_act="relu")
        module = module.to(device, dtype, memory_format=torch.channels_last).eval()
        shape = f"{channels}->{out_channels}, {side}x{side}" + f", dilation {dilation}" * (dilation > 1)
        x = _image(channels, side, device, dtype)
        cases.append(module_case("separable_conv2d", shape, module, eager_form(module), x))
    side = 128 // side_divisor
    logits = _image(21, side, device, dtype)
    target = torch.zeros(1, 4 * side, 4 * side, dtype=torch.long, device=device)
    argmax, loss = UpsampleArgmax(scale_factor=4), UpsampleCrossEntropyLoss()
    resize = lambda: F.interpolate(logits, scale_factor=4, mode="bilinear")
    shape = f"21 classes, {side}x{side} -> {4 * side}x{4 * side}"
    cases.append(Case("upsample_argmax", shape, lambda: argmax(logits), lambda: resize().argmax(1)))
    cases.append(
        Case("upsample_cross_entropy", shape, lambda: loss(logits, target), lambda: F.cross_entropy(resize(), target))
    )
    return cases


def model_case(name: str, model: nn.Module, side: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Class map of one image of ``side`` pixels square: ``predict`` against ``forward`` and argmax in plain PyTorch."""
    model = copy.deepcopy(model).to(device, dtype, memory_format=torch.channels_last).eval()
    plain = eager_form(model)
    x = _image(3, side, device, dtype)
    return Case(name, f"3x{side}x{side}", lambda: model.predict(x), lambda: plain(x).argmax(1))


def module_case(name: str, shape: str, module: nn.Module, plain: nn.Module, x: Tensor) -> Case:
    """Compare ``module(x)`` with ``plain(x)``."""
    return Case(name, shape, lambda: module(x), lambda: plain(x))


def eager_form(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that calls its torch children one after the other: Conv2d, BatchNorm2d, activation.

    fastseg fuses children only if they are not watched, so a no-op hook on each convolution and norm is enough. A
    bilinear transposed convolution treats its weight as any other.
    """
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.register_forward_pre_hook(_watch)
        elif isinstance(module, BilinearConvTranspose2d):
            module._kind = _dense
        torchs = getattr(nn, type(module).__name__, None)
        if torchs is not None and type(module) is not torchs and isinstance(module, torchs):
            module.__class__ = torchs  # a drop-in: it has its parent's attributes
    return plain


def _watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    return None


def _dense() -> str:
    return "dense"


@torch.no_grad()
def compare(case: Case, seconds: float = 1.0) -> Result:
    """Compare the two results, then time them, interleaved, for about ``seconds``: 5 to 50 samples of each."""
    ours, theirs = case.fastseg(), case.eager()
    if ours.is_floating_point():
        scale = theirs.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        difference = ((ours - theirs).abs().max() / scale).item()
    else:
        difference = (ours != theirs).float().mean().item()  # class maps: the fraction of pixels that differ
    functions = {"fastseg": case.fastseg, "eager": case.eager}
    once = sum(medians(interleaved(functions, repetitions=2, warmup=1)).values())
    times = medians(interleaved(functions, repetitions=min(50, max(5, int(seconds / once))), warmup=1))
    return Result(case, times["fastseg"], times["eager"], difference)


def table(results: list[Result]) -> str:
    """A text table in milliseconds; ``ratio`` is eager / fastseg: above 1, fastseg is faster."""
    rows = [("", "", "fastseg ms", "eager ms", "ratio", "difference")]
    for r in results:
        ratio = r.eager / r.fastseg if r.fastseg > 0 else math.nan
        numbers = (f"{r.fastseg * 1e3:.3f}", f"{r.eager * 1e3:.3f}", f"{ratio:.2f}", f"{r.difference:.0e}")
        rows.append((r.case.name, r.case.shape, *numbers))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    align = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.rjust)
    return "\n".join("  ".join(f(cell, w) for f, cell, w in zip(align, row, widths, strict=True)) for row in rows)


def _image(channels: int, side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    x = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    return x.to(device, dtype, memory_format=torch.channels_last)
