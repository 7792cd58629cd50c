"""Alternatives to SegNet's unpooling: interpolation, or a learnt transposed convolution."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from fastseg.nn.upsampling import upsample_bilinear

Up = Literal["unpool", "bilinear", "transpose"]
UPS = ("unpool", "bilinear", "transpose")


class Rise(nn.Module):
    """Upsample (N, C, h, w) to (N, C, H, W), the size before a 2x2 pooling in ceil mode.

    Args:
        up: "bilinear", an interpolation (``align_corners=False``) straight to the size, without parameters; or
            "transpose", a 2x2 transposed convolution of stride 2 with bias, whose last row and column are cropped if H
            or W is odd.
        channels: C.
    """

    def __init__(self, up: Up, channels: int):
        super().__init__()
        self.deconv = nn.ConvTranspose2d(channels, channels, 2, 2) if up == "transpose" else None

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        if self.deconv is None:
            return upsample_bilinear(x, (size[0], size[1]))
        return self.deconv(x)[..., : size[0], : size[1]]


def rises(up: Up, channels: Sequence[int], net: str) -> nn.ModuleList:
    """A ``Rise`` for each decoder stage, whose inputs have ``channels``; none if ``up`` is "unpool".

    Raises:
        ValueError: ``up`` is unknown.
    """
    if up not in UPS:
        raise ValueError(f"{net}: up is {up!r}; use one of {', '.join(UPS)}")
    return nn.ModuleList() if up == "unpool" else nn.ModuleList(Rise(up, C) for C in channels)
