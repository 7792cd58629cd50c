"""DeepLabV2: summed atrous convolutions on a dilated ResNet, over several scales of the image."""

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
    smaller copies of it; of their logits, upsampled to the first's size, the largest counts at every pixel. The encoder
    strides in the first 1x1 of a bottleneck and pools with ``ceil_mode``, as the MSRA's; resizes have
    ``align_corners=False``. Names are torchvision's for the encoder, and ``aspp.convs.i``; ``load_weights`` knows that
    code's own too.

    It trains in two ways, which ``preset`` chooses; in evaluation there is no difference. By default each of the four
    logits is upsampled to the image, for labels of full size, and norms have torch's momentum. With "kazuto" training
    is that code's: each keeps its own size, labels are shrunk to it by nearest neighbours, and the momentum is 0.001.
    (Its script also holds all norms in evaluation, has 10 times the learning rate for the weights and 20 times for the
    biases of ``aspp``, and no decay of the latter: that is the optimiser's part.)

    Args:
        num_classes: classes, background included.
        backbone: "resnet101" or "resnet50".
        output_stride: input size / size of the deepest features: 8 or 16.
        scales: of the smaller copies, in (0, 1); none: the image alone. With scales ``forward`` gives, in training, a
            list: the maximum, the image's own logits and the copies'. ``loss`` adds up their losses.
        rates: dilation of each 3x3 of the head, in pixels.
        width: multiplier of the backbone's widths.
        in_channels: channels of the image.
        preset: "kazuto" or None, how it is trained. With "kazuto" the list that ``forward`` gives in training is that
            code's: the image's own logits, the copies', the maximum, of their own sizes.

    Raises:
        ValueError: an option has a value that it cannot take.

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
        """(N, in_channels, H, W) -> logits at the output stride, the largest of all scales."""
        return self._largest(self._each(x))

    def loss(self, x: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Cross entropy of ``forward(x)`` and class indices ``target`` (N, H, W); in training the sum over the list.

        With ``preset="kazuto"`` the labels of each of the list are the nearest ones to its pixels' centres. There
        ``reduction="sum"`` counts a label as often as it stands for a pixel of the image, and "none" is refused, since
        each has its own size.

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
        """The logits of every scale, the image's first, each of its own size."""
        smaller = (F.interpolate(x, scale_factor=s, mode="bilinear", align_corners=False) for s in self.scales)
        return [self.aspp(self.backbone(image)[-1]) for image in (x, *smaller)]

    def _with_largest(self, each: list[Tensor]) -> list[Tensor]:
        """As the reference's training has them: the maximum last; one scale is its own maximum."""
        return [*each, self._largest(each)] if len(each) > 1 else each

    def _of_one_size(self, each: list[Tensor]) -> list[Tensor]:
        return [each[0], *(self._resize(logits, each[0].shape[-2:]) for logits in each[1:])]

    def _largest(self, each: list[Tensor]) -> Tensor:
        y, *others = self._of_one_size(each)
        for logits in others:
            y = torch.maximum(y, logits)
        return y


def shrunk(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) -> (N, *size): the label at the centre of each pixel, as Pillow's nearest neighbours.

    A centre on the edge of two labels takes the second; Pillow's sums of floats take either.
    """
    for dim, side in zip((-2, -1), size, strict=True):
        places = torch.arange(side, device=labels.device)
        labels = labels.index_select(dim, (2 * places + 1) * labels.shape[dim] // (2 * side))
    return labels
