"""MobileNetV2 (Sandler et al., arXiv:1801.04381) without its last 1x1 convolution and classifier."""

from torch import Tensor, nn

from fastseg.models.encoders.widths import scaled
from fastseg.nn.fuse.inverted_residual import run_inverted_residual
from fastseg.nn.fuse.separable import run_separable
from fastseg.nn.fuse.sequential import Sequential, opened, run_tapped

STEM_CHANNELS = 32
# Expansion, output channels, number of blocks, stride of the first block.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
TAPS = (1, 3, 6, 13, 17)  # the last layer at nominal strides 2, 4, 8, 16, 32


class MobileNetV2(nn.Module):
    """MobileNetV2 as an encoder.

    ``features`` holds the stem and the 17 inverted residual blocks, named as in the code of the DeepLabV3+ article.
    Past the output stride, a stride of 2 becomes 1 and later depthwise convolutions are dilated instead: the block that
    loses its stride keeps the dilation before it, and the following blocks double it.

    Args:
        in_channels: channels of the image.
        output_stride: input size / size of the deepest features: 8, 16 or 32.
        width: multiplier of every width; the results are rounded to multiples of 8.

    Attributes:
        out_channels: the widths of what ``forward`` returns.

    Raises:
        ValueError: ``output_stride`` is not one of the three, or ``width`` is not positive.

    Example:
        >>> [tuple(f.shape[1:]) for f in MobileNetV2(output_stride=16)(torch.randn(1, 3, 64, 96))]
        [(3, 64, 96), (16, 32, 48), (24, 16, 24), (32, 8, 12), (96, 4, 6), (320, 4, 6)]
    """

    def __init__(self, in_channels: int = 3, output_stride: int = 32, width: float = 1.0):
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f"MobileNetV2: output_stride is {output_stride}; use 8, 16 or 32")
        channels = scaled(STEM_CHANNELS, width, "MobileNetV2")
        layers: list[nn.Module] = [
            Sequential(
                nn.Conv2d(in_channels, channels, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU6(),
            )
        ]
        widths = [channels]
        reached, dilation = 2, 1
        for expansion, stage_channels, blocks, stage_stride in STAGES:
            for stride in (stage_stride, *[1] * (blocks - 1)):
                out_channels = scaled(stage_channels, width, "MobileNetV2")
                strided = stride == 2 and reached < output_stride
                layers.append(
                    InvertedResidual(
                        channels,
                        out_channels,
                        stride=2 if strided else 1,
                        dilation=dilation,
                        expansion=expansion,
                        # Decided before strides become dilations, which must not change the wiring.
                        residual=stride == 1 and channels == out_channels,
                    )
                )
                if strided:
                    reached *= 2
                elif stride == 2:
                    dilation *= 2
                channels = out_channels
                widths.append(channels)
        self.features = Sequential(*layers)
        self.out_channels = [in_channels, *(widths[i] for i in TAPS)]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, in_channels, H, W) -> six maps; entry i has stride 2^i, capped at the output stride; entry 0 is ``x``."""
        taps = dict.fromkeys(TAPS[:-1])
        y = run_tapped(self.features, x, taps)
        return [x, *taps.values(), y]


class InvertedResidual(nn.Module):
    """An inverted residual block: 1x1 expansion, depthwise 3x3, linear 1x1 projection, residual.
        The last three are one fused op; in evaluation all four are, if that is faster.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        stride: of the depthwise convolution.
        dilation: of the depthwise convolution, in pixels; its padding is the same.
        expansion: hidden channels / ``in_channels``; 1 omits the expansion.
        residual: True to add the input to the output.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, dilation: int, expansion: int, residual: bool
    ):
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [nn.Conv2d(in_channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, padding=dilation, dilation=dilation, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = Sequential(*layers)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        layers = opened(self.conv)
        if layers is None or len(layers) not in (5, 8):
            y = self.conv(x)
            return x + y if self.residual else y
        *expand, depthwise, mid_norm, act, pointwise, post_norm = layers
        if expand:
            conv, norm, expand_act = expand
            options = {"residual": self.residual, "acts": (expand_act, act)}
            return run_inverted_residual(x, conv, norm, depthwise, mid_norm, pointwise, post_norm, **options)
        skip = x if self.residual else None
        return run_separable(x, depthwise, mid_norm, act, pointwise, post_norm, None, residual=skip)
