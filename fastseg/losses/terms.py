"""The losses of ``fastseg.nn.UpsampleLoss``: each a function of sums over the pixels of upsampled logits."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastseg.ops.core.dispatch import is_torchs
from fastseg.ops.core.loss_columns import KINDS, SIGMOID, SOFTMAX, Column, Table
from fastseg.ops.cpu.loss_alone import Alone
from fastseg.ops.upsample_cross_entropy import upsample_cross_entropy
from fastseg.ops.upsample_loss import upsample_loss
from fastseg.ops.upsample_loss_sums import upsample_loss_alone

ClassWeights = Tensor | Sequence[float] | None


class Term(nn.Module):
    """A loss of logits (N, C, h, w), upsampled bilinearly to the size of the target, for ``UpsampleLoss``.

    By itself it is a module too: ``loss(logits, target)``. A loss of your own needs ``columns`` and ``value``.

    Args:
        ignore_index: label of pixels that do not count; None means that of ``UpsampleLoss``.
        activation: "softmax" or "sigmoid".
        weight: (C,), a factor for each class.

    Attributes:
        per_image: whether ``value`` gets the sums of each image, or those of the batch.
        additive: declared beside a ``value`` that adds up all images' sums: it may get those of each image too.

    Raises:
        ValueError: the activation is none of the two.
    """

    per_image = False
    across_processes = False  # whether sums over the batch are summed over processes, asked for or not
    ignores = True  # whether an ignored label is looked for
    label_error: type[Exception] = IndexError  # for a label that is no class

    def __init__(self, ignore_index: int | None = None, activation: str = SOFTMAX, weight: ClassWeights = None):
        super().__init__()
        if activation not in KINDS:
            raise ValueError(f'{self._name}: activation is {activation!r}; use "softmax" or "sigmoid"')
        self.ignore_index, self.activation = ignore_index, activation
        self.weight: Tensor | None
        self.register_buffer("weight", None if weight is None else torch.as_tensor(weight))
        if self.weight is not None and not self.weight.is_floating_point():
            self.weight = self.weight.float()

    @property
    def _name(self) -> str:
        return type(self).__name__

    def columns(self) -> Sequence[Column]:
        """The sums that ``value`` reads."""
        raise NotImplementedError

    def value(self, table: Table) -> Tensor:
        """The loss, from ``table(kind)``, sums (N, C), or (1, C) over the batch."""
        raise NotImplementedError

    def inputs(self, logits: Tensor) -> Tensor:
        """The logits that the sums are of."""
        return logits

    def labels(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """The target as class indices or labels of each class, and a factor for each pixel."""
        return target, None

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits (N, C, h, w) and target (N, H, W) or (N, C, H, W) -> the loss."""
        try:
            return upsample_loss(logits, target, [(1.0, self)])
        except IndexError as error:  # a label that is no class
            raise self.label_error(str(error)) from None

    def factors(self, table: Table) -> Tensor:
        """(C,) in the sums' dtype; ones without a weight.

        Raises:
            ValueError: there is not one for each class.
        """
        if self.weight is None:
            return table.sums.new_ones(table.classes)
        if self.weight.dim() > 0 and self.weight.shape != (table.classes,):
            raise ValueError(
                f"{self._name}: weight is {tuple(self.weight.shape)}; give a factor for each of {table.classes} classes"
            )
        return self.weight.to(table.sums).expand(table.classes)


def ratio(total: Tensor, count: Tensor) -> Tensor:
    """total / count; NaN with gradient 0 where nothing is counted, as in torch's cross entropy."""
    if count.numel() == 1 and is_torchs(count) and count.item() != 0:
        return total / count
    some = count != 0
    return torch.where(some, total / torch.where(some, count, 1.0), torch.nan)


