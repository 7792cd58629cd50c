"""The losses of MONAI (1.6) by their names, arguments and values, on small logits.

``loss(input, target)`` equals the library's ``loss(interpolate(input, target.shape[-2:], mode="bilinear"), target)``,
and is a term of ``fastseg.nn.UpsampleLoss`` too. The target is (N, 1, H, W) of class indices with ``to_onehot_y``, or
(N, C, H, W). Volumes (N, C, d, h, w) are interpolated trilinearly, and their targets have a depth too. Logits are
needed: one of ``sigmoid`` and ``softmax`` is True. ``FocalLoss`` sums in fp32 there, here as the other losses; its
``reduction="none"``, a map for each class, is refused.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastseg.losses.regions import size_weights
from fastseg.losses.terms import BinaryCrossEntropy, Both, CrossEntropy, Term
from fastseg.ops.core.labels import equal
from fastseg.ops.core.loss_columns import SIGMOID, SOFTMAX, Column, Table

Weight = Sequence[float] | float | int | Tensor | None


class _OneHot(Term):
    """A loss with MONAI's targets: class indices to be made one-hot, or labels of each class."""

    label_error = RuntimeError  # of torch's scatter_
    shape_error: type[Exception] = AssertionError

    def __init__(
        self, include_background: bool, to_onehot_y: bool, activation: str, reduction: str, ignore_index: int | None
    ):
        super().__init__(ignore_index, activation)
        self.include_background, self.to_onehot_y = include_background, to_onehot_y
        reduction = getattr(reduction, "value", reduction)
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f'{self._name}: {reduction!r} is no reduction; use "mean", "sum" or "none"')
        self.reduction, self.ignores = reduction, ignore_index is not None

    def labels(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        C = logits.shape[1]
        if target.dim() != logits.dim() or target.shape[1] not in (1, C):
            raise self.shape_error(f"ground truth has different shape ({target.shape}) from input ({logits.shape})")
        if C > 1 and self.to_onehot_y:
            if target.shape[1] != 1:
                raise AssertionError("labels should have a channel with length equal to one.")
            return target[:, 0].long() if target.is_floating_point() else target[:, 0], None
        if target.shape[1] != C:
            raise self.shape_error(f"ground truth has different shape ({target.shape}) from input ({logits.shape})")
        return self._of_each_class(target)

    def _of_each_class(self, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Labels of each class, with a mask of the pixels of the ignored class, or of none, if that is no class."""
        C = target.shape[1]
        if self.ignore_index is None:
            return target, None
        if C == 1:
            mask = ~equal(target[:, 0], self.ignore_index)
        elif 0 <= self.ignore_index < C:
            mask = target[:, self.ignore_index] == 0
        else:
            mask = target.sum(1) > 0
        kind = target.dtype if target.is_floating_point() else torch.float32
        return target.where(mask[:, None], 0) if C == 1 else target, mask.to(kind)

    def parts(self, table: Table, *kinds: str) -> list[Tensor]:
        """Columns (N, C), without the background where it is left out."""
        first = 0 if self.include_background or table.classes == 1 else 1
        return [table(kind)[:, first:] for kind in kinds]

    def reduced(self, f: Tensor) -> Tensor:
        return f.mean() if self.reduction == "mean" else f.sum() if self.reduction == "sum" else f


def _activation(name: str, sigmoid: bool, softmax: bool, other_act: Callable | None) -> str:
    if other_act is not None and not callable(other_act):
        raise TypeError(f"other_act must be None or callable but is {type(other_act).__name__}.")
    if int(sigmoid) + int(softmax) + int(other_act is not None) > 1:
        raise ValueError("Incompatible values: more than 1 of [sigmoid=True, softmax=True, other_act is not None].")
    if not sigmoid and not softmax:
        raise ValueError(f"{name}: set sigmoid=True or softmax=True; upsampled probabilities need no fused loss")
    return SIGMOID if sigmoid else SOFTMAX


class _Region(_OneHot):
    """What ``DiceLoss``, ``GeneralizedDiceLoss`` and ``TverskyLoss`` share."""

    def __init__(
        self, include_background: bool, to_onehot_y: bool, sigmoid: bool, softmax: bool, other_act: Callable | None,
        reduction: str, smooth_nr: float, smooth_dr: float, batch: bool, soft_label: bool, ignore_index: int | None,
    ):  # fmt: skip
        activation = _activation(self._name, sigmoid, softmax, other_act)
        super().__init__(include_background, to_onehot_y, activation, reduction, ignore_index)
        self.sigmoid, self.softmax, self.other_act = sigmoid, softmax, other_act
        self.smooth_nr, self.smooth_dr = float(smooth_nr), float(smooth_dr)
        self.batch, self.soft_label, self.per_image = batch, soft_label, not batch

    def columns(self) -> Sequence[Column]:
        return [Column("least" if self.soft_label else "inter"), Column("prob"), Column("target")]

    def overlap(self, table: Table) -> tuple[Tensor, Tensor, Tensor]:
        """Sums (N, C) of true positives, false positives and false negatives."""
        tp, p, y = self.parts(table, *(column.kind for column in self.columns()[:3]))
        return tp, p - tp, y - tp


def _spread(f: Tensor, table: Table, batch: bool) -> Tensor:
    """Losses (N, C), or of the batch (C,), with an axis of length 1 for each of an image's."""
    f = f[0] if batch else f
    return f[(..., *(None,) * table.axes)]


class DiceLoss(_Region):
    """``monai.losses.DiceLoss``."""

    def __init__(
        self, include_background: bool = True, to_onehot_y: bool = False, sigmoid: bool = False,
        softmax: bool = False, other_act: Callable | None = None, squared_pred: bool = False, jaccard: bool = False,
        reduction: str = "mean", smooth_nr: float = 1e-5, smooth_dr: float = 1e-5, batch: bool = False,
        weight: Weight = None, soft_label: bool = False, ignore_index: int | None = None,
    ):  # fmt: skip
        super().__init__(include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, smooth_nr, smooth_dr,
                         batch, soft_label, ignore_index)  # fmt: skip
        self.squared_pred, self.jaccard = squared_pred, jaccard
        self.register_buffer("class_weight", None if weight is None else torch.as_tensor(weight))

    def columns(self) -> Sequence[Column]:
        if self.squared_pred:
            return [Column("inter"), Column("square"), Column("target_square")]
        return super().columns()

    def value(self, table: Table) -> Tensor:
        tp, fp, fn = self.overlap(table)
        if not self.jaccard:
            fp, fn = 0.5 * fp, 0.5 * fn
        f = 1 - (2 * tp + self.smooth_nr) / (2 * (tp + fp + fn) + self.smooth_dr)
        if self.class_weight is not None and f.shape[1] != 1:
            if self.class_weight.dim() > 0 and self.class_weight.shape[0] != f.shape[1]:
                raise ValueError(
                    "The length of the `weight` sequence should be the same as the number of classes. "
                    "If `include_background=False`, the weight should not include the background category class 0."
                )
            if self.class_weight.min() < 0:
                raise ValueError("the value/values of the `weight` should be no less than 0.")
            f = f * self.class_weight.to(f)
        if self.reduction == "none":
            return _spread(f, table, self.batch)
        return self.reduced(f)


class TverskyLoss(_Region):
    """``monai.losses.TverskyLoss``."""

    def __init__(
        self, include_background: bool = True, to_onehot_y: bool = False, sigmoid: bool = False,
        softmax: bool = False, other_act: Callable | None = None, alpha: float = 0.5, beta: float = 0.5,
        reduction: str = "mean", smooth_nr: float = 1e-5, smooth_dr: float = 1e-5, batch: bool = False,
        soft_label: bool = False, ignore_index: int | None = None,
    ):  # fmt: skip
        super().__init__(include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, smooth_nr, smooth_dr,
                         batch, soft_label, ignore_index)  # fmt: skip
        self.alpha, self.beta = alpha, beta

    def value(self, table: Table) -> Tensor:
        tp, fp, fn = self.overlap(table)
        f = 1 - (tp + self.smooth_nr) / (tp + self.alpha * fp + self.beta * fn + self.smooth_dr)
        return self.reduced(f[0] if self.batch else f)


class GeneralizedDiceLoss(_Region):
    """``monai.losses.GeneralizedDiceLoss``."""

    def __init__(
        self, include_background: bool = True, to_onehot_y: bool = False, sigmoid: bool = False,
        softmax: bool = False, other_act: Callable | None = None, w_type: str = "square", reduction: str = "mean",
        smooth_nr: float = 1e-5, smooth_dr: float = 1e-5, batch: bool = False, soft_label: bool = False,
    ):  # fmt: skip
        super().__init__(include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, smooth_nr, smooth_dr,
                         batch, soft_label, None)  # fmt: skip
        self.w_type = getattr(w_type, "value", w_type)
        if self.w_type not in ("square", "simple", "uniform"):
            raise ValueError(f'{self._name}: w_type is {w_type!r}; use "square", "simple" or "uniform"')

    def value(self, table: Table) -> Tensor:
        tp, fp, fn = self.overlap(table)
        w = size_weights(self.parts(table, "target")[0].float(), self.w_type)  # in fp32, as the library has them
        numer = 2.0 * (tp * w).sum(1, keepdim=True) + self.smooth_nr
        f = 1.0 - numer / ((2 * (tp + 0.5 * fp + 0.5 * fn) * w).sum(1, keepdim=True) + self.smooth_dr)
        if self.reduction == "none":
            return _spread(f, table, self.batch)
        return self.reduced(f)


class FocalLoss(_OneHot):
    """``monai.losses.FocalLoss``; labels are 0 and 1."""

    shape_error = ValueError

    def __init__(
        self, include_background: bool = True, to_onehot_y: bool = False, gamma: float = 2.0,
        alpha: float | Sequence[float] | None = None, weight: Weight = None, reduction: str = "mean",
        use_softmax: bool = False, ignore_index: int | None = None,
    ):  # fmt: skip
        super().__init__(include_background, to_onehot_y, SOFTMAX if use_softmax else SIGMOID, reduction, ignore_index)
        if self.reduction == "none":
            raise ValueError(f'{self._name}: reduction is "none", a map for each class; use "mean" or "sum"')
        self.gamma, self.use_softmax = float(gamma), use_softmax
        self.alpha = alpha if alpha is None or isinstance(alpha, (int, float)) else torch.as_tensor(alpha)
        self.per_image = True
        self.register_buffer("class_weight", None if weight is None else torch.as_tensor(weight))

    def columns(self) -> Sequence[Column]:
        kinds = ("focal",) if self.use_softmax else ("focal_pos", "focal_neg")
        return [*(Column(kind, self.gamma) for kind in kinds), Column("count")]

    def inputs(self, logits: Tensor) -> Tensor:
        """The library leaves the background out before its softmax."""
        left_out = self.use_softmax and not self.include_background and logits.shape[1] > 1
        return logits[:, 1:] if left_out else logits

    def labels(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        target, mask = super().labels(logits, target)
        if self.inputs(logits) is logits:
            return target, mask
        if target.dim() == logits.dim():
            return target[:, 1:], mask
        counts = torch.ones_like(target, dtype=torch.bool)
        if self.ignore_index is not None:
            counts = ~equal(target, self.ignore_index)
        one_hot = logits.new_zeros(target.shape[0], logits.shape[1], *target.shape[1:])
        one_hot = one_hot.scatter_(1, target.long().where(counts, 0)[:, None], 1.0)[:, 1:]
        return one_hot, counts.to(logits.dtype)

    def value(self, table: Table) -> Tensor:
        first = 0 if self.include_background or table.classes == 1 or self.use_softmax else 1
        of = lambda kind: table(kind, self.gamma)[:, first:]
        alpha = self.alpha
        if self.use_softmax:
            loss = of("focal")
            if isinstance(alpha, Tensor):
                loss = self._alphas(alpha, loss) * loss
            elif alpha is not None and self.include_background:
                loss = loss * torch.tensor([1 - alpha] + [alpha] * (loss.shape[1] - 1)).to(loss)
        else:
            pos, neg = of("focal_pos"), of("focal_neg")
            if isinstance(alpha, Tensor):
                pos = self._alphas(alpha, pos) * pos
            elif alpha is not None:
                pos, neg = alpha * pos, (1 - alpha) * neg
            loss = pos + neg
        if self.class_weight is not None:
            loss = loss * self._weights(loss)
        pixels = float(table.pixels)
        if self.ignore_index is None:
            if self.reduction == "mean":
                return loss.sum() / (loss.shape[0] * loss.shape[1] * pixels)
            return (loss / pixels).sum()
        count, least = table("count")[:, 0], torch.finfo(torch.float32).eps
        if self.reduction == "mean":
            return loss.sum() / count.sum().clamp_min(least)
        return (loss / count[:, None].clamp_min(least)).sum()

    def _alphas(self, alpha: Tensor, loss: Tensor) -> Tensor:
        if alpha.shape[0] != loss.shape[1]:
            raise ValueError(
                f"The length of alpha ({alpha.shape[0]}) must match the number of classes ({loss.shape[1]})."
            )
        return alpha.to(loss)

    def _weights(self, loss: Tensor) -> Tensor:
        weight, C = self.class_weight.to(loss), loss.shape[1]
        if weight.dim() > 0 and C == 1:
            raise ValueError("Per-class class_weight is not supported for single-channel outputs.")
        if weight.dim() > 0 and weight.numel() != C:
            raise ValueError(
                f"The number of class_weight ({weight.numel()}) must match the number of output channels ({C})."
            )
        if (weight < 0).any():
            raise ValueError("class_weight values must be non-negative.")
        return weight


def _checked(name: str, value: float) -> float:
    if value < 0.0:
        raise ValueError(f"{name} should be no less than 0.0.")
    return value


class _CrossEntropy(CrossEntropy):
    """Cross entropy of MONAI's targets."""

    def labels(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        _same_dims(logits, target)
        if target.shape[1] == 1:
            return target[:, 0].long() if target.is_floating_point() else target[:, 0], None
        return target.to(logits.dtype), None


def _same_dims(logits: Tensor, target: Tensor) -> None:
    if target.dim() != logits.dim():
        raise ValueError(
            "the number of dimensions for input and target should be the same, "
            f"got shape {logits.shape} (nb dims: {logits.dim()}) and {target.shape} (nb dims: {target.dim()}). "
            "if target is not one-hot encoded, please provide a tensor with shape B1H[WD]."
        )
    if target.shape[1] not in (1, logits.shape[1]):
        raise ValueError(
            "number of channels for target is neither 1 (without one-hot encoding) nor the same as input, "
            f"got shape {logits.shape} and {target.shape}."
        )


class DiceCELoss(Both):
    """``monai.losses.DiceCELoss``; of one channel, binary cross entropy, with ``weight`` for the positive labels."""

    def __init__(
        self, include_background: bool = True, to_onehot_y: bool = False, sigmoid: bool = False,
        softmax: bool = False, other_act: Callable | None = None, squared_pred: bool = False, jaccard: bool = False,
        reduction: str = "mean", smooth_nr: float = 1e-5, smooth_dr: float = 1e-5, batch: bool = False,
        weight: Tensor | None = None, lambda_dice: float = 1.0, lambda_ce: float = 1.0, label_smoothing: float = 0.0,
    ):  # fmt: skip
        dice_weight = weight[1:] if weight is not None and not include_background else weight
        dice = DiceLoss(include_background, to_onehot_y, sigmoid, softmax, other_act, squared_pred, jaccard, reduction,
                        smooth_nr, smooth_dr, batch, dice_weight)  # fmt: skip
        reduction = getattr(reduction, "value", reduction)
        entropy = _CrossEntropy(weight, -100, label_smoothing, reduction)
        super().__init__((_checked("lambda_dice", lambda_dice), dice), (_checked("lambda_ce", lambda_ce), entropy))
        self.binary = BinaryCrossEntropy(None, None, weight, reduction=reduction)
        self.binary.ignores = False

    def terms(self, logits: Tensor) -> list[tuple[float, Term]]:
        dice, entropy = super().terms(logits)
        return [dice, (entropy[0], self.binary) if logits.shape[1] == 1 else entropy]


class DiceFocalLoss(Both):
    """``monai.losses.DiceFocalLoss``."""

    def __init__(
        self, include_background: bool = True, to_onehot_y: bool = False, sigmoid: bool = False,
        softmax: bool = False, other_act: Callable | None = None, squared_pred: bool = False, jaccard: bool = False,
        reduction: str = "mean", smooth_nr: float = 1e-5, smooth_dr: float = 1e-5, batch: bool = False,
        gamma: float = 2.0, weight: Weight = None, lambda_dice: float = 1.0, lambda_focal: float = 1.0,
        alpha: float | None = None,
    ):  # fmt: skip
        dice = DiceLoss(include_background, to_onehot_y, sigmoid, softmax, other_act, squared_pred, jaccard, reduction,
                        smooth_nr, smooth_dr, batch, weight)  # fmt: skip
        focal = FocalLoss(include_background, to_onehot_y, gamma, alpha, weight, reduction)
        super().__init__((_checked("lambda_dice", lambda_dice), dice), (_checked("lambda_focal", lambda_focal), focal))


class GeneralizedDiceFocalLoss(Both):
    """``monai.losses.GeneralizedDiceFocalLoss``."""

    def __init__(
        self, include_background: bool = True, to_onehot_y: bool = False, sigmoid: bool = False,
        softmax: bool = False, other_act: Callable | None = None, w_type: str = "square", reduction: str = "mean",
        smooth_nr: float = 1e-5, smooth_dr: float = 1e-5, batch: bool = False, gamma: float = 2.0,
        weight: Weight = None, lambda_gdl: float = 1.0, lambda_focal: float = 1.0,
    ):  # fmt: skip
        dice = GeneralizedDiceLoss(include_background, to_onehot_y, sigmoid, softmax, other_act, w_type, reduction,
                                   smooth_nr, smooth_dr, batch)  # fmt: skip
        focal = FocalLoss(include_background, to_onehot_y, gamma, None, weight, reduction)
        super().__init__((_checked("lambda_gdl", lambda_gdl), dice), (_checked("lambda_focal", lambda_focal), focal))
