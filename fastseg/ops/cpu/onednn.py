"""Convolutions on a CPU with weights packed once into oneDNN's own layout.

torch's convolution reorders its weights at every call, and runs a 1x1 on the BLAS. On a processor for which the BLAS is
not tuned, the packed call takes 0.4 of the time. The calls are private to torch (``torch.ops.mkldnn``). ``why_not``
says why they cannot be used; nothing is packed then.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg.ops.core.constants import plainly
from fastseg.ops.core.torch_private import mkldnn_convolution, mkldnn_reorder


class Packed:
    """A convolution with packed weight and bias; a call with a map returns the result in channels_last."""

    def __init__(self, weight: Tensor, bias: Tensor | None, geometry: tuple):
        self.weight, self.bias, self.geometry = weight, bias, geometry

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, COUT, OH, OW)."""
        padding, stride, dilation, groups = self.geometry
        return mkldnn_convolution(x, self.weight, self.bias, padding, stride, dilation, groups, "none", [], "")


def pack(
    weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int, shape: Sequence[int],
) -> Packed:  # fmt: skip
    """Pack ``weight`` for maps of ``shape`` (N, C, H, W); other shapes work too, some of them slowly."""
    geometry = (list(padding), list(stride), list(dilation), groups)
    return Packed(mkldnn_reorder(weight, *geometry, list(shape)), bias, geometry)


@functools.cache
def why_not(dtype: torch.dtype = torch.float32) -> str:
    """Why this torch packs no weights of ``dtype`` on this processor, or ""."""
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
