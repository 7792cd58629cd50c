"""Ahead-of-time cases of the bilinear kernels: interpolation and the transposed convolution, forward and backward."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastseg.kernels.upsample.bilinear import Taps, bilinear_fwd, interpolation
from fastseg.kernels.upsample.bilinear_bwd import bilinear_bwd
from fastseg.kernels.upsample.conv import upsample_conv_fwd
from fastseg.kernels.upsample.sum import upsample_sum_fwd


def _map(dtype: torch.dtype, channels_last: bool, *shape: int) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def _upsample(
    dtype: torch.dtype, N: int, C: int, H: int, W: int, factor: float, *,
    align_corners: bool = False, channels_last: bool = True, backward: bool = False, beside: int = 0,
) -> None:  # fmt: skip
    """``beside``: channels of a skip, in the map that the output is a slice of."""
    out = (int(H * factor), int(W * factor))
    high = _map(dtype, channels_last, N, C + beside, *out)[:, beside:]
    taps = interpolation((H, W), out, align_corners, (None, None))
    if backward:
        bilinear_bwd(high, (H, W), taps, channels_last)
    else:
        low = _map(dtype, channels_last, N, C, H, W)
        bilinear_fwd(low, out, taps, channels_last, into=high if beside else None)


def _deconv(
    dtype: torch.dtype, N: int, C: int, H: int, W: int, S: int, *,
    K: int = 0, padding: int = 0, channels_last: bool = True, backward: bool = False, skip: bool = False,
) -> None:  # fmt: skip
    K = K or 2 * S
    out = tuple((n - 1) * S + K - 2 * padding for n in (H, W))
    taps = Taps("kernel", stride=S, kernel=K, padding=padding)
    if backward:
        bilinear_bwd(_map(dtype, channels_last, N, C, *out), (H, W), taps, channels_last)
        return
    other = _map(dtype, channels_last, N, C, out[0] + 10, out[1] + 10) if skip else None
    bias = torch.empty(C, dtype=dtype, device="meta")
    bilinear_fwd(_map(dtype, channels_last, N, C, H, W), out, taps, channels_last, other, 5, bias if skip else None)


def _conv(dtype: torch.dtype, N: int, C: int, H: int, W: int, out: tuple[int, int], align_corners: bool) -> None:
    """Nine taps onto the other half of a decoder's convolution, with bias and ReLU."""
    taps = torch.empty(3, N, H, W, 3, C, dtype=dtype, device="meta")
    bias = torch.empty(C, dtype=dtype, device="meta")
    upsample_conv_fwd(taps, _map(dtype, True, N, C, *out), bias, "relu", out, align_corners)


def _sum(
    dtype: torch.dtype, N: int, C: int, H: int, W: int, levels: int, *,
    align_corners: bool = False, channels_last: bool = True, norm: bool = True,
) -> None:  # fmt: skip
    """``levels`` maps of a half, a quarter and an eighth of (H, W) onto one of it."""
    base, *maps = [_map(dtype, channels_last, N, C, max(1, H >> i), max(1, W >> i)) for i in range(levels + 1)]
    vector = torch.empty(C, dtype=dtype, device="meta") if norm else None
    act = "relu" if norm else "none"
    upsample_sum_fwd(base, maps, vector, vector, act, align_corners, channels_last)


# Batches of the large cases put the largest map past 2^31 elements.
_DECODER = (528, 256, 32, 32, 4)  # DeepLabV3+'s decoder at 512^2
_VOC = (400, 21, 128, 128, 4)  # its logits
_ADE = (56, 150, 128, 128, 4)
_UNET = (80, 64, 256, 256, 2)  # U-Net's last skip connection at 512^2
_FCN = (400, 21, 64, 64, 8)  # FCN-8s's last transposed convolution

