"""The losses of segmentation_models_pytorch (0.5, 0.6) by their names, arguments and values, on small logits.

``loss(y_pred, y_true)`` equals the library's ``loss(interpolate(y_pred, y_true.shape[-2:], mode="bilinear"), y_true)``,
and is a term of ``fastseg.nn.UpsampleLoss`` too. Logits are needed: ``from_logits=False`` is refused.
``LovaszLoss`` sorts all pixels, and ``MCCLoss`` takes probabilities: neither is here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg.losses.terms import Term, bce_columns, bce_sums, ratio
from fastseg.ops.core.loss_columns import SIGMOID, SOFTMAX, Column, Table

BINARY_MODE, MULTICLASS_MODE, MULTILABEL_MODE = "binary", "multiclass", "multilabel"
MODES = (BINARY_MODE, MULTICLASS_MODE, MULTILABEL_MODE)


class _Moded(Term):
    """A loss with a mode: which labels there are."""

    label_error = RuntimeError  # of torch's one_hot

    def __init__(
        self, mode: str, from_logits: bool, ignore_index: int | None, class_weights: Sequence[float] | None,
        activation: str,
    ):  # fmt: skip
        super().__init__(ignore_index, activation)
        if mode not in MODES:
            raise AssertionError(f"{self._name}: mode is {mode!r}; use one of {', '.join(MODES)}")
        if not from_logits:
            raise ValueError(f"{self._name}: from_logits is False; upsampled probabilities need no fused loss")
        if class_weights is not None and mode == BINARY_MODE:
            raise ValueError("class_weights are not supported with mode=binary")
        self.mode, self.from_logits, self.ignores = mode, from_logits, ignore_index is not None
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float)
        self.register_buffer("class_weights", weights, persistent=False)

    def labels(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        if target.shape[0] != logits.shape[0]:
            raise AssertionError(f"{self._name}: {logits.shape[0]} images of logits and {target.shape[0]} of labels")
        if self.mode == MULTICLASS_MODE:
            target = target[:, 0] if target.dim() == logits.dim() and target.shape[1] == 1 else target
            return target.long() if target.is_floating_point() else target, None
        if self.mode == BINARY_MODE and target.dim() == logits.dim() - 1:
            target = target[:, None]
        return target, None

    def mean(self, loss: Tensor, classes: Tensor | None = None) -> Tensor:
        """The mean of losses (C,) of classes, over the class weights if there are any."""
        weights = self.class_weights
        if weights is None:
            return loss.mean()
        weights = weights.to(loss)
        weights = weights if classes is None else weights[classes]
        return (loss * weights).sum() / weights.sum()


class _Overlap(_Moded):
    """Tversky's fraction over the batch, as all three have it."""

    def __init__(
        self, mode: str, classes: Sequence[int] | None, log_loss: bool, from_logits: bool, smooth: float,
        ignore_index: int | None, eps: float, class_weights: Sequence[float] | None, alpha: float, beta: float,
    ):  # fmt: skip
        activation = SOFTMAX if mode == MULTICLASS_MODE else SIGMOID
        super().__init__(mode, from_logits, ignore_index, class_weights, activation)
        if classes is not None and mode == BINARY_MODE:
            raise AssertionError("Masking classes is not supported with mode=binary")
        self.classes = None if classes is None else torch.as_tensor(classes, dtype=torch.long)
        self.log_loss, self.smooth, self.eps, self.alpha, self.beta = log_loss, smooth, eps, alpha, beta

    def columns(self) -> Sequence[Column]:
        return [Column("least"), Column("prob"), Column("target")]

    def value(self, table: Table) -> Tensor:
        inter, p, y = (table(kind)[0] for kind in ("least", "prob", "target"))
        bottom = inter + self.alpha * (p - inter) + self.beta * (y - inter) + self.smooth
        score = (inter + self.smooth) / bottom.clamp_min(self.eps)
        loss = -score.clamp_min(self.eps).log() if self.log_loss else 1.0 - score
        loss = loss * (y > 0)
        if self.classes is None:
            return self.mean(loss)
        classes = self.classes.to(loss.device)
        return self.mean(loss[classes], classes)


