"""Sums of upsampled logits by torch's own steps at full resolution: what the fused forms equal."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastseg.ops.core.labels import LABEL_DTYPES, equal
from fastseg.ops.core.loss_columns import (
    LABELS,
    SIGMOID,
    SOFTMAX,
    Sums,
    own_term,
    sigmoid_slope,
    sigmoid_term,
    softmax_slope,
    softmax_term,
)
from fastseg.ops.core.upsample import interpolate
from fastseg.ops.core.volume import Resize
from fastseg.ops.core.volume import interpolate as interpolate_volume


def at_full_size(logits: Tensor, target: Tensor, pixel_weight: Tensor | None, sums: Sums) -> Tensor:
    """The sums by torch's own steps at full resolution."""
    kind = torch.promote_types(logits.dtype, torch.float32)
    v = interpolate(logits.to(kind), *target.shape[-2:], (0.0, 0.0), sums.align_corners)
    each_class = target.dim() == 4
    target = target if each_class else target[:, None]
    counts = None
    if sums.ignore_index is not None:
        counts = ~is_ignored(target, sums.ignore_index)
        target = target.where(counts, 0)
    weight = None if pixel_weight is None else pixel_weight[:, None].to(kind)

    def total(f: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C)."""
        f = f if counts is None else torch.where(counts, f, 0.0)
        f = f if weight is None else f * weight
        return f.sum(3).sum(2, dtype=torch.float64)  # rows in the logits' precision

    if sums.activation == SOFTMAX and not each_class:
        return torch.stack(list(_of_classes(v, target.long(), counts, weight, sums, total)), 2)
    labels = target.to(kind) if each_class else torch.zeros_like(v).scatter(1, target.long(), 1.0)
    if sums.activation == SIGMOID:
        p, other, term = v.sigmoid(), v, sigmoid_term
    else:
        other = v.log_softmax(1)
        p, term = other.exp(), softmax_term
    constant = counts is None and weight is None
    count = v.new_full(v.shape[:2], v.shape[2] * v.shape[3], dtype=torch.float64) if constant else None
    of = lambda column: count if constant and column.kind == "count" else total(term(column, p, other, labels))
    return torch.stack([of(column) for column in sums.columns], 2)


def volume_at_full_size(logits: Tensor, target: Tensor, pixel_weight: Tensor | None, sums: Sums) -> Tensor:
    """The same of volumes (N, C, d, h, w): upsampled, their slices are the rows of a map."""
    D, H, W = target.shape[-3:]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    v = interpolate_volume(wide, Resize((D, H, W), (0.0, 0.0, 0.0), sums.align_corners))
    factor = None if pixel_weight is None else pixel_weight.flatten(1, 2)
    return at_full_size(v.flatten(2, 3), target.flatten(-3, -2), factor, sums)


def _of_classes(
    v: Tensor, classes: Tensor, counts: Tensor | None, weight: Tensor | None, sums: Sums, total: Callable
) -> Iterator[Tensor]:
    """The columns (N, C) of softmax and class indices; what a class has of its own pixels is gathered."""
    log_p = v.log_softmax(1)
    own, kinds = log_p.gather(1, classes), {column.kind for column in sums.columns}
    plain = counts is None and weight is None
    p = log_p.exp() if kinds & {"prob", "square"} else own
    for column in sums.columns:
        if column.kind in ("prob", "square", "all"):
            yield total(softmax_term(column, p, log_p, own))
        elif column.kind == "count":
            number = own.new_full(own.shape[:2], own.shape[2] * own.shape[3], dtype=torch.float64) if plain else None
            yield (total(torch.ones_like(own)) if number is None else number).expand(v.shape[:2])
        else:
            f = own_term(column, own)
            f = f if counts is None else torch.where(counts, f, 0.0)
            f = (f if weight is None else f * weight).flatten(1).double()
            yield f.new_zeros(v.shape[:2]).scatter_add(1, classes.flatten(1), f)


def slope_at_full_size(
    slopes: Tensor, logits: Tensor, target: Tensor, pixel_weight: Tensor | None, sums: Sums
) -> Tensor:
    """The gradient at the logits of a loss with derivatives slopes (N, C, columns) by its sums, without autograd."""
    kind = torch.promote_types(logits.dtype, torch.float32)
    v = interpolate(logits.to(kind), *target.shape[-2:], (0.0, 0.0), sums.align_corners)
    each_class = target.dim() == 4
    target = target if each_class else target[:, None]
    factor = torch.ones_like(v[:, :1]) if pixel_weight is None else pixel_weight[:, None].to(kind)
    if sums.ignore_index is not None:
        counts = ~is_ignored(target, sums.ignore_index)
        target, factor = target.where(counts, 0), torch.where(counts, factor, 0.0)
    labels = target.to(kind) if each_class else torch.zeros_like(v).scatter(1, target.long(), 1.0)
    softmax = sums.activation == SOFTMAX
    other = v.log_softmax(1) if softmax else v
    p, slope = (other.exp(), softmax_slope) if softmax else (v.sigmoid(), sigmoid_slope)
    h = torch.zeros_like(v)
    for k, column in enumerate(sums.columns):
        if column.kind not in LABELS:
            h = h + slopes[:, :, k, None, None].to(kind) * slope(column, p, other, labels)
    h = torch.where(factor == 0, 0.0, h * factor)
    if softmax:
        h = h - p * h.sum(1, keepdim=True)
    back = torch.ops.aten.upsample_bilinear2d_backward
    return back(h, h.shape[2:], logits.shape, sums.align_corners, None, None).to(logits.dtype)


def is_ignored(target: Tensor, value: int) -> Tensor:
    """True where labels of any dtype equal ``value``."""
    return equal(target, value) if target.dtype in LABEL_DTYPES else target == value
