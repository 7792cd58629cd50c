"""The sums over pixels that losses of regions are made of, and their derivatives.

A loss is a function of sums over pixels, for each image and class. One sum is a column: sum of m f(v, y), where v is an
upsampled logit, y its label and m the factor of the pixel. p = softmax(v) or sigmoid(v), s(v) = log(1 + exp v).

    for both         count: 1; target: y; target_square: y^2; inter: p y; least: min(p, y); prob: p; square: p^2
    softmax only     nll: -y log p; all: -log p; focal: -y (1 - p)^gamma log p
    sigmoid only     bce: y s(-v) + (1 - y) s(v), of which pos is the first half and neg the second
                     pos_flip: y s(v); neg_flip: (1 - y) s(-v), for smoothed labels
                     factor_pos: y f(1 - p); factor_neg: (1 - y) f(p); focal_pos, focal_neg: these times pos, neg
                     f(q) = (q / threshold)^gamma, 1 where 1 - q < threshold; q^gamma without a threshold

With g_ck the derivative of the loss by column k of class c, a pixel's gradient is

    softmax    dv_c = m (h_c - p_c sum_j h_j),    h_c = sum_k g_ck df_k / d log p_c
    sigmoid    dv_c = m sum_k g_ck df_k / dv_c

so nothing but the sums passes from the first walk over the pixels to the second.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SOFTMAX, SIGMOID = "softmax", "sigmoid"
LABELS = ("count", "target", "target_square")  # columns without a gradient
SHARED = (*LABELS, "inter", "least", "prob", "square")
KINDS = {
    SOFTMAX: (*SHARED, "nll", "all", "focal"),
    SIGMOID: (
        *SHARED, "bce", "pos", "neg", "pos_flip", "neg_flip", "factor_pos", "factor_neg", "focal_pos", "focal_neg",
    ),
}  # fmt: skip


class Column(NamedTuple):
    """One sum; ``gamma`` and ``threshold`` are those of the focal ones."""

    kind: str
    gamma: float = 0.0
    threshold: float = 0.0


class Table:
    """The sums that a loss is computed from.

    Args:
        columns: the names of the sums.
        sums: (N, C, columns), or (1, C, columns) over the batch.
        pixels: of one image, those included that do not count.
        probabilities: whether the labels are floating point.
        images: in the sums; None means N.
        axes: of an image: 2, or 3 of a volume.
    """

    def __init__(
        self, columns: tuple[Column, ...], sums: Tensor, pixels: int, probabilities: bool, images: int | None = None,
        axes: int = 2,
    ):  # fmt: skip
        self._at = {column: k for k, column in enumerate(columns)}
        self.columns, self.sums, self.pixels, self.probabilities = columns, sums, pixels, probabilities
        self._each: tuple[Tensor, ...] | None = None
        self.images, self.axes = sums.shape[0] if images is None else images, axes

    @property
    def classes(self) -> int:
        return self.sums.shape[1]

    def __call__(self, kind: str, gamma: float = 0.0, threshold: float = 0.0) -> Tensor:
        """(N, C), one column."""
        if self._each is None:
            self._each = self.sums.unbind(-1)  # one step for autograd, not one for each column
        return self._each[self._at[Column(kind, gamma, threshold)]]

    def over_batch(self, sums: Tensor, images: int) -> "Table":
        """The same with other sums."""
        return Table(self.columns, sums, self.pixels, self.probabilities, images, self.axes)


class Sums(NamedTuple):
    """What is summed, and over which pixels."""

    columns: tuple[Column, ...]
    activation: str
    ignore_index: int | None  # label of pixels that do not count
    align_corners: bool


def softplus(v: Tensor) -> Tensor:
    """log(1 + exp v) to full precision; torch's own stops at 20."""
    return -F.logsigmoid(-v)


def factor(q: Tensor, column: Column) -> Tensor:
    """f(q) of the header."""
    if column.threshold == 0:
        return q**column.gamma
    return torch.where(1 - q < column.threshold, 1.0, (q / column.threshold) ** column.gamma)


