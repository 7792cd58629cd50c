"""UPerNet: a feature pyramid with pyramid pooling on top, on any encoder."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.models.base import AuxiliaryNet
from fastseg.models.encoders import ENCODERS
from fastseg.models.encoders.mit import VARIANTS, MixTransformer
from fastseg.nn.fuse.conv_norm_act import convolve, run_conv_norm_act
from fastseg.nn.fuse.resize import run_resize_concat_conv
from fastseg.nn.fuse.watch import watched
from fastseg.nn.leaf import leaf

CONVOLUTIONAL = ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2")  # of ENCODERS
BACKBONES = (*CONVOLUTIONAL, *VARIANTS)
POOLS = (1, 2, 3, 6)  # sides of the pooled maps


class UPerNet(AuxiliaryNet):
    """UPerNet for semantic segmentation (Xiao et al., arXiv:1807.10221), its heads named as Hugging Face's.

    ``decode_head`` and ``auxiliary_head`` of ``UperNetForSemanticSegmentation`` load into the same-named modules. Maps
    at strides 4 to 32 are reduced to one width, the deepest after pyramid pooling; each is added to the one above it.
    All are resized to stride 4, concatenated and fused by a 3x3 convolution, which runs at each map's own size where
    that is faster (``fastseg.ops.resize_concat_conv2d``).

    Args:
        num_classes: classes, background included.
        backbone: "resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2", or "mit_b0" to "mit_b5".
        channels: width of the head.
        aux: True for a second head on the map at stride 16; in training ``forward`` then returns a list of two, and
            ``loss`` adds 0.4 of the second head's loss.
        width: multiplier of the backbone's widths.
        in_channels: channels of the image.
        encoder_options: further keywords of the backbone.

    Raises:
        ValueError: the value of an option is out of range.

    Training needs a batch of two or more: batch norm follows a pooling to one pixel.

    Example:
        >>> model = UPerNet(num_classes=21, backbone="resnet18", channels=32).eval()
        >>> model(torch.randn(1, 3, 65, 47)).shape
        torch.Size([1, 21, 65, 47])
    """

    aux_weight = 0.4

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        *,
        channels: int = 512,
        aux: bool = False,
        width: float = 1.0,
        in_channels: int = 3,
        encoder_options: dict | None = None,
    ):
        super().__init__(num_classes, align_corners=False)
        if backbone not in BACKBONES:
            raise ValueError(f"UPerNet: no backbone {backbone!r}; use one of {', '.join(BACKBONES)}")
        if channels < 1:
            raise ValueError(f"UPerNet: channels is {channels}; use a positive number")
        options = encoder_options or {}
        if backbone in VARIANTS:
            self.backbone: nn.Module = MixTransformer(backbone, in_channels, width, **options)
        else:
            self.backbone = ENCODERS[backbone](in_channels, 32, width, **options)
        widths = self.backbone.out_channels[-4:]
        self.decode_head = UPerHead(widths, channels, num_classes)
        self.auxiliary_head = _AuxiliaryHead(widths[2], max(1, channels // 2), num_classes) if aux else None

    def logits(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits at stride 4, (N, num_classes, ceil(H / 4), ceil(W / 4))."""
        return self.decode_head(self.backbone(x)[-4:])

    @property
    def auxiliary(self) -> nn.Module | None:
        return self.auxiliary_head

    def both(self, x: Tensor) -> list[Tensor]:
        features = self.backbone(x)[-4:]
        return [self.decode_head(features), self.auxiliary_head(features[2])]


class UPerHead(nn.Module):
    """Maps at strides 4 to 32 -> logits at stride 4.

    Args:
        in_channels: widths of the maps.
        channels: width of the head.
        num_classes: classes.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int):
        super().__init__()
        *low, deep = in_channels
        pools = (nn.Sequential(nn.AdaptiveAvgPool2d(n), ConvNormReLU(deep, channels, 1)) for n in POOLS)
        self.psp_modules = nn.ModuleList(pools)
        self.bottleneck = ConvNormReLU(deep + len(POOLS) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNormReLU(width, channels, 1) for width in low)
        self.fpn_convs = nn.ModuleList(ConvNormReLU(channels, channels, 3) for _ in low)
        self.fpn_bottleneck = ConvNormReLU(len(in_channels) * channels, channels, 3)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """(N, C_i, h_i, w_i) each, the first the largest -> (N, num_classes, h_0, w_0)."""
        deep = features[-1]
        pooled = [deep, *(pool(deep) for pool in self.psp_modules)]
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, features, strict=False)]
        levels.append(self.bottleneck.of_resized(pooled, deep.shape[2:]))
        for i in range(len(levels) - 1, 0, -1):
            size = levels[i - 1].shape[2:]
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], size, mode="bilinear", align_corners=False)
        maps = [conv(level) for conv, level in zip(self.fpn_convs, levels, strict=False)]
        y = self.fpn_bottleneck.of_resized([*maps, levels[-1]], maps[0].shape[2:])
        return convolve(self.classifier, y)


class ConvNormReLU(nn.Module):
    """A convolution without bias that keeps the size of its map, batch norm, ReLU.

    Args:
        in_channels: of the map.
        channels: of the result.
        size: of the kernel: 1 or 3.
    """

    def __init__(self, in_channels: int, channels: int, size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, size, padding=size // 2, bias=False)
        self.batch_norm = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU()

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, h, w) -> (N, channels, h, w)."""
        return run_conv_norm_act(x, self.conv, self.batch_norm, self.activation)

    def of_resized(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """The block on the maps resized to ``size`` and concatenated."""
        if watched(self, type(self)):
            resized = [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps]
            return self(torch.cat(resized, 1))
        return run_resize_concat_conv(maps, size, self.conv, self.batch_norm, self.activation)


class _AuxiliaryHead(nn.Module):
    def __init__(self, in_channels: int, channels: int, num_classes: int):
        super().__init__()
        self.convs = nn.Sequential(ConvNormReLU(in_channels, channels, 3))
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.classifier, self.convs(x))
