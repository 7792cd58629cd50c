"""Base of the nets with full-size logits: the heads, and He's initialisation."""

from torch import Tensor, nn

from fastseg.nn.leaf import leaf
from fastseg.nn.loss import UpsampleCrossEntropyLoss
from fastseg.nn.upsampling import UpsampleArgmax


class FullSizeNet(nn.Module):
    """Heads on the full-size ``logits`` of a subclass."""

    def __init__(self, num_classes: int):
        super().__init__()
        if num_classes < 1:
            name = type(self).__name__
            raise ValueError(f"{name}: num_classes is {num_classes}; at least one class is needed")
        self.upsample_argmax = UpsampleArgmax(align_corners=True)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes, H, W)."""
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes, H, W), at full resolution."""
        raise NotImplementedError

    def predict(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> class map (N, H, W), ``logits(x).argmax(1)``; uint8 for up to 256 classes."""
        logits = self.logits(x)
        return self.upsample_argmax(logits, logits.shape[-2:])

    def loss(self, x: Tensor, target: Tensor, **options) -> Tensor:
        """Cross entropy of ``forward(x)`` and the class indices ``target`` (N, H, W).

        ``options`` are those of ``fastseg.nn.UpsampleCrossEntropyLoss``, such as ``ignore_index=255`` or ``weight``.

        Raises:
            ValueError: ``target`` has another size than the logits.
        """
        return self._cross_entropy(self.logits(x), target, **options)

    def _cross_entropy(self, logits: Tensor, target: Tensor, **options) -> Tensor:
        if target.shape[-2:] != logits.shape[-2:]:
            raise ValueError(
                f"{type(self).__name__}.loss: logits are {tuple(logits.shape)}, target is {tuple(target.shape)}; "
                "give them equal sides"
            )
        return UpsampleCrossEntropyLoss(**options, align_corners=True)(logits, target)


def he_(model: nn.Module) -> None:
    """Initialise weights by He's rule for ReLU (arXiv:1502.01852), and biases to 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
