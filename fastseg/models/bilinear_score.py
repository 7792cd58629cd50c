"""FCN's fixed bilinear transposed convolutions, and class maps and losses through the last of them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.nn.loss import UpsampleCrossEntropyLoss
from fastseg.nn.upsampling import UpsampleArgmax


def deconvolution(channels: int, stride: int, *, padding: int, bias: bool = False, trainable: bool) -> nn.Module:
    """A transposed convolution with the bilinear kernel of size 2 * stride; its weight is frozen unless trainable."""
    module = nn.ConvTranspose2d(channels, channels, 2 * stride, stride, padding, bias=bias)
    module.weight.data.copy_(_bilinear_weight(module))
    module.weight.requires_grad_(trainable)
    return module


def _bilinear_weight(module: nn.ConvTranspose2d) -> Tensor:
    channels, size = module.in_channels, module.kernel_size[0]
    taps = 1 - (torch.arange(size, dtype=torch.float64) - (size - 1) / 2).abs() / (size // 2)
    kernel = torch.eye(channels, dtype=torch.float64)[:, :, None, None] * (taps[:, None] * taps)
    return kernel.to(module.weight)


def is_bilinear(module: nn.ConvTranspose2d) -> bool:
    """Whether the weight is the fixed bilinear kernel: neither learnt nor loaded otherwise."""
    return not module.weight.requires_grad and torch.equal(module.weight, _bilinear_weight(module))


class BilinearScore:
    """Class scores of an image: the window of a transposed convolution that begins at ``offset`` on both axes.

    With the bilinear kernel it is an interpolation (``align_corners=False``) of the scores within a frame of zeros, the
    bias added to both: so class map and loss go through the fused heads, which build no scores at full resolution.
    Equal to rounding; where the kernel is learnt, the scores are built.

    Args:
        module: transposed convolution, kernel 2 * stride, even stride.
        offset: first row and column of the window, in pixels.
    """

    def __init__(self, module: nn.ConvTranspose2d, offset: int):
        self.module = module
        self.offset = offset

    def full(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """(N, C, h, w) -> (N, C, *size)."""
        rows, columns = (slice(self.offset, self.offset + side) for side in size)
        return self.module(scores)[:, :, rows, columns]

    def class_map(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """(N, C, h, w) -> ``full(scores, size).argmax(1)``, (N, *size); uint8 up to 256 classes."""
        if not is_bilinear(self.module):
            return UpsampleArgmax(scale_factor=1)(self.full(scores, size))
        framed, (top, left), factor = self._framed(scores, size)
        classes = UpsampleArgmax(scale_factor=factor)(framed)
        return classes[:, top : top + size[0], left : left + size[1]].contiguous()

    def cross_entropy(self, scores: Tensor, target: Tensor, **options) -> Tensor:
        """``cross_entropy(full(scores, target.shape[1:]), target)``; options of ``UpsampleCrossEntropyLoss``."""
        criterion = UpsampleCrossEntropyLoss(**options)
        height, width = size = target.shape[-2:]
        if target.dim() != 3 or not is_bilinear(self.module):
            return criterion(self.full(scores, size), target)
        framed, (top, left), factor = self._framed(scores, size)
        if target.dtype == torch.uint8 and not 0 <= criterion.ignore_index <= 255:
            target = target.int()
        bottom, right = (
            factor * n - side - begin for n, side, begin in zip(framed.shape[2:], size, (top, left), strict=True)
        )
        target = F.pad(target, (left, right, top, bottom), value=criterion.ignore_index)
        loss = criterion(framed, target)
        return loss[:, top : top + height, left : left + width] if criterion.reduction == "none" else loss

    def _framed(self, scores: Tensor, size: tuple[int, int]) -> tuple[Tensor, list[int], int]:
        """Scores that, interpolated, hold the window, and where it begins in them; the factor.

        Pixel y of the unpadded transposed convolution is pixel y + factor / 2 of the interpolation of the scores
        within one frame of zeros. Rows and columns of scores that the window does not touch are left out.
        """
        factor = self.module.stride[0]
        frame, begins = [], []
        for n, side in zip(scores.shape[2:], size, strict=True):
            begin = self.offset + self.module.padding[0] + factor // 2
            first, last = ((2 * y + 1 - factor) // (2 * factor) for y in (begin, begin + side - 1))  # left taps
            frame = [1 - first, last + 1 - n, *frame]
            begins.append(begin - first * factor)
        framed = F.pad(scores, frame)
        return framed if self.module.bias is None else framed + self.module.bias[:, None, None], begins, factor