class CrossEntropy(Term):
    """As ``torch.nn.CrossEntropyLoss``, of classes or probabilities; see ``UpsampleCrossEntropyLoss`` for "none".

    Args:
        weight: (C,), a factor for each class.
        ignore_index: label of pixels that do not count; None means that of ``UpsampleLoss``.
        label_smoothing: in [0, 1].
        reduction: "mean" (over the weights of the pixels that count) or "sum".

    Raises:
        ValueError: ``label_smoothing`` is outside [0, 1], the reduction is unknown, or weights are not one a class.
    """

    additive = True  # the sums are added up: those of each image are as good as the batch's

    def __init__(
        self, weight: ClassWeights = None, ignore_index: int | None = None, label_smoothing: float = 0.0,
        reduction: str = "mean",
    ):  # fmt: skip
        super().__init__(ignore_index, SOFTMAX, weight)
        self.label_smoothing, self.reduction = _share(self._name, label_smoothing), _reduction(self._name, reduction)

    def columns(self) -> Sequence[Column]:
        smooth = [Column("all")] if self.label_smoothing > 0 else []
        return [Column("nll"), Column("target"), Column("count"), *smooth]

    def alone(self, logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool) -> Tensor | None:
        """The loss of classes in one walk forward; None where only sums give it."""
        if target.is_floating_point() or target.dtype == torch.bool or type(self).value is not CrossEntropy.value:
            return None
        if self.weight is not None and (self.weight.shape != logits.shape[1:2] or self.weight.requires_grad):
            return None
        if target.dim() == logits.dim() and target.shape[1] == 1:
            target = target[:, 0]
        if target.dim() != logits.dim() - 1:
            return None
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) if logits.is_floating_point() else logits
        return upsample_cross_entropy(
            wide, target, self.weight, ignore_index, self.reduction, self.label_smoothing, align_corners=align_corners
        )

    def value(self, table: Table) -> Tensor:
        weight, smoothing = self.factors(table), self.label_smoothing
        total = (1 - smoothing) * (weight * table("nll")).sum()
        if smoothing > 0:
            total = total + smoothing / table.classes * (weight * table("all")).sum()
        if self.reduction == "sum":
            return total
        # torch divides by the number of pixels where targets are probabilities
        return ratio(total, table("count")[:, 0].sum() if table.probabilities else (weight * table("target")).sum())


class BinaryCrossEntropy(Term):
    """As ``torch.nn.BCEWithLogitsLoss``, of one channel or several, and with labels that do not count.

    Args:
        weight: (C,), a factor for each channel.
        ignore_index: label of pixels that do not count; None means that of ``UpsampleLoss``.
        pos_weight: (C,), a factor for the positive labels of each channel.
        label_smoothing: in [0, 1]; labels 0 and 1 become s / 2 and 1 - s / 2.
        reduction: "mean" (over the labels that count) or "sum".

    Raises:
        ValueError: ``label_smoothing`` is outside [0, 1], the reduction is unknown, or weights are not one a channel.
    """

    additive = True  # the sums are added up: those of each image are as good as the batch's

    def __init__(
        self, weight: ClassWeights = None, ignore_index: int | None = None, pos_weight: ClassWeights = None,
        label_smoothing: float = 0.0, reduction: str = "mean",
    ):  # fmt: skip
        super().__init__(ignore_index, SIGMOID, weight)
        self.label_smoothing, self.reduction = _share(self._name, label_smoothing), _reduction(self._name, reduction)
        self.pos_weight: Tensor | None
        self.register_buffer("pos_weight", None if pos_weight is None else torch.as_tensor(pos_weight).float())

    def columns(self) -> Sequence[Column]:
        plain = self.pos_weight is None and not self.label_smoothing
        return [*([Column("bce")] if plain else bce_columns(self.label_smoothing)), Column("count")]

    def alone(self, logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool) -> Tensor | None:
        """The loss in one walk; None where only sums give it."""
        if self.label_smoothing or type(self).value is not BinaryCrossEntropy.value:
            return None
        pos = self.weight if self.pos_weight is None else self.pos_weight
        if self.weight is not None and self.pos_weight is not None:
            if self.weight.shape != self.pos_weight.shape:
                return None
            pos = self.weight * self.pos_weight
        loss = Alone(False, 0.0, pos, self.weight, ignore_index, self.reduction == "mean", align_corners)
        return upsample_loss_alone(logits, target, self.columns(), loss)

    def value(self, table: Table) -> Tensor:
        if self.pos_weight is None and not self.label_smoothing:
            pos, neg = table("bce"), 0.0
        else:
            pos, neg = bce_sums(table, self.label_smoothing / 2)
        if self.pos_weight is not None:
            if self.pos_weight.dim() > 0 and self.pos_weight.shape != (table.classes,):
                raise ValueError(
                    f"{self._name}: pos_weight is {tuple(self.pos_weight.shape)}; give a factor for each of "
                    f"{table.classes} channels"
                )
            pos = pos * self.pos_weight.to(pos)
        losses = pos + neg if isinstance(neg, Tensor) else pos
        total = (losses if self.weight is None else self.factors(table) * losses).sum()
        return total if self.reduction == "sum" else ratio(total, table("count").sum())