def factor_slope(q: Tensor, column: Column) -> Tensor:
    """q df / dq."""
    slope = column.gamma * factor(q, column)
    return slope if column.threshold == 0 else slope.where(1 - q >= column.threshold, 0.0)


def softmax_term(column: Column, p: Tensor, log_p: Tensor, y: Tensor) -> Tensor:
    """f of one column."""
    kind = column.kind
    if kind == "all":
        return -log_p
    if kind in ("nll", "focal"):  # a class of probability 0 costs nothing where it is not meant
        loss = -y * log_p if kind == "nll" else -y * (1 - p) ** column.gamma * log_p
        return torch.where(y == 0, 0.0, loss)
    return shared_term(kind, p, y)


def own_term(column: Column, log_p: Tensor) -> Tensor:
    """f of one column at the pixel's own class, whose label is 1."""
    if column.kind == "nll":
        return -log_p
    p = log_p.exp()
    return (
        -((1 - p) ** column.gamma) * log_p
        if column.kind == "focal"
        else shared_term(column.kind, p, torch.ones_like(p))
    )


def softmax_slope(column: Column, p: Tensor, log_p: Tensor, y: Tensor) -> Tensor:
    """df / d log p of one column that is none of ``LABELS``."""
    kind = column.kind
    if kind == "nll":
        return -y
    if kind == "all":
        return -torch.ones_like(p)
    if kind == "focal":
        q, gamma = 1 - p, column.gamma
        inner = gamma * q ** (gamma - 1) * p * log_p if gamma else 0.0
        return y * (inner - q**gamma)
    return p * shared_slope(kind, p, y)


def sigmoid_term(column: Column, p: Tensor, v: Tensor, y: Tensor) -> Tensor:
    """f of one column."""
    kind = column.kind
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(v, y, reduction="none")
    if kind in ("pos", "neg_flip"):
        return (y if kind == "pos" else 1 - y) * softplus(-v)
    if kind in ("neg", "pos_flip"):
        return (1 - y if kind == "neg" else y) * softplus(v)
    if kind.endswith("_pos"):
        weight = y * factor(torch.sigmoid(-v), column)
        return weight if kind == "factor_pos" else weight * softplus(-v)
    if kind.endswith("_neg"):
        weight = (1 - y) * factor(p, column)
        return weight if kind == "factor_neg" else weight * softplus(v)
    return shared_term(kind, p, y)


def sigmoid_slope(column: Column, p: Tensor, v: Tensor, y: Tensor) -> Tensor:
    """df / dv of one column that is none of ``LABELS``."""
    kind = column.kind
    if kind == "bce":
        return p - y
    if kind in ("neg", "pos_flip"):
        return (1 - y if kind == "neg" else y) * p
    q = torch.sigmoid(-v)
    if kind in ("pos", "neg_flip"):
        return (-y if kind == "pos" else y - 1) * q
    if kind == "factor_pos":
        return -y * p * factor_slope(q, column)
    if kind == "factor_neg":
        return (1 - y) * q * factor_slope(p, column)
    if kind == "focal_pos":
        return -y * (factor_slope(q, column) * p * softplus(-v) + factor(q, column) * q)
    if kind == "focal_neg":
        return (1 - y) * (factor_slope(p, column) * q * softplus(v) + factor(p, column) * p)
    return p * q * shared_slope(kind, p, y)


def shared_term(kind: str, p: Tensor, y: Tensor) -> Tensor:
    """f of a column that both activations have."""
    if kind == "inter":
        return p * y
    if kind == "least":
        return torch.minimum(p, y)
    if kind == "prob":
        return p
    if kind == "square":
        return p * p
    return torch.ones_like(p) if kind == "count" else y if kind == "target" else y * y


def shared_slope(kind: str, p: Tensor, y: Tensor) -> Tensor:
    """df / dp of a column that both activations have."""
    if kind == "inter":
        return y
    if kind == "least":
        return (p < y).to(p.dtype) + 0.5 * (p == y).to(p.dtype)
    return torch.ones_like(p) if kind == "prob" else 2 * p
