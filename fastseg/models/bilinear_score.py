"""Class maps and losses of scores upsampled by a bilinear transposed convolution.

With kernel 2 * stride and an even stride, that convolution equals an interpolation (``align_corners=False``) of the
scores framed by zeros, with the bias added to both. So class map and loss go through the fused heads, which never store
full-size scores; results are equal up to rounding. If the weight is trained, or was loaded as something else than the
bilinear kernel, the full-size scores are computed.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.nn.fuse.watch import watched
from fastseg.nn.loss import criterion as criterion_of
from fastseg.nn.upsampling import BilinearConvTranspose2d, UpsampleArgmax


def upsampled(
    upsample: nn.Module, scores: Tensor, size: tuple[int, int] | None, *, skip: Tensor | None = None, offset: int = 0
) -> Tensor:
    """``upsample(scores)`` cropped to ``size`` at the bottom and right, plus the window of ``skip`` at ``offset``.
    One kernel does both. If ``upsample`` is watched or is another module, they run one after another.
    """
    if not watched(upsample, BilinearConvTranspose2d):
        return upsample(scores, size, skip=skip, skip_offset=offset)
    y = upsample(scores)
    if size is not None:
        y = y[..., : size[0], : size[1]]
    if skip is None:
        return y
    height, width = y.shape[-2:]
    return y + skip[..., offset : offset + height, offset : offset + width]


def class_map(
    upsample: nn.Module, scores: Tensor, size: tuple[int, int], *, confidence: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Return ``upsample(scores, size).argmax(1)``: (N, C, h, w) -> (N, *size), uint8 for up to 256 classes.

    With ``confidence`` the probabilities of these classes too.
    """
    if watched(upsample, BilinearConvTranspose2d) or upsample._kind() != "bilinear":
        return UpsampleArgmax(scale_factor=1)(upsampled(upsample, scores, size), confidence=confidence)
    framed, (top, left) = _framed(upsample, scores, size)
    found = UpsampleArgmax(scale_factor=upsample.stride[0])(framed, confidence=confidence)
    cut = lambda y: y[:, top : top + size[0], left : left + size[1]].contiguous()
    return tuple(map(cut, found)) if confidence else cut(found)


def cross_entropy(upsample: nn.Module, scores: Tensor, target: Tensor, **options: Any) -> Tensor:
    """``cross_entropy(upsample(scores, target.shape[1:]), target)``; options of ``SegmentationNet.loss``."""
    criterion = criterion_of(**options)
    height, width = size = target.shape[-2:]
    if target.dim() != 3 or watched(upsample, BilinearConvTranspose2d) or upsample._kind() != "bilinear":
        return criterion(upsampled(upsample, scores, size), target)
    framed, (top, left) = _framed(upsample, scores, size)
    bottom, right = (
        n * upsample.stride[0] - begin - side
        for n, begin, side in zip(framed.shape[2:], (top, left), size, strict=True)
    )
    if not target.dtype.is_signed and not 0 <= criterion.ignore_index <= 255:
        target = target.int()
    target = F.pad(target, (left, right, top, bottom), value=criterion.ignore_index)
    loss = criterion(framed, target)
    return loss[:, top : top + height, left : left + width] if criterion.reduction == "none" else loss


def _framed(upsample: BilinearConvTranspose2d, scores: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The framed scores whose interpolation holds ``upsample(scores, size)``, and its first row and column there.

    Pixel y of the transposed convolution without padding is pixel y + stride / 2 of the interpolation of the scores
    framed by one zero. Rows and columns of scores that the window does not touch are left out.
    """
    stride, padding = upsample.stride[0], upsample.padding[0]
    assert upsample.kernel_size[0] == 2 * stride and stride % 2 == 0
    begin = padding + stride // 2
    frame: list[int] = []
    places = []
    for n, side in zip(scores.shape[2:], size, strict=True):
        first, last = ((2 * y + 1 - stride) // (2 * stride) for y in (begin, begin + side - 1))  # their left taps
        frame = [1 - first, last + 1 - n, *frame]
        places.append(begin - first * stride)
    framed = F.pad(scores, frame)
    return framed if upsample.bias is None else framed + upsample.bias[:, None, None], (places[0], places[1])
