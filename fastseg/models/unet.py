"""U-Net: an encoder-decoder with skip connections at every scale."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastseg.models.base import SegmentationNet, init_kaiming_
from fastseg.nn.fuse.conv_norm_act import convolve
from fastseg.nn.fuse.sequential import Sequential
from fastseg.nn.fuse.upsample_concat import upsample_concat
from fastseg.nn.pooling import MaxPool2d
from fastseg.nn.upsampling import UpsamplingBilinear2d

WIDTHS = (64, 128, 256, 512, 1024)

Padding = Literal["valid", "same"]
Up = Literal["transpose", "bilinear"]


class UShape(SegmentationNet):
    """What U-Nets of maps and of volumes share: the walk down and up, its sizes, and the window that a loss looks at.

    A subclass has ``inc``, ``down1`` to ``down<depth>``, ``dropout``, ``up1`` to ``up<depth>`` and ``outc``.
    """

    unit = "pixels"
    padding: str
    depth: int
    inc: nn.Module
    dropout: nn.Module
    outc: nn.Module

    @property
    def stride(self) -> int:
        """Pixels of the input per pixel of the deepest map. Tiles that begin at multiples of it are pooled as it is."""
        return 2**self.depth

    @property
    def margin(self) -> int:
        """Pixels at each side of the input that the logits do not cover."""
        return 6 * self.stride - 4 if self.padding == "valid" else 0

    def logits(self, x: Tensor) -> Tensor:
        """(N, in_channels, sides) -> logits (N, num_classes, sides - 2 margin); two sides, of a volume three."""
        self._check(x)
        if self.margin and isinstance(x.shape[2], Tensor):  # by torch.jit.trace, which records this view, and no check
            sides = ((side + 4) // self.stride * self.stride - 4 for side in x.shape[2:])
            x = x.view(*x.shape[:2], *sides)  # raises at sides that are not taken
        x = self.inc(innermost(x))
        skips = []
        for i in range(1, self.depth + 1):
            skips.append(x)
            x = getattr(self, f"down{i}")(x)
        x = self.dropout(x)
        for i, skip in enumerate(reversed(skips), 1):
            x = getattr(self, f"up{i}")(x, skip)
        return self.outc(x)

    def loss(self, x: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Cross entropy of ``forward(x)`` and class indices ``target`` (N, sides), of which the logits' window counts.

        ``target`` has the size of the input, or that of the logits. ``options`` are those of
        ``fastseg.nn.UpsampleCrossEntropyLoss``, such as ``ignore_index=255``.

        Raises:
            ValueError: ``target`` has neither size.
        """
        m, axes = self.margin, x.dim() - 2
        if m and target.shape[-axes:] == x.shape[2:]:
            for axis in range(-axes, 0):
                target = target.narrow(axis, m, target.shape[axis] - 2 * m)
        return super().loss(x, target, **options)

    def _check(self, x: Tensor) -> None:
        name, sides = type(self).__name__, x.shape[2:]
        if self.padding == "same":
            if any(side < self.stride for side in sides):
                raise ValueError(
                    f"{name}: x is {tuple(map(int, x.shape))}; a side of {self.stride} {self.unit} or more is needed"
                )
            return
        least = 2 * self.margin + 1
        least += -(least + 4) % self.stride
        if any(side < least or (side + 4) % self.stride for side in sides):
            near = "x".join(str(max(least, side + -(side + 4) % self.stride)) for side in sides)
            raise ValueError(
                f"{name}: x is {tuple(map(int, x.shape))}; without padding a side is {least} + a multiple of "
                f"{self.stride}: pad to {near}, or use padding='same'"
            )


