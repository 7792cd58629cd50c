"""DeepLabV2: summed atrous convolutions on a dilated ResNet, at several scales of the image."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.models.base import SegmentationNet
from fastseg.models.encoders import ENCODERS
from fastseg.nn.aspp import ASPP
from fastseg.nn.leaf import leaf

BACKBONES = ("resnet101", "resnet50")
RATES = (6, 12, 18, 24)
SCALES = (0.5, 0.75)
PRESETS = ("kazuto", None)
KAZUTO_MOMENTUM = 1e-3  # of all running statistics


class DeepLabV2(SegmentationNet):
    """DeepLabV2 (Chen et al., arXiv:1606.00915) on ResNet, as https://github.com/kazuto1011/deeplab-pytorch builds it.

    The head is the sum of four dilated 3x3 convolutions, without norm or activation. The net runs on the image and on
    smaller copies of it; the result is the maximum of their logits, upsampled to those of the image. As in MSRA's
    encoder, bottlenecks have their stride in the first 1x1 convolution and pooling has ``ceil_mode``. Resizes have
    ``align_corners=False``. Names are torchvision's for the encoder and ``aspp.convs.i`` for the head; ``load_weights``
    also reads that code's own names.

    ``preset`` chooses between two ways of training; evaluation is the same. By default each of the four logits is
    upsampled to the image, for labels of full size, and norms have torch's momentum. With "kazuto" each keeps its own
    size, labels are shrunk to it by nearest neighbours, and the momentum is 0.001, as in that code. (Its script also
    keeps all norms in evaluation mode, and gives the weights of ``aspp`` 10 times the learning rate and the biases 20
    times, without decay; that belongs to the optimiser.)

    Args:
        num_classes: classes, background included.
        backbone: "resnet101" or "resnet50".
        output_stride: input size / size of the deepest features: 8 or 16.
        scales: of the smaller copies, in (0, 1); empty for the image alone. With scales, ``forward`` returns, in
            training, a list: the maximum, the logits of the image, those of the copies. ``loss`` is the sum of their
            losses.
        rates: dilation of each 3x3 of the head, in pixels.
        width: multiplier of the backbone's widths.
        in_channels: channels of the image.
        preset: the way of training, "kazuto" or None. With "kazuto", ``forward`` returns that code's list in training:
            the logits of the image, those of the copies, the maximum, each of its own size.

    Raises:
        ValueError: the value of an option is out of range.

    Example:
        >>> model = DeepLabV2(num_classes=21).eval()
        >>> model(torch.randn(1, 3, 65, 47)).shape
        torch.Size([1, 21, 65, 47])
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet101",
        output_stride: int = 8,
        *,
        scales: Sequence[float] = SCALES,
        rates: Sequence[int] = RATES,
        width: float = 1.0,
        in_channels: int = 3,
        preset: str | None = None,
    ):
        super().__init__(num_classes, align_corners=False)
        if backbone not in BACKBONES:
            raise ValueError(f"DeepLabV2: no backbone {backbone!r}; use one of {', '.join(BACKBONES)}")
        if output_stride not in (8, 16):
            raise ValueError(f"DeepLabV2: output_stride is {output_stride}; use 8 or 16")
        if not all(0 < scale < 1 for scale in scales):
            raise ValueError(f"DeepLabV2: scales are {tuple(scales)}; each must lie between 0 and 1")
        if preset not in PRESETS:
            raise ValueError(f'DeepLabV2: no preset {preset!r}; use "kazuto" or None')
        self.backbone = ENCODERS[backbone](in_channels, output_stride, width, dilation_style="smp", msra=True)
        self.aspp = ASPP(self.backbone.out_channels[-1], num_classes, rates, bias=True, fusion="sum")
        self.scales, self.preset = tuple(scales), preset
        for conv in self.aspp.convs:
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        for module in self.modules() if preset == "kazuto" else ():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = KAZUTO_MOMENTUM

    @leaf
    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(N, in_channels, H, W) -> logits (N, num_classes, H, W); with ``scales``, in training, a list of them."""
        if not (self.training and (self.scales or self.preset)):
            return super().forward(x)
        each = self._each(x)
        if self.preset == "kazuto":
            return self._with_largest(each)
        return [self._resize(logits, x.shape[-2:]) for logits in (self._largest(each), *self._of_one_size(each))]

    def logits(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits at the output stride, the maximum over all scales."""
        return self._largest(self._each(x))

    def loss(self, x: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Cross entropy of ``forward(x)`` and class indices ``target`` (N, H, W); in training the sum over the list.

        With ``preset="kazuto"`` each entry of the list takes the labels nearest to the centres of its pixels. Then
        ``reduction="sum"`` counts a label once per pixel of the image that it stands for. "none" is refused, because
        the entries differ in size.

        ``options`` are those of ``fastseg.nn.UpsampleCrossEntropyLoss``, such as ``ignore_index=255``.

        Raises:
            ValueError: ``reduction="none"`` in training with ``preset="kazuto"``.
        """
        if not (self.training and (self.scales or self.preset)):
            return super().loss(x, target, **options)
        each = self._each(x)
        if self.preset == "kazuto":
            return self._loss_at_own_sizes(self._with_largest(each), target, **options)
        every = (self._largest(each), *self._of_one_size(each))
        return sum(self._cross_entropy(logits, target, **options) for logits in every)

    def _loss_at_own_sizes(self, every: list[Tensor], target: Tensor, **options: Any) -> Tensor:
        reduction = options.get("reduction", "mean")
        if reduction == "none":
            raise ValueError('DeepLabV2.loss: reduction is "none", and there are several sizes; use "mean" or "sum"')
        total = 0
        for logits in every:
            labels = shrunk(target, logits.shape[-2:])
            loss = self._cross_entropy(logits, labels, **options)
            total = total + (loss * (target.numel() / labels.numel()) if reduction == "sum" else loss)
        return total

    def _each(self, x: Tensor) -> list[Tensor]:
        """The logits of each scale, that of the image first, each of its own size."""
        smaller = (F.interpolate(x, scale_factor=s, mode="bilinear", align_corners=False) for s in self.scales)
        return [self.aspp(self.backbone(image)[-1]) for image in (x, *smaller)]

    def _with_largest(self, each: list[Tensor]) -> list[Tensor]:
        """The list for training, as in the reference: the maximum last; a single scale is its own maximum."""
        return [*each, self._largest(each)] if len(each) > 1 else each

    def _of_one_size(self, each: list[Tensor]) -> list[Tensor]:
        return [each[0], *(self._resize(logits, each[0].shape[-2:]) for logits in each[1:])]

    def _largest(self, each: list[Tensor]) -> Tensor:
        y, *others = self._of_one_size(each)
        for logits in others:
            y = torch.maximum(y, logits)
        return y


def shrunk(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) -> (N, *size): the label at the centre of each pixel, as in Pillow's nearest neighbours.

    A centre on the edge between two labels takes the second; Pillow's floating-point sums may take either.
    """
    for dim, side in zip((-2, -1), size, strict=True):
        places = torch.arange(side, device=labels.device)
        labels = labels.index_select(dim, (2 * places + 1) * labels.shape[dim] // (2 * side))
    return labels
