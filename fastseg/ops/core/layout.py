"""Memory formats: which one a tensor has, and outputs laid out as inputs."""

import torch
from torch import Tensor

from fastseg.ops.core.dispatch import transforms_active

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_OUTWARDS = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The format that torch's own kernels answer ``x`` with: channels_last(_3d) where the strides say so, dense or not.

    Strides tell the two apart at one pixel and at one channel, where a map is dense in both: it stays what it was.
    Contiguous for what is neither 4-D nor 5-D.
    """
    last = _CHANNELS_LAST.get(x.dim())
    if last is None or transforms_active():  # vmap knows no other format
        return torch.contiguous_format
    shape, strides = x.shape, x.stride()
    channel = strides[1]
    if channel == 0:
        return torch.contiguous_format
    least = 0  # strides ascend from the channels outwards, in a slice of a channels_last map too
    for d in _OUTWARDS[len(shape)]:
        size, stride = shape[d], strides[d]
        if size == 0 or stride < least or (d == 0 and least == channel):
            return torch.contiguous_format
        least = stride * size
    return last


def channels_last(t: Tensor) -> Tensor:
    """(N, C, H, W), dense with the channels innermost: the only copy a kernel's input goes through, if any."""
    return t if transforms_active() else t.contiguous(memory_format=torch.channels_last)


def like(x: Tensor, y: Tensor) -> Tensor:
    """``y`` in the memory format of ``x``: what comes out is laid out as what went in."""
    return y.contiguous(memory_format=memory_format_of(x))


def settle(x: Tensor) -> tuple[Tensor, bool]:
    """``x`` dense in its memory format, copied only where it is not, and whether that is channels_last."""
    layout = memory_format_of(x)
    return x.contiguous(memory_format=layout), layout == torch.channels_last


def new_map(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised (N, C, H, W) tensor in the dtype and memory format of ``x``."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