class UNet(UShape):
    """U-Net (Ronneberger, Fischer and Brox, arXiv:1505.04597), as published and in its padded forms.

    Each scale has two 3x3 convolutions with ReLU and a 2x2 max pooling. On the way up, the map is doubled and
    concatenated with the encoder's map of that scale, and two convolutions follow; a 1x1 convolution ends the net.
    Names are those of https://github.com/milesial/Pytorch-UNet, whose nets are ``padding="same", norm=True`` with
    either ``up``.

    - ``padding="valid"``, the paper's: convolutions see no zeros, so logits cover the image without ``margin`` pixels
      at each side (92 with five widths: 572 -> 388), and encoder maps are cropped. A side must be 12 modulo 16, 188 or
      more; with n + 1 widths, -4 modulo ``stride`` = 2^n.
    - ``padding="same"``: logits of the image's size, for any side of ``stride`` pixels or more; where an odd side was
      halved, zeros pad the upsampled map.

    Args:
        num_classes: classes, background included.
        in_channels: channels of the image.
        padding: "valid" or "same".
        norm: True for a batch norm, in place of a bias, after each 3x3 convolution.
        up: "transpose", a 2x2 transposed convolution that halves the channels, or "bilinear", an interpolation
            (``align_corners=True``); there the deepest maps and those that go up have half the width.
        widths: channels at each scale, the finest first.
        dropout: probability of dropout on the deepest map, in training; the paper gives no rate.

    Raises:
        ValueError: the value of an option is out of range.

    Example:
        >>> UNet(num_classes=2, in_channels=1).eval()(torch.randn(1, 1, 188, 204)).shape
        torch.Size([1, 2, 4, 20])
        >>> UNet(num_classes=2, padding="same", norm=True).eval()(torch.randn(1, 3, 65, 47)).shape
        torch.Size([1, 2, 65, 47])
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        padding: Padding = "valid",
        norm: bool = False,
        up: Up = "transpose",
        widths: Sequence[int] = WIDTHS,
        *,
        dropout: float = 0.0,
    ):
        super().__init__(num_classes, align_corners=None)
        if padding not in ("valid", "same"):
            raise ValueError(f'UNet: padding is {padding!r}; use "valid" or "same"')
        check_form("UNet", up, widths)
        self.padding, self.depth = padding, len(widths) - 1
        bilinear = up == "bilinear"
        form = {"padding": int(padding == "same"), "norm": norm}
        self.inc = DoubleConv(in_channels, widths[0], **form)
        channels = widths[0]
        for i, width in enumerate(widths[1:], 1):
            width = max(1, width // 2) if bilinear and i == self.depth else width
            self.add_module(f"down{i}", _Down(channels, width, **form))
            channels = width
        self.dropout = nn.Dropout(dropout)
        for i, skip in enumerate(reversed(widths[:-1]), 1):
            out_channels = max(1, skip // 2) if bilinear and i < self.depth else skip
            self.add_module(f"up{i}", _Up(channels, skip, out_channels, bilinear, **form))
            channels = out_channels
        self.outc = _Classifier(channels, num_classes)
        init_kaiming_(self)


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each with batch norm or bias, and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, mid: int = 0, *, padding: int, norm: bool):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((in_channels, mid or out_channels), (mid or out_channels, out_channels)):
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=padding, bias=not norm))
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()] if norm else [nn.ReLU()]
        self.double_conv = Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class _Down(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, **form):
        super().__init__()
        self.maxpool_conv = nn.Sequential(MaxPool2d(2), DoubleConv(in_channels, out_channels, **form))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class _Up(nn.Module):
    def __init__(self, in_channels: int, skip: int, out_channels: int, bilinear: bool, *, padding: int, norm: bool):
        super().__init__()
        self.up = up_module(in_channels, skip, bilinear)
        channels = skip + (in_channels if bilinear else skip)
        mid = channels // 2 if bilinear else out_channels
        self.conv = DoubleConv(channels, out_channels, mid, padding=padding, norm=norm)
        self.crop = padding == 0

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(upsample_concat(x, [skip], self.up, crop=self.crop))


class _Classifier(nn.Module):
    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.conv, x)


def up_module(in_channels: int, out_channels: int, bilinear: bool) -> nn.Module:
    """Double the size: n -> (n - 1) * 2 + 2 by a 2x2 transposed convolution of stride 2, or by interpolation."""
    if bilinear:
        return UpsamplingBilinear2d(scale_factor=2)
    return nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)


def innermost(x: Tensor) -> Tensor:
    """Convert ``x`` to channels_last on a CPU, where all layers are faster that way, pooling many times."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" and x.dim() == 4 else x


def check_form(name: str, up: str, widths: Sequence[int]) -> None:
    """Check the options that U-Net and UNet++ share."""
    if up not in ("transpose", "bilinear"):
        raise ValueError(f'{name}: up is {up!r}; use "transpose" or "bilinear"')
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"{name}: widths are {tuple(widths)}; give two or more positive numbers")