class DiceLoss(_Overlap):
    """``segmentation_models_pytorch.losses.DiceLoss``: classes without a label count as 0."""

    def __init__(
        self, mode: str, classes: Sequence[int] | None = None, log_loss: bool = False, from_logits: bool = True,
        smooth: float = 0.0, ignore_index: int | None = None, eps: float = 1e-7,
        class_weights: Sequence[float] | None = None,
    ):  # fmt: skip
        super().__init__(mode, classes, log_loss, from_logits, smooth, ignore_index, eps, class_weights, 0.5, 0.5)


class JaccardLoss(_Overlap):
    """``segmentation_models_pytorch.losses.JaccardLoss``."""

    def __init__(
        self, mode: str, classes: Sequence[int] | None = None, log_loss: bool = False, from_logits: bool = True,
        smooth: float = 0.0, ignore_index: int | None = None, eps: float = 1e-7,
        class_weights: Sequence[float] | None = None,
    ):  # fmt: skip
        super().__init__(mode, classes, log_loss, from_logits, smooth, ignore_index, eps, class_weights, 1.0, 1.0)


class TverskyLoss(_Overlap):
    """``segmentation_models_pytorch.losses.TverskyLoss``: gamma is the power of the mean."""

    def __init__(
        self, mode: str, classes: Sequence[int] | None = None, log_loss: bool = False, from_logits: bool = True,
        smooth: float = 0.0, ignore_index: int | None = None, eps: float = 1e-7, alpha: float = 0.5,
        beta: float = 0.5, gamma: float = 1.0, class_weights: Sequence[float] | None = None,
    ):  # fmt: skip
        super().__init__(mode, classes, log_loss, from_logits, smooth, ignore_index, eps, class_weights, alpha, beta)
        self.gamma = gamma

    def mean(self, loss: Tensor, classes: Tensor | None = None) -> Tensor:
        return super().mean(loss, classes) ** self.gamma


class FocalLoss(_Moded):
    """``segmentation_models_pytorch.losses.FocalLoss``: one sigmoid for each class, in every mode.

    Labels are 0 and 1; the library's value for probabilities between them is not a function of sums.
    """

    norm_eps = 1e-6  # the least of what "normalized" divides by

    def __init__(
        self, mode: str, alpha: float | None = None, gamma: float | None = 2.0, ignore_index: int | None = None,
        from_logits: bool = True, eps: float = 1e-7, reduction: str | None = "mean", normalized: bool = False,
        reduced_threshold: float | None = None, class_weights: Sequence[float] | None = None,
    ):  # fmt: skip
        super().__init__(mode, from_logits, ignore_index, class_weights, SIGMOID)
        if reduction not in ("mean", "sum", "batchwise_mean"):
            raise ValueError(f'{self._name}: reduction is {reduction!r}; use "mean", "sum" or "batchwise_mean"')
        self.alpha, self.gamma, self.eps, self.reduction = alpha, float(gamma), eps, reduction
        self.normalized, self.reduced_threshold = normalized, reduced_threshold

    def columns(self) -> Sequence[Column]:
        kinds = ("focal_pos", "focal_neg", *(("factor_pos", "factor_neg") if self.normalized else ()))
        return [*(Column(kind, self.gamma, self.reduced_threshold or 0.0) for kind in kinds), Column("count")]

    def value(self, table: Table) -> Tensor:
        of = lambda kind: table(kind, self.gamma, self.reduced_threshold or 0.0)[0]
        alpha, other = (1.0, 1.0) if self.alpha is None else (self.alpha, 1 - self.alpha)
        loss = alpha * of("focal_pos") + other * of("focal_neg")
        if self.normalized:
            loss = loss / (of("factor_pos") + of("factor_neg")).clamp_min(self.norm_eps)
        if self.reduction == "mean":
            loss = ratio(loss, table("count")[0])
        elif self.reduction == "batchwise_mean" and self.mode != BINARY_MODE and self.ignore_index is None:
            loss = loss / table.pixels  # the library's mean over the map of the batch's sums
        return loss.sum() if self.mode == BINARY_MODE else self.mean(loss)


