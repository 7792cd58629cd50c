"""Sums over the pixels of upsampled logits on a CPU: which way is fastest, and the gradient of each.

Strips of rows (``loss_rows.py``) for volumes and for large maps of one plane or of many classes, all pixels at once
(``loss_planes.py``) for the others. Two classes of softmax are one plane, their difference; one class is certain. NaN
and infinity, which these would spread, are left to torch's own steps.
"""

import functools
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.ops.core.autograd import derived, differentiable
from fastseg.ops.core.constants import constant
from fastseg.ops.core.labels import LABEL_DTYPES, check_targets
from fastseg.ops.core.layout import memory_format_of
from fastseg.ops.core.loss_columns import SIGMOID, SOFTMAX, Column, Sums
from fastseg.ops.core.loss_full import at_full_size, is_ignored, volume_at_full_size
from fastseg.ops.core.upsample import is_moderate
from fastseg.ops.cpu import loss_planes
from fastseg.ops.cpu.loss_blocks import Activated, Block
from fastseg.ops.cpu.loss_planes import Planes
from fastseg.ops.cpu.loss_rows import Walk
from fastseg.ops.cpu.upsampled_rows import BLOCK

# Upsampled logits of many classes, of one plane, and of volumes, from which strips are faster
# (``benchmarks.studies.losses_cpu``, ``volumes_cpu``).
_LEAST, _PLANE, _VOLUME = 2**18, 2**17, 2**15
_MANY = 5  # classes; 3 and 4 are planes


def sums_on_cpu(logits: Tensor, target: Tensor, pixel_weight: Tensor | None, sums: Sums) -> Tensor:
    """``upsample_loss_sums`` of checked arguments on a CPU that nothing follows; of moderate volumes.

    Raises:
        IndexError: a label is no class.
    """
    if not check_labels(target, 2 if target.dim() == logits.dim() else logits.shape[1], sums.ignore_index):
        sums = sums._replace(ignore_index=None)
    autocast = torch.is_autocast_enabled("cpu")  # to enter its context takes 7 us
    with torch.autocast("cpu", enabled=False) if autocast else nullcontext():
        if is_moderate(logits):
            return _Sums.apply(logits, target, pixel_weight, sums)
        return at_full_size(logits, target, pixel_weight, sums)


class _Plan(NamedTuple):
    """What is computed: of all classes, of the difference of two, or nothing of one; in parts or all at once."""

    constant: bool
    two: bool
    parts: bool
    sums: Sums  # of all classes, or of the difference
    given: tuple[Column, ...]


def _plan_of(x: Tensor, target: Tensor, pixel_weight: Tensor | None, sums: Sums) -> _Plan:
    C, named, given = x.shape[1], target.dim() == x.dim() - 1 and sums.activation == SOFTMAX, sums.columns
    two = named and C == 2
    if two:
        C, sums = 1, sums._replace(columns=_of_difference(given), activation=SIGMOID)
    pixels = target.numel() // (1 if target.dim() < x.dim() else target.shape[1])
    if x.dim() == 4 and C > 1 and _separate(sums, target, pixel_weight):
        C, pixels = 1, C * pixels
    if x.dim() == 5:
        parts = C * pixels >= _VOLUME
    else:
        parts = pixels >= _PLANE if C == 1 else C >= _MANY and C * pixels >= _LEAST
    return _Plan(named and x.shape[1] == 1, two, parts, sums, given)


def _separate(sums: Sums, target: Tensor, pixel_weight: Tensor | None) -> bool:
    """Whether each class of a map is a plane of its own."""
    return sums.activation == SIGMOID and target.dim() == 4 and pixel_weight is None


def _walk_of(x: Tensor, target: Tensor, pixel_weight: Tensor | None, sums: Sums) -> Walk | Planes:
    small = x.dim() == 4 and target.shape[-2] * target.shape[-1] <= 2 * BLOCK
    if small and _separate(sums, target, pixel_weight):
        return Planes(x, target, sums)
    return Walk(x, target, pixel_weight, sums)


