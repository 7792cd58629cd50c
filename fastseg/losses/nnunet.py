"""The losses of nnU-Net (nnunetv2 2.8) by their names, arguments and values, on small logits.

``loss(net_output, target)`` equals the library's loss of ``interpolate(net_output, target.shape[-2:],
mode="bilinear")``, and is a term of ``fastseg.nn.UpsampleLoss`` too. Targets are (N, 1, H, W) of class indices, also in
floating point, or labels of each class (N, C, H, W). Volumes (N, C, d, h, w) are interpolated trilinearly, and their
targets have a depth too. The library adds up in fp32; here it is fp64.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastseg.losses.hard_pixels import TopK
from fastseg.losses.smp import each_class
from fastseg.losses.terms import Both, CrossEntropy, Term, bce_columns, bce_sums
from fastseg.ops.core.loss_columns import SIGMOID, SOFTMAX, Column, Table
from fastseg.ops.upsample_loss import upsample_loss


def softmax_helper_dim1(x: Tensor) -> Tensor:
    """``torch.softmax(x, 1)``, for ``apply_nonlin``."""
    return torch.softmax(x, 1)


def _activation(name: str, apply_nonlin: Callable | None) -> str:
    function = getattr(apply_nonlin, "__name__", "")
    if function in ("softmax_helper_dim1", "softmax"):
        return SOFTMAX
    if function == "sigmoid":
        return SIGMOID
    raise ValueError(f"{name}: apply_nonlin is {apply_nonlin!r}; give softmax_helper_dim1 or torch.sigmoid")


def _indices(logits: Tensor, target: Tensor) -> Tensor:
    """Class indices, or labels of each class where the shapes say so."""
    channels = target.dim() == logits.dim()
    if channels and target.shape[1] == logits.shape[1] and logits.shape[1] > 1:
        return target
    target = target[:, 0] if channels else target
    return target.long() if target.is_floating_point() else target


class SoftDiceLoss(Term):
    """``nnunetv2.training.loss.dice.SoftDiceLoss``: minus the Dice score."""

    label_error = RuntimeError  # of torch's scatter_
    ignores = False

    def __init__(
        self, apply_nonlin: Callable | None = None, batch_dice: bool = False, do_bg: bool = True, smooth: float = 1.0,
        ddp: bool = True, clip_tp: float | None = None,
    ):  # fmt: skip
        super().__init__(activation=_activation(self._name, apply_nonlin))
        self.do_bg, self.batch_dice, self.apply_nonlin, self.smooth = do_bg, batch_dice, apply_nonlin, smooth
        self.ddp, self.clip_tp, self.per_image = ddp, clip_tp, not batch_dice
        self.across_processes = ddp and batch_dice

    def columns(self) -> list[Column]:
        return [Column("inter"), Column("prob"), Column("target")]

    def labels(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return (target if logits.shape[1] == 1 else _indices(logits, target)), None

    def value(self, table: Table) -> Tensor:
        tp, p, y = table("inter"), table("prob"), table("target")
        bottom = p + y
        if self.clip_tp is not None:
            bottom = bottom - 2 * tp
            tp = tp.clamp_min(self.clip_tp)
            bottom = bottom + 2 * tp
        dc = (2 * tp + self.smooth) / (bottom + self.smooth).clamp_min(1e-8)
        return -(dc if self.do_bg else dc[:, 1:]).mean()

    def forward(self, x: Tensor, y: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        """Logits, target, and a mask (N, 1, H, W) of the pixels that count -> the loss."""
        mask = None if loss_mask is None else loss_mask[:, 0].to(torch.promote_types(x.dtype, torch.float32))
        try:
            return upsample_loss(x, y, [(1.0, self)], pixel_weight=mask)
        except IndexError as error:
            raise self.label_error(str(error)) from None


class MemoryEfficientSoftDiceLoss(SoftDiceLoss):
    """``nnunetv2.training.loss.dice.MemoryEfficientSoftDiceLoss``: the same value."""

    def __init__(
        self, apply_nonlin: Callable | None = None, batch_dice: bool = False, do_bg: bool = True, smooth: float = 1.0,
        ddp: bool = True,
    ):  # fmt: skip
        super().__init__(apply_nonlin, batch_dice, do_bg, smooth, ddp)


class RobustCrossEntropyLoss(CrossEntropy):
    """``nnunetv2.training.loss.robust_ce_loss.RobustCrossEntropyLoss``: cross entropy of (N, 1, H, W) targets."""

    def __init__(
        self, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean",
        label_smoothing: float = 0.0,
    ):  # fmt: skip
        super().__init__(weight, ignore_index, label_smoothing, reduction)

    def labels(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        if target.dim() == logits.dim():
            assert target.shape[1] == 1
            target = target[:, 0]
        return target.long() if target.is_floating_point() else target, None


class TopKLoss(TopK):
    """``nnunetv2.training.loss.robust_ce_loss.TopKLoss``: of k percent of all pixels, ignored ones included."""

    def __init__(
        self, weight: Tensor | None = None, ignore_index: int = -100, k: float = 10, label_smoothing: float = 0
    ):
        super().__init__(1.0, weight, ignore_index, label_smoothing)
        self.k = k

    def direct(
        self, logits: Tensor, target: Tensor, ignore_index: int, pixel_weight: Tensor | None, align_corners: bool
    ) -> Tensor:
        """The loss; no function of sums."""
        target = target.long() if target.is_floating_point() else target
        return super().direct(logits, target, ignore_index, pixel_weight, align_corners)

    def selected(self, losses: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        return losses.flatten().topk(int(losses.numel() * self.k / 100), sorted=False).values.mean()


class _WhereCounted(RobustCrossEntropyLoss):
    """0 where no pixel counts."""

    def columns(self) -> list[Column]:
        return [*super().columns(), Column("count")]

    def value(self, table: Table) -> Tensor:
        return torch.where(table("count")[:, 0].sum() > 0, super().value(table), 0.0)


class _Masked(SoftDiceLoss):
    """The Dice loss inside a sum of losses: pixels of the ignored label do not count."""

    def __init__(self, dice: SoftDiceLoss, ignore_label: int | None):
        super().__init__(dice.apply_nonlin, dice.batch_dice, dice.do_bg, dice.smooth, dice.ddp, dice.clip_tp)
        self.ignore_index, self.ignores = ignore_label, ignore_label is not None


class DC_and_CE_loss(Both):
    """``nnunetv2.training.loss.compound_losses.DC_and_CE_loss``."""

    def __init__(
        self, soft_dice_kwargs: dict[str, Any], ce_kwargs: dict[str, Any], weight_ce: float = 1,
        weight_dice: float = 1, ignore_label: int | None = None, dice_class: type[SoftDiceLoss] = SoftDiceLoss,
    ):  # fmt: skip
        more = {} if ignore_label is None else {"ignore_index": ignore_label}
        ce_class = RobustCrossEntropyLoss if ignore_label is None else _WhereCounted
        self._sum(ce_class(**ce_kwargs | more), soft_dice_kwargs, weight_ce, weight_dice, ignore_label, dice_class)

    def _sum(self, ce: Term, soft_dice_kwargs, weight_ce, weight_dice, ignore_label, dice_class) -> None:
        dice = _Masked(dice_class(apply_nonlin=softmax_helper_dim1, **soft_dice_kwargs), ignore_label)
        parts = ((weight_ce, ce), (weight_dice, dice))
        super().__init__(*((float(weight), term) for weight, term in parts if weight != 0))
        self.weight_ce, self.weight_dice, self.ignore_label = weight_ce, weight_dice, ignore_label

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """Logits (N, C, h, w) and target (N, 1, H, W) -> the loss."""
        if self.ignore_label is not None and target.shape[1] != 1:
            raise AssertionError(f"ignore label is not implemented for one hot encoded target variables ({self._name})")
        return super().forward(net_output, target)


class DC_and_topk_loss(DC_and_CE_loss):
    """``nnunetv2.training.loss.compound_losses.DC_and_topk_loss``."""

    def __init__(
        self, soft_dice_kwargs: dict[str, Any], ce_kwargs: dict[str, Any], weight_ce: float = 1,
        weight_dice: float = 1, ignore_label: int | None = None,
    ):  # fmt: skip
        more = {} if ignore_label is None else {"ignore_index": ignore_label}
        self._sum(TopKLoss(**ce_kwargs | more), soft_dice_kwargs, weight_ce, weight_dice, ignore_label, SoftDiceLoss)


class _BinaryCrossEntropy(Term):
    """``BCEWithLogitsLoss`` inside ``DC_and_BCE_loss``; with a mask, over its pixels and not its labels."""

    ignores = False

    def __init__(
        self, masked: bool, weight: Tensor | None = None, reduction: str = "mean", pos_weight: Tensor | None = None
    ):
        super().__init__(activation=SIGMOID, weight=weight)
        if reduction not in ("mean", "sum") and not masked:
            raise ValueError(f'DC_and_BCE_loss: reduction is {reduction!r}; use "mean" or "sum"')
        self.masked, self.reduction = masked, reduction
        self.register_buffer("pos_weight", pos_weight)

    def columns(self) -> list[Column]:
        return [*bce_columns(None), Column("count")]

    def value(self, table: Table) -> Tensor:
        pos, neg = bce_sums(table, None)
        if self.pos_weight is not None:
            pos = pos * each_class("DC_and_BCE_loss", "pos_weight", self.pos_weight, table)
        total = pos + neg
        if self.weight is not None:
            total = total * each_class("DC_and_BCE_loss", "weight", self.weight, table)
        if self.masked:
            return total.sum() / table("count")[:, 0].sum().clamp_min(1e-8)
        return total.sum() / (table.images * table.classes * table.pixels if self.reduction == "mean" else 1)


class DC_and_BCE_loss(Both):
    """``nnunetv2.training.loss.compound_losses.DC_and_BCE_loss``: labels of each class, the last one the ignored."""

    def __init__(
        self, bce_kwargs: dict[str, Any], soft_dice_kwargs: dict[str, Any], weight_ce: float = 1,
        weight_dice: float = 1, use_ignore_label: bool = False,
        dice_class: type[SoftDiceLoss] = MemoryEfficientSoftDiceLoss,
    ):  # fmt: skip
        ce = _BinaryCrossEntropy(use_ignore_label, **bce_kwargs)
        dice = dice_class(apply_nonlin=torch.sigmoid, **soft_dice_kwargs)
        super().__init__((float(weight_ce), ce), (float(weight_dice), dice))
        self.weight_ce, self.weight_dice, self.use_ignore_label = weight_ce, weight_dice, use_ignore_label

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """Logits (N, C, h, w) and labels (N, C, H, W), or (N, C + 1, H, W) with the ignored one -> the loss."""
        mask = None
        if self.use_ignore_label:
            mask = (target[:, -1] == 0).to(torch.promote_types(net_output.dtype, torch.float32))
            target = target[:, :-1]
        return upsample_loss(net_output, target, [(1.0, self)], pixel_weight=mask)


class DeepSupervisionWrapper(nn.Module):
    """``nnunetv2.training.loss.deep_supervision.DeepSupervisionWrapper``: a weighted sum over lists of inputs."""

    def __init__(self, loss: nn.Module, weight_factors=None):
        super().__init__()
        if weight_factors is not None and not any(x != 0 for x in weight_factors):
            raise AssertionError("At least one weight factor should be != 0.0")
        self.weight_factors = None if weight_factors is None else tuple(weight_factors)
        self.loss = loss

    def forward(self, *args) -> Tensor:
        """Lists of equal length: the first inputs of the loss, the second ones, ..."""
        if not all(isinstance(i, (tuple, list)) for i in args):
            raise AssertionError(f"all args must be either tuple or list, got {[type(i) for i in args]}")
        weights = (1,) * len(args[0]) if self.weight_factors is None else self.weight_factors
        return sum(
            weights[i] * self.loss(*inputs) for i, inputs in enumerate(zip(*args, strict=False)) if weights[i] != 0.0
        )