class SoftBCEWithLogitsLoss(Term):
    """``segmentation_models_pytorch.losses.SoftBCEWithLogitsLoss``: its mean is over ignored pixels too.

    ``weight`` and ``pos_weight`` are one number, or one for each class, of shape (C, 1, 1).
    """

    def __init__(
        self, weight: Tensor | None = None, ignore_index: int | None = -100, reduction: str = "mean",
        smooth_factor: float | None = None, pos_weight: Tensor | None = None,
    ):  # fmt: skip
        super().__init__(ignore_index, SIGMOID, weight)
        if reduction not in ("mean", "sum"):
            raise ValueError(f'{self._name}: reduction is {reduction!r}; use "mean" or "sum"')
        self.ignores, self.reduction, self.smooth_factor = ignore_index is not None, reduction, smooth_factor
        self.register_buffer("pos_weight", pos_weight)

    def columns(self) -> Sequence[Column]:
        return bce_columns(self.smooth_factor)

    def labels(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        if target.dim() == logits.dim() - 1 and logits.shape[1] == 1:
            target = target[:, None]
        if target.shape[:2] != logits.shape[:2]:
            raise ValueError(
                f"Target size ({target.shape}) must be the same as input size ({logits.shape}) but for height and width"
            )
        return target, None

    def value(self, table: Table) -> Tensor:
        pos, neg = bce_sums(table, self.smooth_factor)
        if self.pos_weight is not None:
            pos = pos * each_class(self._name, "pos_weight", self.pos_weight, table)
        total = pos + neg
        if self.weight is not None:
            total = total * each_class(self._name, "weight", self.weight, table)
        return total.sum() / (table.images * table.classes * table.pixels if self.reduction == "mean" else 1)


class SoftCrossEntropyLoss(Term):
    """``segmentation_models_pytorch.losses.SoftCrossEntropyLoss``: its mean is over ignored pixels too."""

    def __init__(
        self, reduction: str = "mean", smooth_factor: float | None = None, ignore_index: int | None = -100,
        dim: int = 1,
    ):  # fmt: skip
        super().__init__(ignore_index)
        if reduction not in ("mean", "sum") or dim != 1:
            raise ValueError(f'{self._name}: reduction is {reduction!r}, dim {dim}; use "mean" or "sum", and 1')
        self.ignores, self.reduction, self.smooth_factor, self.dim = (
            ignore_index is not None,
            reduction,
            smooth_factor,
            1,
        )

    def columns(self) -> Sequence[Column]:
        return [Column("nll"), *([Column("all")] if self.smooth_factor else [])]

    def value(self, table: Table) -> Tensor:
        smooth = self.smooth_factor or 0.0
        total = (1.0 - smooth) * table("nll").sum()
        if smooth:
            total = total + smooth / table.classes * table("all").sum()
        return total / (table.images * table.pixels if self.reduction == "mean" else 1)


def each_class(name: str, label: str, weight: Tensor, table: Table) -> Tensor:
    """A factor that is broadcast over (N, C, H, W) or (N, C, D, H, W) and the same for all pixels, as (C,)."""
    dims, ones = table.axes + 2, (1,) * table.axes
    shape = (1,) * (dims - weight.dim()) + tuple(weight.shape)
    if weight.dim() > dims or shape[0] != 1 or shape[2:] != ones or shape[1] not in (1, table.classes):
        raise ValueError(
            f"{name}: {label} is {tuple(weight.shape)}; give one number, or {(table.classes, *ones)}, a factor for "
            "each class"
        )
    return weight.to(table.sums).reshape(-1).expand(table.classes)


__all__ = [
    "BINARY_MODE",
    "MULTICLASS_MODE",
    "MULTILABEL_MODE",
    "DiceLoss",
    "FocalLoss",
    "JaccardLoss",
    "SoftBCEWithLogitsLoss",
    "SoftCrossEntropyLoss",
    "TverskyLoss",
]
