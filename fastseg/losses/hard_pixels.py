"""Losses of the pixels that are worst predicted: top-k, and online hard example mining."""

import math

import torch
from torch import Tensor

from fastseg.losses.terms import ClassWeights, Term
from fastseg.ops.core.dispatch import what_follows
from fastseg.ops.core.labels import equal
from fastseg.ops.upsample_cross_entropy import upsample_cross_entropy


class TopK(Term):
    """The mean of the largest cross entropies, ``fraction`` of the batch's pixels that count.

    It keeps one number for each pixel, from which torch selects; the logits of full size never exist. A NaN is the
    largest.

    Args:
        fraction: in (0, 1].
        weight: (C,), a factor for each class.
        ignore_index: label of pixels that do not count; None means that of ``UpsampleLoss``.
        label_smoothing: in [0, 1].

    Raises:
        ValueError: ``fraction`` is outside (0, 1].
    """

    def __init__(
        self, fraction: float = 0.1, weight: ClassWeights = None, ignore_index: int | None = None,
        label_smoothing: float = 0.0,
    ):  # fmt: skip
        super().__init__(ignore_index, weight=weight)
        if not 0 < fraction <= 1:
            raise ValueError(f"{self._name}: fraction is {fraction}; it must lie in (0, 1]")
        self.fraction, self.label_smoothing = fraction, label_smoothing

    def direct(
        self, logits: Tensor, target: Tensor, ignore_index: int, pixel_weight: Tensor | None, align_corners: bool
    ) -> Tensor:
        """The loss; no function of sums."""
        losses, target = self._losses(logits, target, self.weight, ignore_index, align_corners)
        return self.selected(self._weighed(losses, pixel_weight), target, ignore_index)

    def _losses(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, align_corners: bool
    ) -> tuple[Tensor, Tensor]:
        """The cross entropy of each pixel, at least fp32, and the target without a channel."""
        target = target[:, 0] if target.dim() == logits.dim() and target.shape[1] == 1 else target
        if not logits.is_floating_point():
            raise TypeError(f"{self._name}: logits are {logits.dtype}; give floating-point logits")
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = upsample_cross_entropy(
            wide, target, weight, ignore_index, "none", self.label_smoothing, align_corners=align_corners
        )
        return losses, target

    def _weighed(self, losses: Tensor, pixel_weight: Tensor | None) -> Tensor:
        if pixel_weight is None:
            return losses
        if pixel_weight.shape != losses.shape:
            raise ValueError(
                f"{self._name}: pixel_weight is {tuple(pixel_weight.shape)}; give a factor for each pixel, "
                f"{tuple(losses.shape)}"
            )
        return losses * pixel_weight

    def selected(self, losses: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        """The mean of the worst of the losses (N, H, W); those of ignored pixels are 0."""
        pixels = (~equal(target, ignore_index)).sum()
        if what_follows(losses):  # no number may be read: a trace would keep that of its example
            wanted = (pixels * self.fraction).floor()
            largest = losses.flatten().sort(descending=True).values
            kept = torch.arange(largest.shape[0], device=losses.device) < wanted
            return torch.where(kept, largest, 0).sum() / wanted.clamp(min=1)
        count = int(self.fraction * int(pixels))
        if count == 0:
            return losses.sum() * 0.0
        return losses.flatten().topk(count, sorted=False).values.mean()


class OHEM(TopK):
    """Online hard example mining: the mean cross entropy of pixels whose class has less than ``threshold``.

    At least ``min_kept`` pixels are kept, those with the largest losses.

    Args:
        threshold: in (0, 1].
        min_kept: pixels.
        weight: (C,), a factor for each class.
        ignore_index: label of pixels that do not count; None means that of ``UpsampleLoss``.

    Raises:
        ValueError: ``threshold`` is outside (0, 1].

    Reference: Shrivastava et al., arXiv:1604.03540; per pixel as in Wu et al., arXiv:1605.06885.
    """

    def __init__(
        self, threshold: float = 0.7, min_kept: int = 100_000, weight: ClassWeights = None,
        ignore_index: int | None = None,
    ):  # fmt: skip
        super().__init__(1.0, weight, ignore_index)
        if not 0 < threshold <= 1:
            raise ValueError(f"{self._name}: threshold is {threshold}; it must lie in (0, 1]")
        self.threshold, self.min_kept = threshold, min_kept

    def direct(
        self, logits: Tensor, target: Tensor, ignore_index: int, pixel_weight: Tensor | None, align_corners: bool
    ) -> Tensor:
        """The loss; no function of sums."""
        C = logits.shape[1]
        if self.weight is not None and self.weight.shape != (C,):
            raise ValueError(
                f"{self._name}: weight is {tuple(self.weight.shape)}; give a factor for each of {C} classes"
            )
        losses, target = self._losses(logits, target, None, ignore_index, align_corners)
        counts = ~equal(target, ignore_index)
        found = losses.detach()[counts]
        if found.numel() == 0:
            return losses.sum() * 0.0
        least = (
            found.topk(min(self.min_kept, found.numel()), sorted=True).values[-1] if self.min_kept > 0 else torch.inf
        )
        easy = (losses.detach() <= -math.log(self.threshold)) & (losses.detach() < least)  # a NaN is neither
        kept = counts & ~easy
        factor = kept.to(losses.dtype)
        if self.weight is not None:
            factor = factor * self.weight.to(losses)[target.long().where(counts, 0)]
        return (self._weighed(losses, pixel_weight) * factor).sum() / kept.sum().clamp_min(1)
