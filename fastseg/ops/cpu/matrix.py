"""1x1 convolutions of few pixels on a CPU, as one product of matrices by MKL.

A map in channels_last is the matrix (pixels, channels) already. oneDNN's packed call takes 45 us before it computes
anything, MKL's 10. Where that counts, and where MKL computes as fast: a product with few columns is slower in MKL from
some hundred pixels on, one of a large matrix with few pixels reads the weight at MKL's pace. Share of the packed call's
time, one and two threads of an AVX2 processor, a ReLU behind both (``python -m benchmarks.studies.few_pixels``; with
threads that sleep while they wait, ``OMP_WAIT_POLICY=passive``, it is up to 1.2 from 64 pixels on):

| channels | 16 pixels | 64 | 256 | 1024 | 4096 | 16384 |
| --- | --- | --- | --- | --- | --- | --- |
| 16 to 64 | .28, .31 | .31, .33 | .39, .42 | .61, .59 | .86, .79 | 1.00, .95 |
| 24 to 144 | .30, .33 | .37, .37 | .51, .52 | .74, .66 | .85, .91 | .74, .66 |
| 40 to 240 | .34, .35 | .46, .44 | .67, .60 | .88, .84 | .83, .94 | |
| 64 to 384 | .45, .42 | .61, .56 | .83, .78 | .91, .95 | | |
| 160 to 960 | .88, .98 | .97, 1.04 | .97, 1.01 | | | |
| 320 to 1280 | 1.12, 1.27 | 1.12, 1.19 | | | | |
| 64 to 64 | .31, .32 | .37, .36 | .55, .50 | .80, .71 | .98, .96 | .94, 1.06 |
| 256 to 256 | .61, .58 | .77, .73 | .94, .88 | 1.02, 1.04 | | |
| 144 to 24 | .31, .32 | .39, .36 | .63, .51 | 1.03, .87 | 1.30, 1.17 | 1.38, 1.42 |
| 384 to 64 | .43, .41 | .63, .53 | .90, .78 | 1.06, 1.08 | | |
| 672 to 112 | .63, .56 | .84, .72 | 1.02, .95 | | | |
| 256 to 21 | .35, .35 | .53, .44 | .93, .70 | 1.39, 1.25 | 1.63, 1.60 | |
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_WIDE, _HALF, _NARROW = 2**14, 1024, 256  # most pixels: as many channels out as in, half of them, fewer
_ALONE, _SHARED = 256, 64  # most pixels where oneDNN's call computes the activation as well, on one thread and several
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


def pays(shape: Sequence[int], weight: Tensor, geometry: tuple, *, activated: bool = False) -> bool:
    """True if the product is faster than oneDNN's packed call for maps of ``shape`` (N, C, H, W).

    With ``activated`` an activation follows that oneDNN's call computes and the product leaves to a call of its own.
    """
    if weight.shape[2:] != (1, 1) or geometry != PLAIN or weight.dtype != torch.float32:
        return False
    if not torch.backends.mkl.is_available():
        return False
    pixels, (cout, channels) = shape[0] * shape[2] * shape[3], weight.shape[:2]
    most = _WIDE if cout >= channels else _HALF if 2 * cout >= channels else _NARROW
    if activated:
        most = _SHARED if torch.get_num_threads() > 1 else _ALONE
    return pixels == 1 or (pixels <= most and weight.numel() < _MOST_WEIGHTS)
