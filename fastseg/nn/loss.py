"""Losses on low-resolution logits."""

from torch import Tensor, nn

from fastseg.nn.leaf import leaf
from fastseg.ops.upsample_cross_entropy import upsample_cross_entropy


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