def bce_columns(smoothing: float | None) -> list[Column]:
    """The sums that ``bce_sums`` reads."""
    return [Column(kind) for kind in ("pos", "neg", *(("pos_flip", "neg_flip") if smoothing else ()))]


def bce_sums(table: Table, smoothing: float | None) -> tuple[Tensor, Tensor]:
    """Sums of y log(1 + exp -v) and (1 - y) log(1 + exp v) for labels y that keep 1 - smoothing of themselves."""
    pos, neg = table("pos"), table("neg")
    if not smoothing:
        return pos, neg
    pos = (1 - smoothing) * pos + smoothing * table("neg_flip")
    return pos, (1 - smoothing) * neg + smoothing * table("pos_flip")


class Focal(Term):
    """The focal loss, ``-alpha (1 - p)^gamma log p``, of Lin et al., arXiv:1708.02002.

    Args:
        gamma: how much sure pixels lose; 0 is cross entropy.
        alpha: with "sigmoid" a factor of positive labels, 1 - alpha of negative ones.
        ignore_index: label of pixels that do not count; None means that of ``UpsampleLoss``.
        activation: "softmax" (of the class of each pixel) or "sigmoid" (of all classes, labels 0 and 1).
        weight: (C,), a factor for each class.
        reduction: "mean" (over the pixels that count, with "sigmoid" over the labels) or "sum".

    Raises:
        ValueError: gamma is negative, alpha is given with softmax, or the reduction is unknown.
    """

    additive = True  # the sums are added up: those of each image are as good as the batch's

    def __init__(
        self, gamma: float = 2.0, alpha: float | None = None, ignore_index: int | None = None,
        activation: str = SOFTMAX, weight: ClassWeights = None, reduction: str = "mean",
    ):  # fmt: skip
        super().__init__(ignore_index, activation, weight)
        if gamma < 0:
            raise ValueError(f"{self._name}: gamma is {gamma}; it must not be negative")
        if alpha is not None and activation == SOFTMAX:
            raise ValueError(f"{self._name}: alpha is of sigmoid; give weight, a factor for each class")
        self.gamma, self.alpha, self.reduction = float(gamma), alpha, _reduction(self._name, reduction)

    def columns(self) -> Sequence[Column]:
        kinds = ("focal",) if self.activation == SOFTMAX else ("focal_pos", "focal_neg")
        return [*(Column(kind, self.gamma) for kind in kinds), Column("count")]

    def alone(self, logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool) -> Tensor | None:
        """The loss in one walk; None where only sums give it."""
        if type(self).value is not Focal.value or logits.dim() != 4:
            return None
        softmax, pos, neg = self.activation == SOFTMAX, self.weight, self.weight
        if self.alpha is not None:
            one = logits.new_ones(logits.shape[1]) if self.weight is None else self.weight
            pos, neg = self.alpha * one, (1 - self.alpha) * one
        loss = Alone(softmax, self.gamma, pos, neg, ignore_index, self.reduction == "mean", align_corners)
        return upsample_loss_alone(logits, target, self.columns(), loss)

    def value(self, table: Table) -> Tensor:
        if self.activation == SOFTMAX:
            losses, count = table("focal", self.gamma), table("count")[:, 0].sum()
        else:
            alpha, other = (1.0, 1.0) if self.alpha is None else (self.alpha, 1 - self.alpha)
            losses = alpha * table("focal_pos", self.gamma) + other * table("focal_neg", self.gamma)
            count = table("count").sum()
        total = (losses if self.weight is None else self.factors(table) * losses).sum()
        return total if self.reduction == "sum" else ratio(total, count)


class Both(Term):
    """A weighted sum of losses, for a library's class that is one."""

    label_error = RuntimeError

    def __init__(self, *terms: tuple[float, Term]):
        super().__init__()
        self.weights, self.losses = [weight for weight, _ in terms], nn.ModuleList(term for _, term in terms)

    def terms(self, logits: Tensor) -> list[tuple[float, Term]]:
        """What ``upsample_loss`` computes in place of this one."""
        return list(zip(self.weights, self.losses, strict=True))


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: label_smoothing is {value}; it must lie in [0, 1]")
    return float(value)


def _reduction(name: str, value: str) -> str:
    if value not in ("mean", "sum"):
        raise ValueError(f'{name}: reduction is {value!r}; use "mean" or "sum"')
    return value