class _Sums(torch.autograd.Function):
    """The sums, and their gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, target: Tensor, pixel_weight: Tensor | None, sums: Sums) -> Tensor:
        plan, labels, v = _plan_of(x, target, pixel_weight, sums), target, x
        kept: list[Tensor | None] = [None] * 5
        if plan.two:
            kind = torch.promote_types(x.dtype, torch.float32)
            v, labels = x[:, 1:].to(kind) - x[:, :1].to(kind), target[:, None]
        if plan.constant:
            total = _certain(target, pixel_weight, sums)
        elif plan.parts:
            total = _walk_of(v, labels, pixel_weight, plan.sums).forward()
        else:
            total, a, block = loss_planes.forward(v, labels, pixel_weight, plan.sums)
            kept = [*a, *block]
        ctx.sums, ctx.plan = sums, plan
        ctx.save_for_backward(x, target, pixel_weight, v if plan.two and plan.parts else None, *kept)
        if plan.two:
            total = torch.matmul(total[:, 0], _of_two(plan.given)).view(-1, 2, len(plan.given))
        return total

    @staticmethod
    def gradients(ctx, saved, slopes: Tensor):
        x, target, pixel_weight, v, *kept = saved
        plan, shape = ctx.plan, x.shape
        if plan.constant:
            return torch.zeros_like(x), None, None, None
        if plan.two:
            slopes = torch.matmul(slopes.flatten(1), _of_two(plan.given).t())[:, None]
            target, shape = target[:, None], torch.Size((shape[0], 1, *shape[2:]))
        if plan.parts:
            with torch.autocast("cpu", enabled=False):
                dx = _walk_of(x if v is None else v, target, pixel_weight, plan.sums).backward(slopes)
        else:
            a, block = Activated(*kept[:2]), Block(*kept[2:])
            dx = loss_planes.backward(slopes, a, block, shape, target, plan.sums)
        if plan.two:
            dx = torch.cat([-dx, dx], 1)
        return dx.to(x.dtype).contiguous(memory_format=memory_format_of(x)), None, None, None

    @staticmethod
    def again(ctx, saved, slopes: Tensor):
        x, target, pixel_weight, *_ = saved
        with torch.autocast("cpu", enabled=False):
            full = volume_at_full_size if x.dim() == 5 else at_full_size
            forward = lambda x: full(x, target, pixel_weight, ctx.sums)
            return *derived(forward, (x,), ctx.needs_input_grad[:1], slopes), None, None, None

    backward = staticmethod(differentiable(gradients, again))


def _certain(target: Tensor, pixel_weight: Tensor | None, sums: Sums) -> Tensor:
    """The sums of the softmax of one class: its probability is 1, and so are all labels."""
    counts = torch.ones_like(target, dtype=torch.float64) if pixel_weight is None else pixel_weight.detach().double()
    if sums.ignore_index is not None:
        counts = counts.masked_fill(is_ignored(target, sums.ignore_index), 0.0)
    count = counts.flatten(1).sum(1)
    found = [0 * count if column.kind in ("nll", "all", "focal") else count for column in sums.columns]
    return torch.stack(found, 1)[:, None]


# --- two classes by their difference: columns of its sigmoid, besides count and target, and how they are combined

_FOCAL = ("focal_pos", "focal_neg")
_COLUMNS = {
    "inter": ("inter", "prob"), "least": ("inter", "prob"), "prob": ("prob",), "square": ("square", "prob"),
    "nll": ("pos", "neg"), "all": ("pos", "neg", "pos_flip", "neg_flip"), "focal": _FOCAL,
}  # fmt: skip
_FIRST = {  # the first class's sum; the second's is of the same name, where it is no loss
    "count": {"count": 1}, "target": {"count": 1, "target": -1}, "target_square": {"count": 1, "target": -1},
    "inter": {"count": 1, "target": -1, "prob": -1, "inter": 1}, "prob": {"count": 1, "prob": -1},
    "least": {"count": 1, "target": -1, "prob": -1, "inter": 1}, "square": {"count": 1, "prob": -2, "square": 1},
    "nll": {"neg": 1}, "all": {"neg": 1, "pos_flip": 1}, "focal": {"focal_neg": 1},
}  # fmt: skip
_SECOND = {
    "target_square": {"target": 1}, "least": {"inter": 1}, "nll": {"pos": 1}, "all": {"pos": 1, "neg_flip": 1},
    "focal": {"focal_pos": 1},
}  # fmt: skip


def _named(name: str, gamma: float) -> Column:
    return Column(name, gamma if name in _FOCAL else 0.0)


@functools.lru_cache(64)
def _of_difference(columns: tuple[Column, ...]) -> tuple[Column, ...]:
    """The columns of sigmoid that those of softmax are made of."""
    needed: dict[Column, None] = dict.fromkeys([Column("count"), Column("target")])
    for kind, gamma, _ in columns:
        needed.update(dict.fromkeys(_named(name, gamma) for name in _COLUMNS.get(kind, ())))
    return tuple(needed)


@constant(maxsize=64)
def _of_two(columns: tuple[Column, ...]) -> Tensor:
    """(columns of sigmoid, 2 * columns): what makes the sums of two classes."""
    needed = _of_difference(columns)
    matrix = torch.zeros(len(needed), 2, len(columns), dtype=torch.float64, device="cpu")
    for k, (kind, gamma, _) in enumerate(columns):
        for label, shares in enumerate((_FIRST[kind], _SECOND.get(kind, {kind: 1}))):
            for name, share in shares.items():
                matrix[needed.index(_named(name, gamma)), label, k] = share
    return matrix.flatten(1)


# --- labels


def check_labels(target: Tensor, classes: int, ignore_index: int | None) -> bool:
    """Raise torch's error for a label that is no class. Reads the values.

    Args:
        target: labels.
        classes: their number; 2 for labels of each class, which are 0 or 1.
        ignore_index: the label that does not count, or None.

    Returns:
        False if no label is ignored.
    """
    if target.numel() == 0:
        return False
    if target.dtype == torch.bool:
        return ignore_index in (0, 1)
    least, most = (value.item() for value in target.aminmax())
    if target.dtype in LABEL_DTYPES and (least < 0 or most >= classes):
        check_targets(target, classes, -1 if ignore_index is None else ignore_index)
    return ignore_index is not None and least <= ignore_index <= most
