"""3D U-Net: an encoder-decoder of volumes with skip connections at every scale."""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.models.unet import UShape
from fastseg.nn.pooling import MaxPool3d
from fastseg.nn.upsampling import Upsample

WIDTHS = (64, 128, 256, 512)

Padding = Literal["valid", "same"]
Up = Literal["transpose", "trilinear"]


class UNet3d(UShape):
    """3D U-Net (Cicek, Abdulkadir, Lienkamp, Brox and Ronneberger, arXiv:1606.06650), as published and padded.

    Each scale has two 3x3x3 convolutions with batch norm and ReLU, and a 2x2x2 max pooling. The first convolution of
    an encoder's scale has half of its width, so that channels are doubled before each pooling. On the way up, the
    volume is doubled by a 2x2x2 transposed convolution and concatenated with the encoder's of that scale, and two
    convolutions follow; a 1x1x1 convolution ends the net. Names are those of ``UNet``.

    - ``padding="valid"``, the paper's: logits cover the volume without ``margin`` voxels at each side (44 with four
      widths: 132x132x116 -> 44x44x28), and encoder maps are cropped. With n + 1 widths a side is -4 modulo
      ``stride`` = 2^n.
    - ``padding="same"``: logits of the volume's size, for any side of ``stride`` voxels or more; where an odd side was
      halved, zeros pad the upsampled volume.

    Args:
        num_classes: classes, background included.
        in_channels: channels of the volume.
        padding: "valid" or "same".
        norm: True for a batch norm before each ReLU; the convolutions have biases in any case, as the paper's.
        up: "transpose", a 2x2x2 transposed convolution that keeps the channels, or "trilinear", an interpolation.
        widths: channels at each scale, the finest first.
        dropout: probability of dropout on the deepest volume, in training; the paper has none.

    Raises:
        ValueError: the value of an option is out of range.

    Example:
        >>> model = UNet3d(num_classes=2, in_channels=1, padding="same", widths=(8, 16)).eval()
        >>> model(torch.randn(1, 1, 9, 8, 7)).shape
        torch.Size([1, 2, 9, 8, 7])
    """

    unit = "voxels"

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        padding: Padding = "valid",
        norm: bool = True,
        up: Up = "transpose",
        widths: Sequence[int] = WIDTHS,
        *,
        dropout: float = 0.0,
    ):
        super().__init__(num_classes, align_corners=None)
        for name, value, known in (("padding", padding, ("valid", "same")), ("up", up, ("transpose", "trilinear"))):
            if value not in known:
                raise ValueError(f'UNet3d: {name} is {value!r}; use "{known[0]}" or "{known[1]}"')
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"UNet3d: widths are {tuple(widths)}; give two or more positive numbers")
        self.padding, self.depth = padding, len(widths) - 1
        pad = int(padding == "same")
        self.inc = DoubleConv3d(in_channels, widths[0], max(1, widths[0] // 2), padding=pad, norm=norm)
        for i, (inputs, width) in enumerate(itertools.pairwise(widths), 1):
            conv = DoubleConv3d(inputs, width, max(1, width // 2), padding=pad, norm=norm)
            self.add_module(f"down{i}", _Down(conv))
        self.dropout = nn.Dropout(dropout)
        channels = widths[-1]
        for i, skip in enumerate(reversed(widths[:-1]), 1):
            rise: nn.Module = Upsample(scale_factor=2, mode="trilinear")
            if up == "transpose":
                rise = nn.ConvTranspose3d(channels, channels, 2, stride=2)
            conv = DoubleConv3d(channels + skip, skip, skip, padding=pad, norm=norm)
            self.add_module(f"up{i}", _Up(rise, conv, crop=not pad))
            channels = skip
        self.outc = _Classifier(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 5:
            raise ValueError(f"UNet3d: x is {tuple(x.shape)}; give (N, in_channels, D, H, W)")
        super()._check(x)


class DoubleConv3d(nn.Module):
    """Two 3x3x3 convolutions with bias, each with batch norm, if it is asked for, and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, mid: int, *, padding: int, norm: bool):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((in_channels, mid), (mid, out_channels)):
            layers.append(nn.Conv3d(inputs, outputs, 3, padding=padding))
            layers += [nn.BatchNorm3d(outputs), nn.ReLU()] if norm else [nn.ReLU()]
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class _Down(nn.Module):
    def __init__(self, conv: nn.Module):
        super().__init__()
        self.maxpool_conv = nn.Sequential(MaxPool3d(2), conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class _Up(nn.Module):
    def __init__(self, up: nn.Module, conv: nn.Module, *, crop: bool):
        super().__init__()
        self.up, self.conv, self.crop = up, conv, crop

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        if self.crop:
            for dim in (2, 3, 4):
                skip = skip.narrow(dim, (skip.shape[dim] - x.shape[dim]) // 2, x.shape[dim])
        else:
            missing = [skip.shape[dim] - x.shape[dim] for dim in (4, 3, 2)]
            if isinstance(missing[0], Tensor) or any(missing):  # a trace holds for sizes where some are missing
                x = F.pad(x, [n for m in missing for n in (m // 2, m - m // 2)])
        return self.conv(torch.cat([skip, x], 1))


class _Classifier(nn.Module):
    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)
