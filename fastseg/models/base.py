"""The base class of the nets: forward, class map and loss over the ``logits`` that a net has."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.nn.leaf import leaf
from fastseg.nn.loss import criterion
from fastseg.nn.upsampling import UpsampleArgmax


class SegmentationNet(nn.Module):
    """Forward, class map and loss over ``logits``, which a subclass defines.

    Logits of low resolution are upsampled bilinearly to the size of the image. Class map and loss take them small:
    logits of full size are never built for them.

    Args:
        num_classes: classes, background included.
        align_corners: of the interpolation; None means that ``logits`` are of full size.

    Raises:
        ValueError: no class.
    """

    def __init__(self, num_classes: int, *, align_corners: bool | None):
        super().__init__()
        if num_classes < 1:
            name = type(self).__name__
            raise ValueError(f"{name}: num_classes is {num_classes}; at least one class is needed")
        self.align_corners = align_corners
        self.upsample_argmax = UpsampleArgmax(align_corners=align_corners is not False)

    @leaf
    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(N, in_channels, H, W) -> logits (N, num_classes, H, W)."""
        logits = self.logits(x)
        return logits if self.align_corners is None else self._resize(logits, x.shape[-2:])

    def logits(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes, h, w), of low resolution or of full size."""
        raise NotImplementedError

    def predict(self, x: Tensor, *, confidence: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """(N, in_channels, H, W) -> class map (N, H, W), ``forward(x).argmax(1)``; uint8 up to 256 classes.

        With ``confidence`` a pair: it, and the probability of each pixel's class, (N, H, W) float32.
        """
        logits = self.logits(x)
        size = logits.shape[2:] if self.align_corners is None else x.shape[2:]
        return self.upsample_argmax(logits, size, confidence=confidence)

    def loss(self, x: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Cross entropy of ``forward(x)`` and the class indices ``target`` (N, H, W).

        ``options`` are those of ``fastseg.nn.UpsampleCrossEntropyLoss``, such as ``ignore_index=255`` or ``weight``.
        With ``terms``, (weight, loss) pairs of ``fastseg.losses``, they are those of ``fastseg.nn.UpsampleLoss``.

        Raises:
            ValueError: ``target`` has another size than logits of full size.
        """
        return self._cross_entropy(self.logits(x), target, **options)

    def _cross_entropy(self, logits: Tensor | list[Tensor], target: Tensor, **options: Any) -> Tensor:
        shape = (logits if isinstance(logits, Tensor) else logits[0]).shape
        if self.align_corners is None and target.shape[2 - len(shape) :] != shape[2:]:
            raise ValueError(
                f"{type(self).__name__}.loss: logits are {tuple(shape)}, target is {tuple(target.shape)}; "
                "give them equal sides"
            )
        return criterion(**options, align_corners=self.align_corners is not False)(logits, target)

    def _resize(self, x: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=self.align_corners)


class AuxiliaryNet(SegmentationNet):
    """A net with a second head, which its loss takes too, in training.

    A subclass defines ``auxiliary``, the second head or None, and ``both``, and may change ``aux_weight``.
    """

    aux_weight = 0.5  # of the second head's loss

    @property
    def auxiliary(self) -> nn.Module | None:
        """The second head, if there is one."""
        raise NotImplementedError

    def both(self, x: Tensor) -> list[Tensor]:
        """(N, in_channels, H, W) -> logits of the head, and of the second head, each at its own size."""
        raise NotImplementedError

    @leaf
    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(N, in_channels, H, W) -> logits (N, num_classes, H, W); with a second head, in training, a list of two."""
        if not (self.training and self.auxiliary is not None):
            return super().forward(x)
        return [self._resize(logits, x.shape[-2:]) for logits in self.both(x)]

    def loss(self, x: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Cross entropy of ``forward(x)`` and the class indices ``target`` (N, H, W), both heads' in training.

        ``options`` are those of ``fastseg.nn.UpsampleCrossEntropyLoss``, such as ``ignore_index=255``.
        """
        if not (self.training and self.auxiliary is not None):
            return super().loss(x, target, **options)
        main, auxiliary = (self._cross_entropy(logits, target, **options) for logits in self.both(x))
        return main + self.aux_weight * auxiliary


def init_kaiming_(model: nn.Module) -> None:
    """He's weights for ReLU (arXiv:1502.01852), and biases of 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
