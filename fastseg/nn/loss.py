"""Losses on low-resolution logits."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastseg.nn.leaf import leaf
from fastseg.ops.upsample_cross_entropy import upsample_cross_entropy
from fastseg.ops.upsample_loss import ignored_label, upsample_loss


class UpsampleCrossEntropyLoss(nn.CrossEntropyLoss):
    """Compute ``cross_entropy(interpolate(logits, target.shape[-2:], mode="bilinear"), target)``.

    As ``torch.nn.CrossEntropyLoss``; differences: the logits are first upsampled to the size of the target, and the
    target holds class indices of dtype uint8, int8, int16, int32 or int64. See ``fastseg.ops.upsample_cross_entropy``.

    Args:
        weight: (C,), a factor per class.
        ignore_index: target value of pixels that do not count.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].
        align_corners: as in ``torch.nn.functional.interpolate``.

    Returns:
        A scalar, or (N, H, W) for ``reduction="none"``.

    Raises:
        ValueError, TypeError, IndexError: those of ``fastseg.ops.upsample_cross_entropy``, which ``forward`` calls.

    Example:
        >>> loss = UpsampleCrossEntropyLoss(ignore_index=255)
        >>> loss(torch.randn(2, 21, 32, 32), torch.randint(21, (2, 128, 128))).shape
        torch.Size([])
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        align_corners: bool = False,
    ):
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        self.align_corners = align_corners

    @leaf
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits (N, C, h, w) and class indices (N, H, W) -> a scalar, or (N, H, W) for ``reduction="none"``."""
        return upsample_cross_entropy(
            logits,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            align_corners=self.align_corners,
        )

    def extra_repr(self) -> str:
        return f"align_corners={self.align_corners}"


class UpsampleLoss(nn.Module):
    """A weighted sum of losses on logits upsampled bilinearly to the size of the target.

    See ``fastseg.ops.upsample_loss``; ``fastseg.losses`` has the losses. The logits of full size are never stored.

    Args:
        terms: (weight, loss) pairs.
        ignore_index: target value of pixels that do not count; None means that of the losses, else -100.
        head_weights: a factor for each head, if ``forward`` gets a list of logits.
        align_corners: as in ``torch.nn.functional.interpolate``.
        across_processes: sum what is summed over the batch over the processes of ``torch.distributed`` too.

    Raises:
        ValueError, TypeError, IndexError: those of ``fastseg.ops.upsample_loss``, which ``forward`` calls.

    Example:
        >>> from fastseg.losses import CrossEntropy, Dice
        >>> loss = UpsampleLoss([(1.0, CrossEntropy(ignore_index=255)), (1.0, Dice())])
        >>> loss(torch.randn(2, 21, 32, 32), torch.randint(21, (2, 128, 128))).shape
        torch.Size([])
    """

    reduction = "mean"

    def __init__(
        self,
        terms: Sequence[tuple[float, nn.Module]],
        *,
        ignore_index: int | None = None,
        head_weights: Sequence[float] | None = None,
        align_corners: bool = False,
        across_processes: bool = False,
    ):
        super().__init__()
        terms = list(terms)
        pairs = all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in terms)
        if not terms or not pairs or not all(isinstance(loss, nn.Module) for _, loss in terms):
            raise ValueError(f"UpsampleLoss: terms are {terms}; give (weight, loss) pairs, losses of fastseg.losses")
        self.weights = tuple(float(weight) for weight, _ in terms)
        self.losses = nn.ModuleList(loss for _, loss in terms)
        self.ignore_index = ignored_label(list(zip(self.weights, self.losses, strict=True)), ignore_index)
        self.align_corners, self.across_processes = align_corners, across_processes
        self.head_weights = None if head_weights is None else tuple(head_weights)

    @leaf
    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
        """Logits (N, C, h, w), or a list of them, and target (N, H, W) or (N, C, H, W) -> a scalar."""
        return upsample_loss(
            logits,
            target,
            list(zip(self.weights, self.losses, strict=True)),
            ignore_index=self.ignore_index,
            pixel_weight=pixel_weight,
            head_weights=self.head_weights,
            align_corners=self.align_corners,
            across_processes=self.across_processes,
        )

    def extra_repr(self) -> str:
        return f"weights={self.weights}, align_corners={self.align_corners}"


def criterion(
    terms: Sequence[tuple[float, nn.Module]] | None = None, **options: Any
) -> UpsampleCrossEntropyLoss | UpsampleLoss:
    """``UpsampleLoss(terms, **options)``, or without terms the cross entropy of these options."""
    return UpsampleCrossEntropyLoss(**options) if terms is None else UpsampleLoss(terms, **options)
