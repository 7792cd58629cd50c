"""1x1 convolutions of few pixels on a CPU, as one product of matrices by MKL.

A map in channels_last is the matrix (pixels, channels) already. oneDNN's packed call takes 50 us before it computes
anything, MKL's 10. Where that counts, and where MKL computes as fast: a product with few columns is slower in MKL from
some hundred pixels on, one of a large matrix with few pixels reads the weight at MKL's pace, and on two threads MKL's
call waits for both. Share of the packed call's time, one and two threads of an AVX2 processor, ReLU included
(``python -m benchmarks.studies.few_pixels``; nothing else running, waiting threads asleep):

| channels | 1 pixel | 16 | 64 | 256 | 1024 | 2048 |
| --- | --- | --- | --- | --- | --- | --- |
| 16 to 64 | .25, .09 | .31, .70 | .33, .72 | .43, .75 | .61, 1.14 | .75, 1.15 |
| 144 to 24 | .26, .08 | .32, .75 | .41, .72 | .66, .79 | 1.06, .87 | 1.23, 1.18 |
| 64 to 384 | .29, .11 | .46, .76 | .64, .78 | .84, 1.14 | .95, 1.05 | .81, 1.03 |
| 384 to 64 | .31, .09 | .45, .77 | .64, .76 | .92, .84 | 1.06, 1.13 | 1.05, 1.16 |
| 160 to 960 | .44, .19 | .87, .94 | .97, 1.20 | 1.01, 1.09 | | |
| 320 to 1280 | .60, .28 | 1.20, 1.15 | 1.16, 1.33 | | | |
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_WIDE, _NARROW, _SHARED = 1024, 256, 64  # most pixels: as many channels out as in, fewer, and on several threads
_MOST_WEIGHTS = 2**17  # elements
PLAIN = ((1, 1), (0, 0), (1, 1), 1)  # stride, padding, dilation, groups


class Matrix:
    """A 1x1 convolution as a product; a call with a map (N, C, H, W) returns the result in channels_last."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight = weight.detach().flatten(1).t().contiguous()  # (C, COUT)
        self.bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, COUT, H, W)."""
        N, C, H, W = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(-1, C)
        y = torch.mm(pixels, self.weight) if self.bias is None else torch.addmm(self.bias, pixels, self.weight)
        return y.view(N, H, W, -1).permute(0, 3, 1, 2)


def pays(shape: Sequence[int], weight: Tensor, geometry: tuple) -> bool:
    """True if the product is faster than oneDNN's packed call for maps of ``shape`` (N, C, H, W)."""
    if weight.shape[2:] != (1, 1) or geometry != PLAIN or weight.dtype != torch.float32:
        return False
    if not torch.backends.mkl.is_available():
        return False
    pixels, wide = shape[0] * shape[2] * shape[3], weight.shape[0] >= weight.shape[1]
    most = _SHARED if torch.get_num_threads() > 1 else _WIDE if wide else _NARROW
    return pixels == 1 or (pixels <= most and weight.numel() < _MOST_WEIGHTS)
