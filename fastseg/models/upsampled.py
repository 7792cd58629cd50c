"""Base of the nets with low-resolution logits: the heads that upsample them."""

from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.nn.leaf import leaf
from fastseg.nn.loss import UpsampleCrossEntropyLoss
from fastseg.nn.upsampling import UpsampleArgmax


class UpsampledNet(nn.Module):
    """Heads on the low-resolution ``logits`` of a subclass; argmax and loss never store full-size logits.

    Args:
        num_classes: classes, background included.
        align_corners: of the interpolation.

    Raises:
        ValueError: ``num_classes`` is below 1.
    """

    def __init__(self, num_classes: int, *, align_corners: bool):
        super().__init__()
        if num_classes < 1:
            name = type(self).__name__
            raise ValueError(f"{name}: num_classes is {num_classes}; at least one class is needed")
        self.align_corners = align_corners
        self.upsample_argmax = UpsampleArgmax(align_corners=align_corners)

    @leaf
    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(N, in_channels, H, W) -> logits (N, num_classes, H, W)."""
        return self._resize(self.logits(x), x.shape[-2:])

    def logits(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits of low resolution, (N, num_classes, h, w)."""
        raise NotImplementedError

    def predict(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> class map (N, H, W), ``forward(x).argmax(1)``; uint8 for up to 256 classes."""
        return self.upsample_argmax(self.logits(x), x.shape[-2:])

    def loss(self, x: Tensor, target: Tensor, **options) -> Tensor:
        """Cross entropy of ``forward(x)`` and the class indices ``target`` (N, H, W).

        ``options`` are those of ``fastseg.nn.UpsampleCrossEntropyLoss``, such as ``ignore_index=255``.
        """
        return self._cross_entropy(self.logits(x), target, **options)

    def _cross_entropy(self, logits: Tensor, target: Tensor, **options) -> Tensor:
        return UpsampleCrossEntropyLoss(**options, align_corners=self.align_corners)(logits, target)

    def _resize(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=self.align_corners)
