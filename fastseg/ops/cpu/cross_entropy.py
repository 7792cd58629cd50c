"""The cross entropy of upsampled logits on a CPU: its forms."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.explain import Refusal
from fastseg.ops.core.forms import Form, Torchs, Verdict, forced_blocks
from fastseg.ops.core.labels import equal, outside
from fastseg.ops.core.layout import memory_format_of
from fastseg.ops.core.upsample import cross_entropy, is_moderate
from fastseg.ops.cpu.cross_entropy_rows import Criterion, can_walk, fastest, walk


class Request(NamedTuple):
    """What decides between the forms."""

    torchs: str  # why torch's own lines must run where no kernel does, or ""
    fastest: str
    walks: bool  # rows can be taken
    no_kernel: str = "CPU tensor"  # as of ``OneKernel``
    sizes: tuple = ()  # of the map, its strides, and of the target
    block: bool = False  # two classes of a reduced loss, no logit huge


def request_of(logits: Tensor, target: Tensor, weight: Tensor | None, criterion: Criterion) -> Request:
    """Of logits on a CPU that nothing follows: their values are read where they decide."""
    if weight is not None and weight.requires_grad:
        return Request("the class weights require a gradient", "", False)
    if target.numel() == 0:
        return Request("no pixel", "", False)
    if weight is not None and _weightless(target, weight, criterion.ignore_index, criterion.reduction):
        return Request("the weights of the mean may sum to 0", "", False)
    name = fastest(logits.shape[1], target.numel())
    if name == "block" and criterion.reduction == "none":
        name = "planes"
    forced = bool(forced_blocks())
    two = logits.shape[1] == 2 and criterion.reduction != "none"
    block = two and (name == "block" or forced) and is_moderate(logits)
    return Request("", name, (name == "rows" or forced) and can_walk(logits, target), block=block)


class TwoStepsForm(Form):
    """Torch's two steps with each class a plane, or the classes of a pixel side by side."""

    path = "torch"

    def __init__(self, name: str):
        self.name = name

    def refuses(self, r: Request) -> str:
        return r.torchs

    def cost(self, r: Request) -> Verdict:
        return Verdict(r.fastest == self.name, None, f"{r.fastest} are faster")

    def why(self, r: Request, refused: Sequence[Refusal]) -> str:
        return ""

    def run(self, *args) -> Tensor:
        return in_two_steps(*args, side_by_side=self.name == "pixels")


class RowsForm(Form):
    """A few rows of pixels at a time; nothing of full size is stored."""

    name, path = "rows", "torch"

    def refuses(self, r: Request) -> str:
        return r.torchs or ("" if r.walks else "not finite, or rows that cannot be walked")

    def cost(self, r: Request) -> Verdict:
        return Verdict(r.fastest == self.name, None, f"{r.fastest} are faster")

    def why(self, r: Request, refused: Sequence[Refusal]) -> str:
        return ""

    def run(self, logits: Tensor, target: Tensor, weight: Tensor | None, criterion: Criterion) -> Tensor:
        kind = torch.promote_types(logits.dtype, torch.float32)
        out = kind if torch.is_autocast_enabled("cpu") else logits.dtype
        return walk(logits, target, weight, criterion, out, at_once=self.name == "block")


class BlockForm(RowsForm):
    """All pixels of two classes at once, as one plane."""

    name = "block"

    def refuses(self, r: Request) -> str:
        return r.torchs or ("" if r.block else "not two finite classes, or a loss for each pixel")


def composed(logits: Tensor, target: Tensor, weight: Tensor | None, c: Criterion) -> Tensor:
    """Torch's two steps."""
    return cross_entropy(logits, target, weight, c.ignore_index, c.reduction, c.label_smoothing, c.align_corners)


def _weightless(target: Tensor, weight: Tensor, ignore_index: int, reduction: str) -> bool:
    """True if the weights of a mean may sum to 0; its gradient is then NaN where a pixel counts, and 0 elsewhere."""
    if reduction != "mean" or bool((weight > 0).all()):
        return False
    target = target[~equal(target, ignore_index)].long()
    inside = target[~outside(target, len(weight))]
    return bool(weight[inside].sum() == 0)


def in_two_steps(
    logits: Tensor, target: Tensor, weight: Tensor | None, criterion: Criterion, *, side_by_side: bool
) -> Tensor:
    """Torch's two steps for few classes or small maps; ``side_by_side``: the classes of a pixel are neighbours."""
    ignore_index, reduction, label_smoothing, align_corners = criterion
    kind = torch.promote_types(logits.dtype, torch.float32)
    autocast = torch.is_autocast_enabled("cpu")  # to enter its context takes 7 us
    out = kind if autocast else logits.dtype
    with torch.autocast("cpu", enabled=False) if autocast else nullcontext():
        wide, pixels = logits if logits.dtype == kind else logits.to(kind), target.long()
        wide = wide.contiguous(memory_format=torch.channels_last if side_by_side else torch.contiguous_format)
        if wide is not logits and wide.requires_grad:
            layout = memory_format_of(logits)
            wide.register_hook(lambda grad: grad.contiguous(memory_format=layout))
        full = F.interpolate(wide, target.shape[1:], None, "bilinear", align_corners)
        weight = None if weight is None else weight.to(kind)
        if full.shape[1] == 1:  # its logarithm of the softmax is 0, or NaN, and so is the gradient: 0.9 of the time
            loss = F.nll_loss(full * (full - full).detach(), pixels, weight, None, ignore_index, reduction=reduction)
        else:
            if side_by_side:
                full, pixels = full.permute(0, 2, 3, 1).flatten(0, 2), pixels.flatten()
            loss = F.cross_entropy(
                full, pixels, weight, None, ignore_index, reduction=reduction, label_smoothing=label_smoothing
            )
            loss = loss.view(target.shape) if side_by_side and reduction == "none" else loss
    return loss if loss.dtype == out else loss.to(out)


CPU_FORMS: list[Form] = [TwoStepsForm("planes"), TwoStepsForm("pixels"), RowsForm(), BlockForm(), Torchs(composed)]
