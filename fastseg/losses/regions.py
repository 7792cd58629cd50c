"""Losses of overlap: Dice, Jaccard, Tversky, and the generalised Dice."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg.losses.terms import ClassWeights, Term
from fastseg.ops.core.loss_columns import SOFTMAX, Column, Table


class Tversky(Term):
    """``(1 - (I + smooth) / (I + alpha (P - I) + beta (T - I) + smooth))^gamma``, a mean over images and classes.

    I = sum of p y, P = sum of p, T = sum of y over the pixels of an image. alpha weighs false positives, beta false
    negatives; gamma other than 1 makes it the focal Tversky loss.

    Args:
        alpha: factor of the false positives.
        beta: factor of the false negatives.
        gamma: power of each class's loss.
        smooth: added to both sides of the fraction.
        ignore_index: label of pixels that do not count; None means that of ``UpsampleLoss``.
        activation: "softmax" or "sigmoid".
        weight: (C,), a factor for each class; the mean is then over the weights.
        batch: sum over the batch before the fraction, not over each image.
        include_background: False leaves class 0 out.
        skip_absent: leave out classes without a pixel in the target, of the image or of the batch.
        squared: P = sum of p^2 and T = sum of y^2.
        log: the loss is -log of the fraction.

    Raises:
        ValueError: the activation is unknown, or weights are not one for each class.

    Reference: Salehi et al., arXiv:1706.05721; Abraham and Khan, arXiv:1810.07842.
    """

    def __init__(
        self, alpha: float = 0.5, beta: float = 0.5, gamma: float = 1.0, smooth: float = 1.0,
        ignore_index: int | None = None, activation: str = SOFTMAX, weight: ClassWeights = None, *,
        batch: bool = False, include_background: bool = True, skip_absent: bool = False, squared: bool = False,
        log: bool = False,
    ):  # fmt: skip
        super().__init__(ignore_index, activation, weight)
        self.alpha, self.beta, self.gamma, self.smooth = alpha, beta, gamma, smooth
        self.per_image = not batch
        self.include_background, self.skip_absent = include_background, skip_absent
        self.squared, self.log = squared, log

    def columns(self) -> Sequence[Column]:
        kinds = ("inter", "square", "target_square", "target") if self.squared else ("inter", "prob", "target")
        return [Column(kind) for kind in kinds]

    def value(self, table: Table) -> Tensor:
        inter, target = table("inter"), table("target")
        p, y = (table("square"), table("target_square")) if self.squared else (table("prob"), target)
        score = (inter + self.smooth) / self.bottom(inter, p, y).clamp_min(1e-7)
        loss = -score.clamp_min(1e-7).log() if self.log else 1 - score
        if self.gamma != 1:
            loss = loss.clamp_min(1e-7) ** self.gamma  # the power's slope is infinite at 0
        if self.weight is None and not self.skip_absent:
            return (loss if self.include_background or table.classes == 1 else loss[:, 1:]).mean()
        weight = self.factors(table).expand_as(loss)
        if self.skip_absent:
            weight = weight * (target > 0)
        if not self.include_background and table.classes > 1:
            loss, weight = loss[:, 1:], weight[:, 1:]
        total = weight.sum()
        return (loss * weight).sum() / torch.where(total == 0, 1.0, total)

    def bottom(self, inter: Tensor, p: Tensor, y: Tensor) -> Tensor:
        """The lower side of the fraction."""
        bottom = torch.add(self.beta * y + self.smooth, p, alpha=self.alpha)  # labels ask for no gradient
        rest = 1 - self.alpha - self.beta
        return torch.add(bottom, inter, alpha=rest) if rest else bottom


class Dice(Tversky):
    """``1 - (2 I + smooth) / (P + T + smooth)``, a mean over images and classes.

    Args:
        smooth: added to both sides of the fraction.
        ignore_index, activation, weight, batch, include_background, skip_absent, squared, log: as in ``Tversky``.

    Raises:
        ValueError: the activation is unknown, or weights are not one for each class.

    Reference: Milletari et al., V-Net, arXiv:1606.04797 (``squared=True``).
    """

    def __init__(
        self, smooth: float = 1.0, ignore_index: int | None = None, activation: str = SOFTMAX,
        weight: ClassWeights = None, *, batch: bool = False, include_background: bool = True,
        skip_absent: bool = False, squared: bool = False, log: bool = False,
    ):  # fmt: skip
        super().__init__(
            0.5, 0.5, 1.0, smooth / 2, ignore_index, activation, weight, batch=batch,
            include_background=include_background, skip_absent=skip_absent, squared=squared, log=log,
        )  # fmt: skip


class Jaccard(Tversky):
    """``1 - (I + smooth) / (P + T - I + smooth)``, a mean over images and classes.

    Args:
        smooth: added to both sides of the fraction.
        ignore_index, activation, weight, batch, include_background, skip_absent, squared, log: as in ``Tversky``.

    Raises:
        ValueError: the activation is unknown, or weights are not one for each class.
    """

    def __init__(
        self, smooth: float = 1.0, ignore_index: int | None = None, activation: str = SOFTMAX,
        weight: ClassWeights = None, *, batch: bool = False, include_background: bool = True,
        skip_absent: bool = False, squared: bool = False, log: bool = False,
    ):  # fmt: skip
        super().__init__(
            1.0, 1.0, 1.0, smooth, ignore_index, activation, weight, batch=batch,
            include_background=include_background, skip_absent=skip_absent, squared=squared, log=log,
        )  # fmt: skip


class GeneralizedDice(Term):
    """``1 - (2 sum_c w_c I_c + smooth) / (sum_c w_c (P_c + T_c) + smooth)``, a mean over images.

    Args:
        weighting: of a class by its pixels T: "square" (1 / T^2), "simple" (1 / T) or "uniform" (1). A class without
            pixels has the largest weight of the others.
        smooth: added to both sides of the fraction.
        ignore_index: label of pixels that do not count; None means that of ``UpsampleLoss``.
        activation: "softmax" or "sigmoid".
        batch: sum over the batch before the fraction, not over each image.
        include_background: False leaves class 0 out.

    Raises:
        ValueError: the weighting or the activation is unknown.

    Reference: Sudre et al., arXiv:1707.03237.
    """

    def __init__(
        self, weighting: str = "square", smooth: float = 1e-5, ignore_index: int | None = None,
        activation: str = SOFTMAX, *, batch: bool = False, include_background: bool = True,
    ):  # fmt: skip
        super().__init__(ignore_index, activation)
        if weighting not in ("square", "simple", "uniform"):
            raise ValueError(f'{self._name}: weighting is {weighting!r}; use "square", "simple" or "uniform"')
        self.weighting, self.smooth, self.per_image = weighting, smooth, not batch
        self.include_background = include_background

    def columns(self) -> Sequence[Column]:
        return [Column("inter"), Column("prob"), Column("target")]

    def value(self, table: Table) -> Tensor:
        first = 0 if self.include_background or table.classes == 1 else 1
        inter, p, y = (table(kind)[:, first:] for kind in ("inter", "prob", "target"))
        w = size_weights(y, self.weighting)
        return (1 - (2 * (w * inter).sum(1) + self.smooth) / ((w * (p + y)).sum(1) + self.smooth)).mean()


def size_weights(y: Tensor, weighting: str) -> Tensor:
    """(N, C) pixels -> weights of the generalised Dice, those of absent classes the largest of the others, else 0."""
    if weighting == "uniform":
        return torch.ones_like(y)
    w = y.reciprocal() if weighting == "simple" else (y * y).reciprocal()
    absent = w.isinf()
    w = w.masked_fill(absent, 0.0)
    return w + absent * w.amax(1, keepdim=True)
