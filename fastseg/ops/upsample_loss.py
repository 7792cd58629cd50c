"""A weighted sum of losses on bilinearly upsampled logits, of one head or several."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from fastseg.ops.core.dispatch import followed
from fastseg.ops.core.loss_columns import Column, Table
from fastseg.ops.core.sizes import whole
from fastseg.ops.upsample_loss_sums import upsample_loss_sums

IGNORED = -100  # torch's label of pixels that do not count


class Term(Protocol):
    """What ``upsample_loss`` asks of a loss; ``fastseg.losses.Term`` is one."""

    activation: str
    ignore_index: int | None
    per_image: bool
    ignores: bool
    across_processes: bool

    def columns(self) -> Sequence[Column]:
        """The sums that ``value`` reads."""

    def value(self, table: Table) -> Tensor:
        """The loss."""

    def inputs(self, logits: Tensor) -> Tensor:
        """The logits that the sums are of."""

    def labels(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """The target as ``upsample_loss_sums`` takes it, and a factor for each pixel."""


def upsample_loss(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    terms: Sequence[tuple[float, Term]],
    *,
    ignore_index: int | None = None,
    pixel_weight: Tensor | None = None,
    head_weights: Sequence[float] | None = None,
    align_corners: bool = False,
    across_processes: bool = False,
) -> Tensor:
    """Upsample logits bilinearly to the size of the target and compute a weighted sum of losses.

    Equals ``sum(weight * loss(interpolate(logits, target.shape[-2:], mode="bilinear", ...), target))``, but stores
    neither the full-size logits nor their gradient. One walk over the pixels leaves the sums of all terms, a second one
    makes the gradient of all of them. Deterministic; sums are added up in fp64.

    Args:
        logits: (N, C, h, w), floating point, any layout; or a list of them, one per head, each of its own resolution.
            Volumes (N, C, d, h, w) are interpolated trilinearly, in slabs; targets and factors have a depth too.
        target: class indices (N, H, W) or (N, 1, H, W), or labels for each class (N, C, H, W).
        terms: (weight, loss) pairs, of ``fastseg.losses``.
        ignore_index: label of pixels that do not count; None means that of the terms, else -100.
        pixel_weight: (N, H, W), a factor for each pixel.
        head_weights: a factor for each head; None means 1.
        align_corners: as in ``torch.nn.functional.interpolate``.
        across_processes: sum what is summed over the batch over the processes of ``torch.distributed`` too. Each
            process then has the loss of the whole batch, and DistributedDataParallel's mean is its gradient.

    Returns:
        A scalar, in the dtype of the logits, at least float32.

    Raises:
        ValueError: there is no term or no head, weights are not one for each head, or shapes do not match.
        TypeError: logits or target have no dtype of theirs.
        IndexError: a label is neither a class nor ``ignore_index``; on a GPU as ``upsample_loss_sums`` has it.

    Example:
        >>> from fastseg.losses import CrossEntropy, Dice
        >>> logits, target = torch.randn(2, 5, 8, 8), torch.randint(5, (2, 32, 32))
        >>> upsample_loss(logits, target, [(1.0, CrossEntropy()), (0.5, Dice())]).shape
        torch.Size([])
    """
    heads = [logits] if isinstance(logits, Tensor) else list(logits)
    if not terms or not heads:
        raise ValueError(f"upsample_loss: there are {len(terms)} terms and {len(heads)} maps of logits; give some")
    weights = [1.0] * len(heads) if head_weights is None else list(head_weights)
    if len(weights) != len(heads):
        raise ValueError(f"upsample_loss: head_weights are {tuple(weights)}; give {len(heads)}, one for each head")
    ignored = ignored_label(terms, ignore_index)
    options = (target, terms, ignored, pixel_weight, align_corners, across_processes)
    return _total([(weight, _of_head(head, *options)) for head, weight in zip(heads, weights, strict=True)])


def _total(losses: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The sum of weights times losses; a weight of 1 is no step for autograd."""
    scaled = [loss if isinstance(weight, (int, float)) and weight == 1 else weight * loss for weight, loss in losses]
    return functools.reduce(torch.add, scaled)


def ignored_label(terms: Sequence[tuple[float, Term]], ignore_index: int | None) -> int:
    """The label that all terms without one of their own ignore."""
    if ignore_index is not None:
        return whole(ignore_index)
    return next((term.ignore_index for _, term in terms if term.ignore_index is not None), IGNORED)


def _of_head(
    logits: Tensor, target: Tensor, terms: Sequence[tuple[float, Term]], ignored: int, pixel_weight: Tensor | None,
    align_corners: bool, across_processes: bool,
) -> Tensor:  # fmt: skip
    """The weighted sum of one head: a table for each activation and form of the target."""
    groups: dict[tuple, list[tuple[float, Term]]] = {}
    prepared: dict[tuple, tuple[Tensor, Tensor, Tensor | None]] = {}
    found: list[tuple[float, Tensor]] = []
    for weight, term in _parts(terms, logits):
        own = ignored if term.ignore_index is None else term.ignore_index
        if hasattr(term, "direct"):
            found.append((weight, term.direct(logits, target, own, pixel_weight, align_corners)))
            continue
        x = term.inputs(logits)
        labels, mask = term.labels(logits, target)
        key = (
            term.activation,
            own if term.ignores else None,
            *(None if new is old else id(new) for new, old in ((x, logits), (labels, target), (mask, None))),
        )
        groups.setdefault(key, []).append((weight, term))
        prepared[key] = x, labels, mask
    for key, members in groups.items():
        x, labels, mask = prepared[key]
        if len(members) == 1 and hasattr(members[0][1], "alone") and mask is None and pixel_weight is None:
            weight, term = members[0]
            alone = not (across_processes or term.across_processes)
            loss = term.alone(x, labels, key[1], align_corners) if alone else None
            if loss is not None:
                found.append((weight, loss))
                continue
        columns = tuple(dict.fromkeys(column for _, term in members for column in term.columns()))
        factor = pixel_weight if mask is None else mask if pixel_weight is None else mask * pixel_weight
        sums = upsample_loss_sums(
            x, labels, columns, key[0], ignore_index=key[1], pixel_weight=factor, align_corners=align_corners
        )
        pixels = math.prod(labels.shape[2 - logits.dim() :])
        table = Table(columns, sums, pixels, labels.is_floating_point(), axes=logits.dim() - 2)
        whole: dict[bool, Table] = {}  # over the batch, of this process or of all
        for weight, term in members:
            across = across_processes or term.across_processes
            each = term.per_image or (not across and "additive" in vars(type(term)))
            if not each and across not in whole:
                whole[across] = _over_batch(table, across)
            found.append((weight, term.value(table if each else whole[across])))
    return _total(found).to(torch.promote_types(logits.dtype, torch.float32))


def _parts(terms: Sequence[tuple[float, Term]], logits: Tensor) -> Iterator[tuple[float, Term]]:
    """The terms, with those of a sum of losses in its place."""
    for weight, term in terms:
        if hasattr(term, "terms"):
            yield from ((weight * share, part) for share, part in _parts(term.terms(logits), logits))
        else:
            yield weight, term


def _over_batch(table: Table, across_processes: bool) -> Table:
    sums, images = table.sums.sum(0, keepdim=True), table.images
    if across_processes and dist.is_available() and dist.is_initialized() and not followed():
        from torch.distributed.nn.functional import all_reduce  # not in builds without torch.distributed

        sums, images = all_reduce(sums), images * dist.get_world_size()
    return table.over_batch(sums, images)
