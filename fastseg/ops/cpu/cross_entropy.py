"""The cross entropy of upsampled logits on a CPU: its forms."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.forms import Cost, Form, Forms, Reference
from fastseg.ops.core.labels import equal, outside
from fastseg.ops.core.layout import memory_format_of
from fastseg.ops.core.upsample import cross_entropy, interpolate
from fastseg.ops.cpu.cross_entropy_rows import Criterion, can_walk, pays, walk


class Request(NamedTuple):
    """What decides between the forms."""

    torchs: str  # why torch's two steps must run, or ""
    large: bool  # rows pay
    walks: bool  # rows can be taken


def request_of(logits: Tensor, target: Tensor, weight: Tensor | None, criterion: Criterion) -> Request:
    """Of logits on a CPU that nothing follows: their values are read where they decide."""
    if weight is not None and weight.requires_grad:
        return Request("the class weights require a gradient", False, False)
    if target.numel() == 0:
        return Request("no pixel", False, False)
    if _weightless(target, weight, criterion.ignore_index, criterion.reduction):
        return Request("the weights of the mean may sum to 0", False, False)
    large = pays(logits, target)
    return Request("", large, large and can_walk(logits, target))


class PlanesForm(Form):
    """Each class a plane: few classes, or small maps."""

    name, path = "planes", "torch"

    def refuses(self, r: Request) -> str:
        return r.torchs

    def cost(self, r: Request) -> Cost:
        return Cost(not r.large, None, "many classes on a large map")

    def run(self, *args) -> Tensor:
        return in_planes(*args)


class RowsForm(Form):
    """A few rows of pixels at a time; nothing of full size is stored."""

    name, path = "rows", "torch"

    def refuses(self, r: Request) -> str:
        return r.torchs or ("" if r.walks else "not finite, or rows that cannot be walked")

    def run(self, *args) -> Tensor:
        return walk(*args)


def composed(
    logits: Tensor, target: Tensor, weight: Tensor | None, c: Criterion, out: torch.dtype | None = None
) -> Tensor:
    """Torch's two steps."""
    return cross_entropy(logits, target, weight, c.ignore_index, c.reduction, c.label_smoothing, c.align_corners)


def _weightless(target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str) -> bool:
    """True if the weights of a mean may sum to 0; its gradient is then NaN where a pixel counts, and 0 elsewhere."""
    if reduction != "mean" or weight is None or bool((weight > 0).all()):
        return False
    target = target[~equal(target, ignore_index)].long()
    inside = target[~outside(target, len(weight))]
    return bool(weight[inside].sum() == 0)


def in_planes(logits: Tensor, target: Tensor, weight: Tensor | None, criterion: Criterion, out: torch.dtype) -> Tensor:
    """Torch's two steps with each class a plane, for few classes or small maps."""
    kind = torch.promote_types(logits.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        planes, layout = logits.to(kind).contiguous(), memory_format_of(logits)
        if planes.requires_grad and layout != torch.contiguous_format:
            planes.register_hook(lambda grad: grad.contiguous(memory_format=layout))
        full = interpolate(planes, *target.shape[1:], (0.0, 0.0), criterion.align_corners)
        loss = F.cross_entropy(
            full, target.long(), None if weight is None else weight.to(kind), ignore_index=criterion.ignore_index,
            reduction=criterion.reduction, label_smoothing=criterion.label_smoothing,
        )  # fmt: skip
    return loss.to(out)


CPU_FORMS = Forms("upsample_cross_entropy", [PlanesForm(), RowsForm(), Reference(composed)])
