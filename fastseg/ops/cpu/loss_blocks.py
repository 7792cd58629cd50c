"""The sums of a block of upsampled logits with a label for each class, and their gradient, on a CPU.

``core/loss_columns.py`` has the mathematics. A block is (rows, C, pixels): pixels are neighbours and classes are lines,
so that maxima and sums over classes are vector operations. A row is a line of an image (``loss_rows``) or all of it
(``loss_planes``). Blocks are summed in the logits' own precision, at least fp32.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseg.ops.core.loss_columns import (
    LABELS,
    SIGMOID,
    Column,
    Sums,
    factor,
    factor_slope,
    own_term,
    sigmoid_slope,
    sigmoid_term,
    softmax_slope,
    softmax_term,
)
from fastseg.ops.core.loss_full import is_ignored

FOCAL = ("focal_pos", "focal_neg")
_OF_OWN = ("nll", "focal")  # columns of the logarithm of the own class's probability
_OF_LOGARITHM = {*_OF_OWN, "all"}
_OF_P = {"inter", "least", "prob", "square", "factor_neg", "focal_neg"}
FEW = 8  # classes up to which labels are compared with each; more are scattered


class Block(NamedTuple):
    """The labels of a block of pixels, and what they count."""

    classes: Tensor | None  # int64 (rows, 1, pixels), 0 where ignored; None: there are labels
    labels: Tensor | None  # (rows, C, pixels); None: there are classes
    counts: Tensor | None  # factors (rows, 1, pixels) or (rows, C, pixels), 0 where ignored; None: 1


class Activated(NamedTuple):
    """What the columns are functions of."""

    p: Tensor | None  # probabilities; None: no column asks for them
    other: Tensor | None  # sigmoid: the logits; softmax: logarithms of p, or None where no column asks for them


def block_of(target: Tensor, factors: Tensor | None, sums: Sums, kind: torch.dtype, classes: int = 0) -> Block:
    """Of class indices (rows, 1, pixels), or with ``classes`` 0 of labels of each class (rows, C, pixels).

    Args:
        target: the labels.
        factors: (rows, 1, pixels), or None.
        sums: its label that does not count.
        kind: dtype of the blocks.
        classes: of which class indices become labels; -1 leaves them as they are.
    """
    counts = None if factors is None else factors.to(kind)
    if sums.ignore_index is not None:
        ignored = is_ignored(target, sums.ignore_index)
        counts = (~ignored).to(kind) if counts is None else counts.where(~ignored, 0)
        target = target.masked_fill(ignored, 0)
    if classes == 0:
        return Block(None, target.to(kind).contiguous(), counts)
    if classes < 0:
        return Block(target.long(), None, counts)
    if classes <= FEW:
        return Block(
            None, (target == torch.arange(classes, dtype=target.dtype, device="cpu")[:, None]).to(kind), counts
        )
    labels = torch.zeros(target.shape[0], classes, target.shape[2], dtype=kind, device="cpu")
    return Block(None, labels.scatter_(1, target.long(), 1.0), counts)


def activated(v: Tensor, sums: Sums, *, named: bool) -> Activated:
    """Of logits (rows, C, pixels); ``named`` as in ``sums_of``."""
    kinds = {column.kind for column in sums.columns}
    asked = bool(kinds & _OF_P) or ("focal" in kinds and not named)
    if sums.activation == SIGMOID:
        return Activated(v.sigmoid() if asked else None, v)
    if kinds & _OF_LOGARITHM:
        other = v.log_softmax(1)
        return Activated(other.exp() if asked else None, other)
    return Activated(v.softmax(1) if asked else None, None)


def sums_of(a: Activated, block: Block, sums: Sums, over: int | tuple[int, ...], *, named: bool, hard: bool) -> Tensor:
    """The columns (..., C, columns), fp64.

    Args:
        a: of the logits.
        block: with labels.
        sums: what is summed.
        over: the axes: 2, or the rows too.
        named: each pixel has one class, whose label is 1, and the logarithms are finite.
        hard: labels are 0 and 1.
    """
    p: Any = a.p  # there where a column asks for it, as are the logarithms
    other: Any = a.other
    y: Any = block.labels
    counts = block.counts
    weighed = y if counts is None else y * counts
    size, own = y.shape[0] * y.shape[2] if over != 2 else y.shape[2], _own(a, y, sums, named)
    kinds = {column.kind for column in sums.columns}
    losses: dict[tuple, Tensor] = {}
    rest = None  # log(1 + exp -|v|): accurate for sure pixels of both labels, where torch's own is not
    if kinds & {"bce", "pos", "neg"}:
        rest = other.abs().neg_().exp_().log1p_()
    found = []
    f: Any
    for column in sums.columns:
        kind = column.kind
        if kind == "count" and counts is None:
            exact = y.dtype if size <= 2**24 else torch.float64
            found.append(torch.full((), size, dtype=exact, device="cpu").expand(*_lines(y, over)))
            continue
        by_label = True  # f is y times something
        if kind == "count":
            f = counts
        elif kind == "target":
            f = weighed
        elif kind == "target_square":
            f = y * weighed
        elif kind == "inter":
            f = p * weighed
        elif named and kind == "nll":
            f = (other * weighed).neg_()
        elif named and kind == "focal":
            f = own_term(column, own) * weighed
        elif kind == "pos":
            f = other.clamp_max(0).neg_().add_(rest).mul_(weighed)
        else:
            by_label = False
            if kind == "bce":
                f = other.clamp_min(0).addcmul_(other, y, value=-1).add_(rest)
            elif kind == "neg":
                f = other.clamp_min(0).add_(rest).mul_(1 - y)
            elif kind in FOCAL and hard:  # of the pixel's own label: one evaluation for both columns
                if column[1:] not in losses:
                    z = other * (1 - 2 * y)  # the logit of the other label
                    losses[column[1:]] = factor(z.sigmoid(), column).mul_(_softplus(z))
                f = losses[column[1:]] * (y if kind == "focal_pos" else 1 - y)
            elif sums.activation == SIGMOID:
                f = sigmoid_term(column, p, other, y)
            else:
                f = softmax_term(column, p, other, y)
        if counts is not None and not by_label:
            f = f * counts
        total = f.sum(over)
        found.append(total if f.shape[1] == y.shape[1] else total.expand(*_lines(y, over)))
    return torch.stack(found, -1).double()


def slope_of(slopes: Tensor, a: Activated, block: Block, sums: Sums, *, named: bool, hard: bool) -> Tensor:
    """The gradient (rows, C, pixels) at the logits, of slopes (rows or 1, C, columns); see ``sums_of``."""
    p: Any = a.p
    other: Any = a.other
    y: Any = block.labels
    softmax = sums.activation != SIGMOID
    if p is None:
        p = other.exp() if softmax else other.sigmoid()
    h: Tensor | None = None
    by_p: Any = None  # what is to be multiplied by p's own slope: a line for each class
    by_y: Any = None  # and one times y
    own = _own(a, y, sums, named)
    pairs: dict[tuple, dict[str, Tensor]] = {}
    added = lambda f: f if h is None else h.add_(f)
    for slope, column in zip(slopes.unsqueeze(-1).unbind(2), sums.columns, strict=True):
        kind = column.kind
        if kind == "prob":
            by_p = slope
        elif kind == "inter":
            by_y = slope
        elif kind in FOCAL and hard:
            pairs.setdefault(column[1:], {})[kind] = slope
        elif named and kind == "nll":
            h = y * -slope if h is None else h.addcmul_(y, slope, value=-1)
        elif named and kind == "focal":
            h = added((y * slope).mul_(softmax_slope(column, own.exp(), own, torch.ones_like(own))))
        elif kind not in LABELS:
            h = added((softmax_slope if softmax else sigmoid_slope)(column, p, other, y).mul_(slope))
    for key, pair in pairs.items():
        pos, neg = (pair.get(kind, torch.zeros_like(slopes[..., :1])) for kind in FOCAL)
        column, sign = Column("focal_pos", *key), 1 - 2 * y
        z = other * sign  # the logit of the other label, and q its probability
        q = z.sigmoid()
        f = _softplus(z).mul_(factor_slope(q, column)).mul_(1 - q)
        f = f.addcmul_(factor(q, column), q).mul_(sign).mul_(torch.addcmul(neg, y, pos - neg))
        h = added(f)
    if by_p is not None or by_y is not None:
        f = by_p.expand_as(p) if by_y is None else y * by_y if by_p is None else torch.addcmul(by_p, y, by_y)
        h = added(f * p if softmax else torch.addcmul(p, p, p, value=-1).mul_(f))
    if h is None:
        return torch.zeros_like(p)
    if block.counts is not None:
        h *= block.counts
    return h.addcmul_(p, h.sum(1, keepdim=True), value=-1) if softmax else h


def _own(a: Activated, y: Tensor, sums: Sums, named: bool) -> Any:
    """(rows, 1, pixels), the logarithm of the own class's probability, where a column asks for it."""
    focal = named and any(column.kind == "focal" for column in sums.columns)
    return (a.other * y).sum(1, keepdim=True) if focal and a.other is not None else None


def _lines(y: Tensor, over: int | tuple[int, ...]) -> tuple[int, ...]:
    return y.shape[:2] if over == 2 else y.shape[1:2]


def _softplus(v: Tensor) -> Tensor:
    """log(1 + exp v), in half the time of torch's logsigmoid; without a gradient."""
    return v.abs().neg_().exp_().log1p_().add_(v.clamp_min(0))
