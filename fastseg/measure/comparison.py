"""fastseg against eager PyTorch: the same layers and parameters, run as one op or as plain torch modules."""

import copy
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.inference.runner import Runner
from fastseg.measure.timing import interleaved, medians
from fastseg.nn.conv import SeparableConv2d
from fastseg.nn.loss import UpsampleCrossEntropyLoss
from fastseg.nn.upsampling import UpsampleArgmax
from fastseg.ops.core.explain import explain, unfused

# (C, OUT, H = W, dilation) in DeepLabV3+ on 512 x 512 pixels: Xception's entry flow, its middle flow, an ASPP branch.
SEPARABLE_SHAPES = ((128, 128, 128, 1), (728, 728, 32, 1), (256, 256, 32, 12))


@dataclass(frozen=True)
class Case:
    """One comparison: what is computed, on what shape, and the functions that compute it."""

    name: str
    shape: str
    fastseg: Callable[[], Tensor]
    eager: Callable[[], Tensor]
    runner: Callable[[], Tensor] | None = None  # of a model: the same through a ``Runner``


@dataclass(frozen=True)
class Result:
    """Median latencies in seconds, and how far the results lie apart.

    Attributes:
        difference: largest difference of fastseg's result and eager's, relative to the largest value; of class maps the
            share of pixels that differ.
        runner: latency of the ``Runner``, where the case has one.
        spread: of the samples: half the range of their middle half, over their median.
        path: which path fastseg took, and why, as ``fastseg.explain`` says.
    """

    case: Case
    fastseg: float
    eager: float
    difference: float
    runner: float | None = None
    spread: float = 0.0
    path: str = ""

    def rows(self) -> list[tuple[str, float, str]]:
        """(name, seconds, why it is slower than eager or "") of fastseg, and of its ``Runner``."""
        forms = [(self.case.name, self.fastseg)]
        if self.runner is not None:
            forms.append((f"{self.case.name}, Runner", self.runner))
        return [(name, seconds, self._why(seconds)) for name, seconds in forms]

    def _why(self, seconds: float) -> str:
        if seconds <= self.eager:
            return ""
        slower = seconds / self.eager - 1
        if slower <= self.spread:
            return f"{slower:.0%} slower, within the samples' spread of {self.spread:.0%}"
        if seconds == self.runner:
            return f"{slower:.0%} slower: the Runner compares the model with its copy at each call"
        return f"{slower:.0%} slower: {self.path}"


def op_cases(device: torch.device, dtype: torch.dtype, side_divisor: int = 1) -> list[Case]:
    """Each op of the library, batch 1; ``side_divisor`` makes the maps smaller."""
    cases = []
    for channels, out_channels, side, dilation in SEPARABLE_SHAPES:
        side = max(1, side // side_divisor)
        module = SeparableConv2d(channels, out_channels, dilation=dilation, mid_norm=True, mid_act="relu")
        module = module.to(device, dtype, memory_format=torch.channels_last).eval()
        shape = f"{channels}->{out_channels}, {side}x{side}" + f", dilation {dilation}" * (dilation > 1)
        x = random_image(channels, side, device, dtype)
        cases.append(module_case("separable_conv2d", shape, module, eager_form(module), x))
    side = 128 // side_divisor
    logits = random_image(21, side, device, dtype)
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
    x = random_image(3, side, device, dtype)
    runner = Runner(model, x)
    return Case(
        name, f"3x{side}x{side}", lambda: model.predict(x), lambda: plain(x).argmax(1), lambda: runner.predict(x)
    )


def module_case(name: str, shape: str, module: nn.Module, plain: nn.Module, x: Tensor) -> Case:
    """Compare ``module(x)`` with ``plain(x)``."""
    return Case(name, shape, lambda: module(x), lambda: plain(x))


class EagerForm(nn.Module):
    """``model`` as its modules are written: torch's Conv2d, BatchNorm2d and activation, one after another."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        with unfused():
            return self.model(*args, **kwargs)


def eager_form(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that runs inside ``fastseg.unfused()``: the baseline of comparisons with eager PyTorch."""
    return EagerForm(copy.deepcopy(model)).train(model.training)


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
    if case.runner is not None:
        functions["runner"] = case.runner
    once = sum(medians(interleaved(functions, repetitions=2, warmup=1)).values())
    samples = interleaved(functions, repetitions=min(50, max(5, int(seconds / once))), warmup=1)
    times = medians(samples)
    return Result(
        case, times["fastseg"], times["eager"], difference, times.get("runner"), _spread(samples), _path(case)
    )


def _spread(samples: dict[str, list[float]]) -> float:
    """The largest of the functions': half the range of the middle half of the samples, over their median."""
    halves = [statistics.quantiles(values, n=4, method="inclusive") for values in samples.values()]
    return max((high - low) / 2 / middle for low, middle, high in halves)


def _path(case: Case) -> str:
    """The path of each op that fastseg ran, without repetition."""
    with explain() as report:
        case.fastseg()
    return "; ".join(dict.fromkeys(f"{d.op} by {d.path} ({d.why})" for d in report)) or "torch's own operators"


def table(columns: Mapping[str, list[Result]]) -> str:
    """A text table in milliseconds; ``ratio`` is eager / fastseg: above 1, fastseg is faster.

    Args:
        columns: a title, such as the number of threads, and the results of the same cases in the same order.

    Returns:
        A row for each case, and one for its ``Runner``. Where fastseg is slower, the reason stands behind the row.
    """
    head, rows = ["", ""], []
    for title in columns:
        head += [f"{title}: fastseg ms", "eager ms", "ratio"]
    for results in zip(*columns.values(), strict=True):
        for forms in zip(*(r.rows() for r in results), strict=True):
            row, reasons = [forms[0][0], results[0].case.shape], []
            for title, r, (_, seconds, why) in zip(columns, results, forms, strict=True):
                ratio = r.eager / seconds if seconds > 0 else math.nan
                row += [f"{seconds * 1e3:.3f}", f"{r.eager * 1e3:.3f}", f"{ratio:.2f}"]
                reasons += [f"{title}: {why}"] if why else []
            rows.append([*row, f"{max(r.difference for r in results):.0e}", "; ".join(reasons)])
    rows = [[*head, "difference", "why slower" if any(row[-1] for row in rows) else ""], *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    align = (str.ljust, str.ljust, *(str.rjust,) * (len(widths) - 3), str.ljust)
    lines = ("  ".join(f(cell, w) for f, cell, w in zip(align, row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def random_image(channels: int, side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    x = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    return x.to(device, dtype, memory_format=torch.channels_last)
