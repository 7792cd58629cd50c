"""The losses of segmentation maps of ultralytics (8.4) by their names, arguments and values, on small logits.

``loss(pred, target)`` equals the library's loss of ``interpolate(pred, target.shape[-2:], mode="bilinear")``, and but
for ``SemanticSegmentationLoss`` is a term of ``fastseg.nn.UpsampleLoss`` too. ``BCEDiceLoss`` there shrinks the target
to logits of another size; here the logits grow to the target's. Volumes are for ``FocalLoss`` alone, as in the library:
the others unpack or permute four axes, and ``MultiChannelDiceLoss`` would sum over two of three.
"""

import torch
from torch import Tensor, nn

from fastseg.losses.terms import Both, CrossEntropy, Term
from fastseg.ops.core.loss_columns import SIGMOID, SOFTMAX, Column, Table
from fastseg.ops.upsample_loss import upsample_loss

IGNORED = 255  # label of pixels that do not count
AUXILIARY = 0.4  # factor of the auxiliary head's cross entropy


class _EachClass(Term):
    """A loss of labels (N, C, H, W)."""

    ignores = False

    def __init__(self):
        super().__init__(activation=SIGMOID)

    def labels(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        if target.dim() != logits.dim() or target.shape[:2] != logits.shape[:2]:
            raise AssertionError("the size of predict and target must be equal.")
        return target, None


class _OfMaps(_EachClass):
    """A loss whose sums are over height and width."""

    def labels(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        found = super().labels(logits, target)
        check_maps(self._name, logits)
        return found


class MultiChannelDiceLoss(_OfMaps):
    """``ultralytics.utils.loss.MultiChannelDiceLoss``."""

    per_image = True

    def __init__(self, smooth: float = 1e-6, reduction: str = "mean"):
        super().__init__()
        self.smooth, self.reduction = smooth, reduction

    def columns(self) -> list[Column]:
        return [Column("inter"), Column("prob"), Column("target")]

    def value(self, table: Table) -> Tensor:
        dice = (2.0 * table("inter") + self.smooth) / (table("prob") + table("target") + self.smooth)
        loss = (1.0 - dice).mean(1)
        return loss.mean() if self.reduction == "mean" else loss.sum() if self.reduction == "sum" else loss


class _MeanBCE(_OfMaps):
    """``torch.nn.BCEWithLogitsLoss()``, a part of ``BCEDiceLoss``."""

    _name = "BCEDiceLoss"

    def columns(self) -> list[Column]:
        return [Column("bce")]

    def value(self, table: Table) -> Tensor:
        return table("bce").sum() / (table.images * table.classes * table.pixels)


class BCEDiceLoss(Both):
    """``ultralytics.utils.loss.BCEDiceLoss``."""

    def __init__(self, weight_bce: float = 0.5, weight_dice: float = 0.5):
        super().__init__((weight_bce, _MeanBCE()), (weight_dice, MultiChannelDiceLoss(smooth=1)))
        self.weight_bce, self.weight_dice = weight_bce, weight_dice


class FocalLoss(_EachClass):
    """``ultralytics.utils.loss.FocalLoss``: the sum over pixels of the mean over classes; labels are 0 and 1."""

    def __init__(self, gamma: float = 1.5, alpha: float = 0.25):
        super().__init__()
        self.gamma, self.alpha = float(gamma), alpha

    def columns(self) -> list[Column]:
        return [Column("focal_pos", self.gamma), Column("focal_neg", self.gamma)]

    def value(self, table: Table) -> Tensor:
        pos, neg = table("focal_pos", self.gamma), table("focal_neg", self.gamma)
        alpha = torch.as_tensor(self.alpha).to(pos)
        if (alpha > 0).any():
            pos, neg = alpha * pos, (1 - alpha) * neg
        return (pos + neg).sum() / table.classes


class _SemanticCE(CrossEntropy):
    """Cross entropy over the weights of the pixels that count, at least 1."""

    def __init__(self, weight: Tensor | None):
        super().__init__(weight, IGNORED)

    def value(self, table: Table) -> Tensor:
        weight = self.factors(table)
        return (weight * table("nll")).sum() / (weight * table("target")).sum().clamp_min(1)


class _BinaryCE(Term):
    """Binary cross entropy over the pixels that count, at least 1."""

    def __init__(self):
        super().__init__(IGNORED, SIGMOID)

    def columns(self) -> list[Column]:
        return [Column("bce"), Column("count")]

    def value(self, table: Table) -> Tensor:
        return table("bce").sum() / table("count").sum().clamp_min(1)


class _BatchDice(Term):
    """Dice over the batch, with 1 added to both sides."""

    def __init__(self, activation: str):
        super().__init__(IGNORED, activation)

    def columns(self) -> list[Column]:
        return [Column("inter"), Column("prob"), Column("target")]

    def value(self, table: Table) -> Tensor:
        return (1.0 - (2.0 * table("inter") + 1.0) / (table("prob") + table("target") + 1.0)).mean()


class SemanticSegmentationLoss(nn.Module):
    """``ultralytics.utils.loss.SemanticSegmentationLoss``: cross entropy plus Dice, and an auxiliary head's.

    Args:
        model: whose last module has ``nc``, the number of classes; its ``class_weights``, (nc,), are used if it has
            them. The library's own weights for Cityscapes are not here.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.nc = model.model[-1].nc
        weight = None if self.nc == 1 else getattr(model, "class_weights", None)
        activation = SIGMOID if self.nc == 1 else SOFTMAX
        self.ce: Term = _BinaryCE() if self.nc == 1 else _SemanticCE(weight)
        self.dice = _BatchDice(activation)

    def forward(
        self, preds: Tensor | tuple[Tensor, Tensor], batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (N, nc, h, w), or a pair with the auxiliary head's; ``semantic_mask`` (N, H, W), 255 ignored.

        Returns:
            The loss times N, and its parts, detached.
        """
        auxiliary = None
        if isinstance(preds, tuple):
            preds, auxiliary = preds
        check_maps(type(self).__name__, preds)
        masks = batch["semantic_mask"].to(preds.device)
        masks = masks.long() if masks.is_floating_point() else masks
        parts: dict[str, Tensor] = {}
        total = upsample_loss(preds, masks, [(1.0, _Noted(self.ce, "ce_loss", parts)),
                                             (1.0, _Noted(self.dice, "dice_loss", parts))])  # fmt: skip
        aux_loss = total.new_zeros(())
        if auxiliary is not None:
            aux_loss = upsample_loss(auxiliary, masks, [(AUXILIARY, self.ce)])
            total = total + aux_loss
        parts = {name: value.detach().to(total.dtype) for name, value in parts.items()}
        return total * preds.shape[0], parts | {"aux_loss": aux_loss.detach()}


def check_maps(name: str, logits: Tensor) -> None:
    """Raise the error of an unpacking into four unless these are logits of maps."""
    if logits.dim() != 4:
        many = "too many" if logits.dim() > 4 else "not enough"
        raise ValueError(
            f"{name}: {many} values to unpack (expected 4): logits are {tuple(logits.shape)}; give (N, C, h, w)"
        )


class _Noted:
    """A term that notes its value."""

    def __init__(self, term: Term, name: str, found: dict[str, Tensor]):
        self._term, self._name, self._found = term, name, found

    def __getattr__(self, name: str):
        return getattr(self._term, name)

    def value(self, table: Table) -> Tensor:
        """The term's."""
        self._found[self._name] = self._term.value(table)
        return self._found[self._name]
