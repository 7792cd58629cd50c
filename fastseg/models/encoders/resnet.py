"""ResNet (He et al., arXiv:1512.03385), with the stride in the 3x3 convolution and without the classifier."""

from functools import partial
from typing import Literal

from torch import Tensor, nn

from fastseg.models.encoders.widths import scaled
from fastseg.nn.fuse.conv_norm_act import run_conv_norm_act
from fastseg.nn.fuse.sequential import Sequential

# Depth: whether blocks are bottlenecks, and the number of blocks of the four layers.
LAYERS = {18: (False, (2, 2, 2, 2)), 34: (False, (3, 4, 6, 3)), 50: (True, (3, 4, 6, 3)), 101: (True, (3, 4, 23, 3))}
WIDTHS = (64, 128, 256, 512)
EXPANSION = 4  # of a bottleneck

DilationStyle = Literal["torchvision", "smp"]


class ResNet(nn.Module):
    """ResNet-18, 34, 50 or 101 as an encoder, with torchvision's names.

    Past the output stride, a layer's stride of 2 becomes 1 and its 3x3 convolutions are dilated instead. There are two
    styles, which weights do not tell apart. In "torchvision" (its ``replace_stride_with_dilation``) the first block of
    such a layer keeps the dilation before it and the following blocks double it. In "smp" the first block doubles it
    too. Both also hold for the basic blocks of ResNet-18 and 34, which torchvision refuses to dilate.

    Args:
        depth: 18, 34, 50 or 101.
        in_channels: channels of the image.
        output_stride: input size / size of the deepest features: 8, 16 or 32.
        width: multiplier of every width; the results are rounded to multiples of 8.
        dilation_style: "torchvision" or "smp".
        msra: True to have a bottleneck's stride in its first 1x1 convolution, not in the 3x3, and to keep, in the first
            pooling, an odd last row and column, as the authors' own weights need.

    Attributes:
        out_channels: the widths of what ``forward`` returns.

    Raises:
        ValueError: the value of an option is out of range.

    Example:
        >>> [tuple(f.shape[1:]) for f in ResNet(18, output_stride=16)(torch.randn(1, 3, 64, 96))]
        [(3, 64, 96), (64, 32, 48), (64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 4, 6)]
    """

    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        output_stride: int = 32,
        width: float = 1.0,
        *,
        dilation_style: DilationStyle = "torchvision",
        msra: bool = False,
    ):
        super().__init__()
        if depth not in LAYERS:
            raise ValueError(f"ResNet: depth is {depth}; use one of {', '.join(map(str, LAYERS))}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"ResNet: output_stride is {output_stride}; use 8, 16 or 32")
        if dilation_style not in ("torchvision", "smp"):
            raise ValueError(f'ResNet: dilation_style is {dilation_style!r}; use "torchvision" or "smp"')
        bottleneck, blocks = LAYERS[depth]
        if msra and not bottleneck:
            raise ValueError(f"ResNet: depth is {depth}; msra strides in a bottleneck's first 1x1, use 50 or 101")
        channels = scaled(WIDTHS[0], width, "ResNet")
        self.conv1 = nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=msra)
        self.out_channels = [in_channels, channels]
        block = partial(Bottleneck, stride_first=msra) if bottleneck else BasicBlock
        reached, dilation = 4, 1
        for i, nominal in enumerate(WIDTHS):
            stride, first_dilation = 1, dilation
            if i > 0 and reached < output_stride:
                stride, reached = 2, 2 * reached
            elif i > 0:
                dilation *= 2
                first_dilation = dilation if dilation_style == "smp" else dilation // 2
            mid_channels = scaled(nominal, width, "ResNet")
            out_channels = mid_channels * (EXPANSION if bottleneck else 1)
            # Not taken from the stride, which dilation may replace: the wiring must not change.
            project = i > 0 or channels != out_channels
            layer = [block(channels, mid_channels, stride, first_dilation, project)]
            layer += [block(out_channels, mid_channels, 1, dilation, False) for _ in range(1, blocks[i])]
            setattr(self, f"layer{i + 1}", nn.Sequential(*layer))
            channels = out_channels
            self.out_channels.append(channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, in_channels, H, W) -> six maps; entry i has stride 2^i, capped at the output stride; entry 0 is ``x``."""
        features = [x, run_conv_norm_act(x, self.conv1, self.bn1, self.relu)]
        y = self.maxpool(features[1])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            y = layer(y)
            features.append(y)
        return features


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the residual add.

    Args:
        in_channels: channels in.
        channels: channels out.
        stride: of the first convolution.
        dilation: of both, in pixels; their padding is the same.
        project: True for a strided 1x1 convolution and a batch norm in the skip.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, dilation: int, project: bool):
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride, dilation)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)  # of both; in torchvision's place, so that the block prints alike
        self.conv2 = _conv3x3(channels, channels, 1, dilation)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _projection(in_channels, channels, stride) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, ceil(H / stride), ceil(W / stride))."""
        y = run_conv_norm_act(x, self.conv1, self.bn1, self.relu)
        skip = x if self.downsample is None else self.downsample(x)
        return run_conv_norm_act(y, self.conv2, self.bn2, self.relu, skip)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution and the residual add.

    Args:
        in_channels: channels in.
        channels: width of the 3x3 convolution; a quarter of the channels out.
        stride: of the 3x3 convolution, or of the first.
        dilation: of the 3x3 convolution, in pixels; its padding is the same.
        project: True for a strided 1x1 convolution and a batch norm in the skip.
        stride_first: True if the first 1x1 convolution has the stride, False if the 3x3.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, dilation: int, project: bool, *, stride_first: bool = False
    ):
        super().__init__()
        out_channels = channels * EXPANSION
        self.conv1 = nn.Conv2d(in_channels, channels, 1, stride if stride_first else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels, 1 if stride_first else stride, dilation)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)  # of all three
        self.downsample = _projection(in_channels, out_channels, stride) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, 4 * channels, ceil(H / stride), ceil(W / stride))."""
        y = run_conv_norm_act(x, self.conv1, self.bn1, self.relu)
        y = run_conv_norm_act(y, self.conv2, self.bn2, self.relu)
        skip = x if self.downsample is None else self.downsample(x)
        return run_conv_norm_act(y, self.conv3, self.bn3, self.relu, skip)


def _conv3x3(in_channels: int, out_channels: int, stride: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)


def _projection(in_channels: int, out_channels: int, stride: int) -> Sequential:
    """The 1x1 convolution and norm of a skip that changes width or size."""
    return Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
