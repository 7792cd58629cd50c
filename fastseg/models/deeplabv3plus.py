"""DeepLabV3+: encoder-decoder with atrous spatial pyramid pooling."""

from collections.abc import Iterable

from torch import Tensor, nn

from fastseg.models.base import SegmentationNet
from fastseg.models.encoders import ENCODERS
from fastseg.nn.aspp import ASPP
from fastseg.nn.conv import SeparableConv2d
from fastseg.nn.fuse.aspp import run_aspp
from fastseg.nn.fuse.conv_norm_act import convolve
from fastseg.nn.fuse.sequential import Sequential, run_layers
from fastseg.nn.fuse.upsample_concat import run_upsample_concat
from fastseg.nn.leaf import leaf

BACKBONES = ("mobilenet_v2", "xception", "resnet50", "resnet101", "resnet18", "resnet34")  # of ENCODERS
PRESETS = ("bubbliiiing", "google")
ASPP_RATES = (6, 12, 18)  # at output stride 16; twice that at 8
# Of all running statistics: the decay is 0.9997. The authors use it with Xception, slim's default with others.
GOOGLE_MOMENTUM = 3e-4


class DeepLabV3Plus(SegmentationNet):
    """DeepLabV3+ (Chen et al., arXiv:1802.02611).

    There are two forms, both with ``align_corners=True`` in all resizes:

    - ``preset="bubbliiiing"``, the widely used PyTorch code https://github.com/bubbliiiing/deeplabv3-plus-pytorch, its
      names, biases and dropout; weights load unchanged, those of Xception with the ReLU that leaks into its skips.
    - ``preset="google"``, the authors' https://github.com/tensorflow/models/tree/master/research/deeplab: ASPP and
      decoder are separable, the ASPP's image pool comes first, convolutions have no bias; Xception's own differences
      are in ``fastseg.models.encoders.Xception65``. Their weights need their kernels transposed.

    Args:
        num_classes: classes, background included.
        backbone: "mobilenet_v2", "xception", "resnet18", "resnet34", "resnet50" or "resnet101".
        output_stride: input size / size of the deepest features: 8 or 16.
        preset: "bubbliiiing" or "google".
        width: multiplier of the backbone's widths.
        in_channels: channels of the image.
        decoder_channels: width of the ASPP and of the decoder, a multiple of 16. The low-level features are reduced to
            3/16 of it: 48 of 256.
        encoder_options: further keywords of the backbone, such as ``middle_blocks`` of Xception.

    Raises:
        ValueError: the value of an option is out of range.

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
        preset: str = "bubbliiiing",
        width: float = 1.0,
        in_channels: int = 3,
        decoder_channels: int = 256,
        encoder_options: dict | None = None,
    ):
        super().__init__(num_classes, align_corners=True)
        if backbone not in BACKBONES:
            raise ValueError(f"DeepLabV3Plus: no backbone {backbone!r}; use one of {', '.join(BACKBONES)}")
        if output_stride not in (8, 16):
            raise ValueError(f"DeepLabV3Plus: output_stride is {output_stride}; use 8 or 16")
        if preset not in PRESETS:
            raise ValueError(f"DeepLabV3Plus: no preset {preset!r}; use one of {', '.join(PRESETS)}")
        if decoder_channels < 16 or decoder_channels % 16:
            raise ValueError(f"DeepLabV3Plus: decoder_channels is {decoder_channels}; use a multiple of 16")
        options = ({"preset": preset} if backbone == "xception" else {}) | (encoder_options or {})
        self.backbone = ENCODERS[backbone](in_channels, output_stride, width, **options)
        low_channels, deep_channels = self.backbone.out_channels[2], self.backbone.out_channels[-1]
        reduced, wide = decoder_channels * 3 // 16, decoder_channels
        rates = [rate * 16 // output_stride for rate in ASPP_RATES]
        if preset == "google":
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = GOOGLE_MOMENTUM
            self.aspp = ASPP(
                deep_channels, wide, rates, separable=True, pool_first=True, dropout=0.1, momentum=GOOGLE_MOMENTUM
            )
            self.shortcut_conv = Sequential(
                *_conv_norm_relu(low_channels, reduced, 1, bias=False, momentum=GOOGLE_MOMENTUM)
            )
            form = {"mid_norm": True, "mid_act": "relu", "momentum": GOOGLE_MOMENTUM}
            self.cat_conv = Sequential(
                SeparableConv2d(wide + reduced, wide, **form), SeparableConv2d(wide, wide, **form)
            )
        else:
            self.aspp = _ASPP(deep_channels, wide, rates)
            self.shortcut_conv = Sequential(*_conv_norm_relu(low_channels, reduced, 1))
            self.cat_conv = Sequential(
                *_conv_norm_relu(wide + reduced, wide, 3),
                nn.Dropout(0.5),
                *_conv_norm_relu(wide, wide, 3),
                nn.Dropout(0.1),
            )
        self.cls_conv = nn.Conv2d(wide, num_classes, 1)

    def logits(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits at stride 4, (N, num_classes, ceil(H / 4), ceil(W / 4))."""
        features = self.backbone(x)
        low = self.shortcut_conv(features[2])
        deep = self.aspp(features[-1])
        y = run_upsample_concat(deep, low, self.cat_conv, align_corners=True)
        return convolve(self.cls_conv, y)


class _ASPP(nn.Module):
    """Atrous spatial pyramid pooling with the names of the "bubbliiiing" preset."""

    def __init__(self, in_channels: int, channels: int, rates: Iterable[int]):
        super().__init__()
        self.branch1 = Sequential(*_conv_norm_relu(in_channels, channels, 1))
        self.branch2, self.branch3, self.branch4 = (
            Sequential(*_conv_norm_relu(in_channels, channels, 3, rate)) for rate in rates
        )
        self.branch5_conv, self.branch5_bn, self.branch5_relu = _conv_norm_relu(in_channels, channels, 1)
        self.conv_cat = Sequential(*_conv_norm_relu(5 * channels, channels, 1))

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        branches = (self.branch1, self.branch2, self.branch3, self.branch4)
        return run_aspp(x, branches, self._image_vector, self.conv_cat)

    def _image_vector(self, x: Tensor) -> Tensor:
        layers = (self.branch5_conv, self.branch5_bn, self.branch5_relu)
        return run_layers(x.mean((2, 3), keepdim=True), layers)


def _conv_norm_relu(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    dilation: int = 1,
    *,
    bias: bool = True,
    momentum: float = 0.1,
) -> list[nn.Module]:
    padding = dilation * (kernel_size // 2)
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=bias),
        nn.BatchNorm2d(out_channels, momentum=momentum),
        nn.ReLU(),
    ]