CASES: dict[str, Callable[[torch.dtype], None]] = {
    "upsample 256 channels 32->128": lambda dtype: _upsample(dtype, *_DECODER),
    "upsample 256 channels 32->128, backward": lambda dtype: _upsample(dtype, *_DECODER, backward=True),
    "upsample 256 channels 32->128, corners, backward": lambda dtype: _upsample(
        dtype, *_DECODER, align_corners=True, backward=True
    ),
    "upsample 64 channels 256->512 beside 64": lambda dtype: _upsample(dtype, *_UNET, beside=64),
    "upsample 64 channels 256->512 beside 64, backward": lambda dtype: _upsample(
        dtype, *_UNET, beside=64, backward=True
    ),
    "upsample 64 channels 256->512 beside 64, NCHW": lambda dtype: _upsample(
        dtype, *_UNET, beside=64, channels_last=False
    ),
    "upsample 64 channels 256->512 beside 64, NCHW, backward": lambda dtype: _upsample(
        dtype, *_UNET, beside=64, channels_last=False, backward=True
    ),
    "upsample 21 channels 128->512": lambda dtype: _upsample(dtype, *_VOC),
    "upsample 21 channels 128->512, backward": lambda dtype: _upsample(dtype, *_VOC, backward=True),
    "upsample 150 channels 128->512": lambda dtype: _upsample(dtype, *_ADE),
    "upsample 150 channels 128->512, backward": lambda dtype: _upsample(dtype, *_ADE, backward=True),
    "upsample 21 channels 128->512, NCHW": lambda dtype: _upsample(dtype, *_VOC, channels_last=False),
    "upsample 21 channels 128->512, NCHW, backward": lambda dtype: _upsample(
        dtype, *_VOC, channels_last=False, backward=True
    ),
    "upsample 37x41->63x70, NCHW": lambda dtype: _upsample(dtype, 2, 21, 37, 41, 1.71, channels_last=False),
    "upsample 37x41->63x70, NCHW, backward": lambda dtype: _upsample(
        dtype, 2, 21, 37, 41, 1.71, channels_last=False, backward=True
    ),
    "convolution of upsampled 256 channels 32->128": lambda dtype: _conv(dtype, 528, 256, 32, 32, (128, 128), True),
    "convolution of upsampled 64 channels 37x41->63x70": lambda dtype: _conv(dtype, 2, 64, 37, 41, (63, 70), False),
    "sum of 3 levels, 256 channels 128^2, norm and ReLU": lambda dtype: _sum(dtype, 528, 256, 128, 128, 3),
    "sum of 3 levels, 768 channels 64^2, corners": lambda dtype: _sum(
        dtype, 8, 768, 64, 64, 3, align_corners=True, norm=False
    ),
    "sum of 2 levels, 21 channels 128^2": lambda dtype: _sum(dtype, 400, 21, 128, 128, 2, norm=False),
    "sum of 1 level, 64 channels 37x41, NCHW": lambda dtype: _sum(dtype, 2, 64, 37, 41, 1, channels_last=False),
    "deconv 21 channels k16 s8": lambda dtype: _deconv(dtype, *_FCN, padding=4),
    "deconv 21 channels k16 s8, backward": lambda dtype: _deconv(dtype, *_FCN, padding=4, backward=True),
    "deconv 21 channels k16 s8, NCHW, backward": lambda dtype: _deconv(
        dtype, *_FCN, padding=4, channels_last=False, backward=True
    ),
    "deconv 64 channels k5 s3, bias and skip": lambda dtype: _deconv(dtype, 2, 64, 64, 64, 3, K=5, skip=True),
    "deconv 64 channels k5 s3, backward": lambda dtype: _deconv(dtype, 2, 64, 64, 64, 3, K=5, backward=True),
    "deconv 21 channels k4 s2, bias and skip, NCHW": lambda dtype: _deconv(
        dtype, 16, 21, 16, 16, 2, skip=True, channels_last=False
    ),
}

# Kernel or case -> why its global loads cannot be 128 bits wide.
SCALAR_LOADS: dict[str, str] = {
    **{
        case: "pixels do not begin at multiples of 16 bytes: taps are loaded one by one, stores are wide"
        for case in CASES
        if " 21 channels" in case or " 150 channels" in case
    },
    **{case: "NCHW: the taps of neighbouring columns are no run" for case in CASES if "NCHW" in case},
}
