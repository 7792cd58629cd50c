"""Convolutions on a CPU with weights packed once into oneDNN's own layout.

torch's convolution reorders its weights at every call, and runs a 1x1 on the BLAS. On a processor for which the BLAS is
not tuned, the packed call takes 0.4 of the time. The calls are private to torch (``torch.ops.mkldnn``). ``why_not``
says why they cannot be used; nothing is packed then.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg.ops.core.constants import plainly
from fastseg.ops.core.torch_private import (
    mkldnn_convolution,
    mkldnn_reorder,
    mkldnn_reorder_transposed,
    mkldnn_transposed_convolution,
)

DTYPES = (torch.float32, torch.bfloat16)
_PADDED = 256  # products for a value of the result from which filters of zeros pay


class Packed:
    """A convolution with packed weight and bias; a call with a map returns the result in channels_last.

    Of a weight with filters of zeros at its end, ``channels`` says how many to give.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, geometry: tuple, after: tuple[str, str] = ("none", ""),
        channels: int | None = None,
    ):  # fmt: skip
        self.weight, self.bias, self.geometry, self.after, self.channels = weight, bias, geometry, after, channels

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, COUT, OH, OW)."""
        padding, stride, dilation, groups = self.geometry
        name, algorithm = self.after
        y = mkldnn_convolution(x, self.weight, self.bias, padding, stride, dilation, groups, name, [], algorithm)
        return y if self.channels is None else y[:, : self.channels].contiguous(memory_format=torch.channels_last)

    def activated(self, name: str, algorithm: str = "") -> "Packed":
        """The same with an activation of oneDNN's behind it; take one that keeps NaN: swish, gelu or hardswish."""
        return Packed(self.weight, self.bias, self.geometry, (name, algorithm), self.channels)


class PackedTransposed:
    """A transposed convolution with packed weight and bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None, geometry: tuple):
        self.weight, self.bias, self.geometry = weight, bias, geometry

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, COUT, OH, OW)."""
        return mkldnn_transposed_convolution(x, self.weight, self.bias, *self.geometry, "none", [], "")


def pack(
    weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int, shape: Sequence[int],
) -> Packed:  # fmt: skip
    """Pack ``weight`` for maps of ``shape`` (N, C, H, W); other shapes work too, some of them slowly."""
    geometry, channels = (list(padding), list(stride), list(dilation), groups), None
    if (more := _missing(weight, groups)) > 0:
        channels = weight.shape[0]
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, more))
        bias = None if bias is None else F.pad(bias, (0, more))
    return Packed(mkldnn_reorder(weight, *geometry, list(shape)), bias, geometry, channels=channels)


def _missing(weight: Tensor, groups: int) -> int:
    """How many filters of zeros to add: oneDNN takes eight channels at a time, and more time for a rest than for eight.

    21 channels padded to 24 take 0.74 to 0.85 of the time on one thread and 0.77 to 0.89 on two, 5 to 19 channels 0.8
    to 0.95, the copy of the result included; with few products a value, or taps of one pixel, the copy costs as much.
    """
    cout, products = weight.shape[0], weight[0].numel()
    pays = groups == 1 and weight.shape[2:] != (1, 1) and products >= _PADDED and 4 < cout < 32
    return -cout % 8 if pays else 0


def pack_transposed(
    weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], output_padding: Sequence[int],
    dilation: Sequence[int], groups: int, x: Tensor,
) -> PackedTransposed | None:  # fmt: skip
    """Pack ``weight`` (C, COUT // groups, K, K) of a transposed convolution for maps like ``x``; None if torch cannot,
    or gives another result for ``x``.
    """
    if mkldnn_transposed_convolution is None or mkldnn_reorder_transposed is None or why_not(x.dtype):
        return None
    geometry = ([*padding], [*output_padding], [*stride], [*dilation], groups)
    try:
        with torch.no_grad():
            run = PackedTransposed(
                mkldnn_reorder_transposed(weight.contiguous(), *geometry, [*x.shape]), bias, geometry
            )
            want = F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)
            near = torch.allclose(run(x), want, 1e-2, 1e-2 * float(want.abs().max()), equal_nan=True)
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    return run if near else None


@functools.cache
def why_not(dtype: torch.dtype = torch.float32) -> str:
    """Why this torch packs no weights of ``dtype`` on this processor, or ""."""
    if dtype not in DTYPES:
        return f"oneDNN packs no {dtype}"
    if not torch.backends.mkldnn.is_available():
        return "torch was built without oneDNN"
    if mkldnn_convolution is None or mkldnn_reorder is None:
        return "this version of torch has no packed convolution"
    try:
        with plainly():
            x, w = (torch.ones(*shape, dtype=dtype, device="cpu") for shape in ((1, 2, 3, 3), (2, 2, 1, 1)))
            y = pack(w, None, (1, 1), (0, 0), (1, 1), 1, x.shape)(x)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return f"torch has no packed convolution: {str(error).partition(chr(10))[0]}"
    return "" if bool((y == 2).all()) else "torch's packed convolution gives another result"
