"""Memory formats: find a tensor's format, and lay out outputs as inputs."""

import torch
from torch import Tensor

from fastseg.ops.core.dispatch import transforms_active

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_OUTWARDS = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The format of torch's own results for ``x``: channels_last(_3d) if the strides say so, dense or not.

    At one pixel or one channel a map is dense in both formats; its strides tell them apart. Tensors that are neither
    4-D nor 5-D are contiguous.
    """
    last = _CHANNELS_LAST.get(x.dim())
    if last is None or transforms_active():  # vmap has no other format
        return torch.contiguous_format
    shape, strides = x.shape, x.stride()
    channel = strides[1]
    if channel == 0:
        return torch.contiguous_format
    least = 0  # strides ascend from the channels outwards, also in a slice of a channels_last map
    for d in _OUTWARDS[len(shape)]:
        size, stride = shape[d], strides[d]
        if size == 0 or stride < least or (d == 0 and least == channel):
            return torch.contiguous_format
        least = stride * size
    return last


def channels_last(t: Tensor) -> Tensor:
    """Make (N, C, H, W) dense with the channels innermost; the only copy that a kernel's input may need."""
    return t if transforms_active() else t.contiguous(memory_format=torch.channels_last)


def like(x: Tensor, y: Tensor) -> Tensor:
    """``y`` in the memory format of ``x``."""
    return y.contiguous(memory_format=memory_format_of(x))


def settle(x: Tensor) -> tuple[Tensor, bool]:
    """Make ``x`` dense in its memory format, copying only if needed; return it and whether it is channels_last."""
    layout = memory_format_of(x)
    return x.contiguous(memory_format=layout), layout == torch.channels_last


def new_map(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Allocate an uninitialised (N, C, H, W) tensor in the dtype and memory format of ``x``."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
