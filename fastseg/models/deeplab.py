"""DeepLab: encoder-decoder with atrous spatial pyramid pooling."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.models.encoders import ENCODERS
from fastseg.nn.loss import UpsampleCrossEntropyLoss
from fastseg.nn.skip import run_upsample_concat_conv
from fastseg.nn.upsampling import UpsampleArgmax

BACKBONES = ("mobilenet_v2",)  # of ENCODERS, those whose public DeepLabV3+ weights fit
ASPP_RATES = (6, 12, 18)  # at output stride 16; twice that at 8


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ (Chen et al., arXiv:1802.02611).

    Names, biases, dropout and resizing (``align_corners=True`` throughout) are those of the widely used PyTorch code
    https://github.com/bubbliiiing/deeplabv3-plus-pytorch, whose weights load unchanged.

    Args:
        num_classes: classes, background included.
        backbone: name of the encoder.
        output_stride: input size / size of the deepest features: 8 or 16.
        width: multiplier of the backbone's widths.
        in_channels: channels of the image.
        decoder_channels: width of the ASPP and of the decoder, a multiple of 16. The low-level features are reduced to
            3/16 of it: 48 of 256.

    Raises:
        ValueError: an option has a value that it cannot take.

    Training needs a batch of two or more: batch norm follows the image pooling, which leaves one pixel per image.

    Example:
        >>> model = DeepLabV3Plus(num_classes=21).eval()
        >>> model(torch.randn(1, 3, 65, 47)).shape
        torch.Size([1, 21, 65, 47])
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "mobilenet_v2",
        output_stride: int = 16,
        *,
        width: float = 1.0,
        in_channels: int = 3,
        decoder_channels: int = 256,
    ):
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"DeepLabV3Plus: no backbone {backbone!r}; use one of {', '.join(BACKBONES)}")
        if output_stride not in (8, 16):
            raise ValueError(f"DeepLabV3Plus: output_stride is {output_stride}; use 8 or 16")
        if num_classes < 1:
            raise ValueError(f"DeepLabV3Plus: num_classes is {num_classes}; at least one class is needed")
        if decoder_channels < 16 or decoder_channels % 16:
            raise ValueError(f"DeepLabV3Plus: decoder_channels is {decoder_channels}; use a multiple of 16")
        self.backbone = ENCODERS[backbone](in_channels, output_stride, width)
        low_channels, deep_channels = self.backbone.out_channels[2], self.backbone.out_channels[-1]
        shortcut_channels = decoder_channels * 3 // 16
        self.aspp = _ASPP(deep_channels, decoder_channels, [rate * 16 // output_stride for rate in ASPP_RATES])
        self.shortcut_conv = nn.Sequential(*_conv_norm_relu(low_channels, shortcut_channels, 1))
        self.cat_conv = nn.Sequential(
            *_conv_norm_relu(decoder_channels + shortcut_channels, decoder_channels, 3),
            nn.Dropout(0.5),
            *_conv_norm_relu(decoder_channels, decoder_channels, 3),
            nn.Dropout(0.1),
        )
        self.cls_conv = nn.Conv2d(decoder_channels, num_classes, 1)
        self.upsample_argmax = UpsampleArgmax(align_corners=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes, H, W)."""
        return _resize(self.logits(x), x.shape[-2:])

    def logits(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits at stride 4, (N, num_classes, ceil(H / 4), ceil(W / 4))."""
        features = self.backbone(x)
        low, deep = features[2], features[-1]
        deep, low, (conv, norm) = self.aspp(deep), self.shortcut_conv(low), self.cat_conv[:2]
        y = run_upsample_concat_conv(deep, low, conv, norm, "relu", align_corners=True)
        return self.cls_conv(self.cat_conv[3:](y))

    def predict(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> class map (N, H, W), ``forward(x).argmax(1)``; uint8 up to 256 classes."""
        return self.upsample_argmax(self.logits(x), x.shape[-2:])

    def loss(self, x: Tensor, target: Tensor, **options) -> Tensor:
        """Cross entropy of ``forward(x)`` and the class indices ``target`` (N, H, W).

        ``options`` are those of ``fastseg.nn.UpsampleCrossEntropyLoss``, such as ``ignore_index=255``.
        """
        return UpsampleCrossEntropyLoss(**options, align_corners=True)(self.logits(x), target)


class _ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, three dilated 3x3 and the image mean side by side, merged by a 1x1."""

    def __init__(self, in_channels: int, channels: int, rates: Iterable[int]):
        super().__init__()
        self.branch1 = nn.Sequential(*_conv_norm_relu(in_channels, channels, 1))
        self.branch2, self.branch3, self.branch4 = (
            nn.Sequential(*_conv_norm_relu(in_channels, channels, 3, rate)) for rate in rates
        )
        self.branch5_conv, self.branch5_bn, self.branch5_relu = _conv_norm_relu(in_channels, channels, 1)
        self.conv_cat = nn.Sequential(*_conv_norm_relu(5 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat([branch(x) for branch in (self.branch1, self.branch2, self.branch3, self.branch4)], 1)
        pooled = self.branch5_relu(self.branch5_bn(self.branch5_conv(x.mean((2, 3), keepdim=True))))
        # The pooled branch is constant over an image, and so is its share of the 1x1: one bias per image and channel.
        conv, norm, relu = self.conv_cat
        map_weight, pooled_weight = conv.weight.split([maps.shape[1], pooled.shape[1]], 1)
        return relu(norm(F.conv2d(maps, map_weight, conv.bias) + F.conv2d(pooled, pooled_weight)))


def _conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> list[nn.Module]:
    padding = dilation * (kernel_size // 2)
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
