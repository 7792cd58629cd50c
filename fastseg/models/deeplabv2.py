"""DeepLabV2: summed atrous convolutions on a dilated ResNet, over several scales of the image."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.models.encoders import ENCODERS
from fastseg.models.upsampled import UpsampledNet
from fastseg.nn.aspp import ASPP
from fastseg.nn.leaf import leaf

BACKBONES = ("resnet101", "resnet50")
RATES = (6, 12, 18, 24)
SCALES = (0.5, 0.75)


class DeepLabV2(UpsampledNet):
    """DeepLabV2 (Chen et al., arXiv:1606.00915) on ResNet, as https://github.com/kazuto1011/deeplab-pytorch builds it.

    The head is the sum of four dilated 3x3 convolutions, without norm or activation. The net runs on the image and on
    smaller copies of it; of their logits, upsampled to the first's size, the largest counts at every pixel. The encoder
    strides in the first 1x1 of a bottleneck and pools with ``ceil_mode``, as the MSRA's; resizes have
    ``align_corners=False``. Names are torchvision's for the encoder, and ``aspp.convs.i``.

    Args:
        num_classes: classes, background included.
        backbone: "resnet101" or "resnet50".
        output_stride: input size / size of the deepest features: 8 or 16.
        scales: of the smaller copies, in (0, 1); none: the image alone. With scales ``forward`` gives, in training, a
            list: the maximum, the image's own logits and the copies'. ``loss`` adds up their losses.
        rates: dilation of each 3x3 of the head, in pixels.
        width: multiplier of the backbone's widths.
        in_channels: channels of the image.

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
    ):
        super().__init__(num_classes, align_corners=False)
        if backbone not in BACKBONES:
            raise ValueError(f"DeepLabV2: no backbone {backbone!r}; use one of {', '.join(BACKBONES)}")
        if output_stride not in (8, 16):
            raise ValueError(f"DeepLabV2: output_stride is {output_stride}; use 8 or 16")
        if not all(0 < scale < 1 for scale in scales):
            raise ValueError(f"DeepLabV2: scales are {tuple(scales)}; each must lie between 0 and 1")
        self.backbone = ENCODERS[backbone](in_channels, output_stride, width, dilation_style="smp", msra=True)
        self.aspp = ASPP(self.backbone.out_channels[-1], num_classes, rates, bias=True, fusion="sum")
        self.scales = tuple(scales)
        for conv in self.aspp.convs:
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    @leaf
    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(N, in_channels, H, W) -> logits (N, num_classes, H, W); with ``scales``, in training, a list of them."""
        if not (self.training and self.scales):
            return super().forward(x)
        each = self._each(x)
        return [self._resize(logits, x.shape[-2:]) for logits in (_largest(each), *each)]

    def logits(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits at the output stride, the largest of all scales."""
        return _largest(self._each(x))

    def loss(self, x: Tensor, target: Tensor, **options) -> Tensor:
        """Cross entropy of ``forward(x)`` and class indices ``target`` (N, H, W); in training the sum over the list.

        ``options`` are those of ``fastseg.nn.UpsampleCrossEntropyLoss``, such as ``ignore_index=255``.
        """
        if not (self.training and self.scales):
            return super().loss(x, target, **options)
        each = self._each(x)
        return sum(self._cross_entropy(logits, target, **options) for logits in (_largest(each), *each))

    def _each(self, x: Tensor) -> list[Tensor]:
        """The logits of every scale, the image's first, all of its size."""
        run = lambda image: self.aspp(self.backbone(image)[-1])
        logits = run(x)
        smaller = (F.interpolate(x, scale_factor=s, mode="bilinear", align_corners=False) for s in self.scales)
        return [logits, *(self._resize(run(image), logits.shape[-2:]) for image in smaller)]


def _largest(each: list[Tensor]) -> Tensor:
    y = each[0]
    for logits in each[1:]:
        y = torch.maximum(y, logits)
    return y
