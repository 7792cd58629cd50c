"""Sizes and layouts of host and kernels alike; no Triton here, so that plain-PyTorch paths read them too."""

import functools
import struct
from collections.abc import Callable

import torch

from fastseg.kernels.runtime.torch_private import is_tracing

MOST_TAPS = 256  # of a pooling window with compact indices: what a code of 8 bits can tell apart


def memoized(fn: Callable) -> Callable:
    """``fn`` of sizes, remembered in eager calls. What has no hash is computed anew: lists, and a graph's symbols."""
    remembered = functools.lru_cache(maxsize=4096, typed=True)(fn)

    @functools.wraps(fn)
    def call(*args):
        if torch.compiler.is_dynamo_compiling() or is_tracing():  # a trace's sizes are tensors
            return fn(*args)
        try:
            return remembered(*args)
        except TypeError:
            return fn(*args)

    call.cache_clear = remembered.cache_clear
    return call


def memoized_as_given(fn: Callable) -> Callable:
    """``memoized`` for what callers give: (8.0, 10.0), which equals (8, 10), is another size."""
    remembered = functools.lru_cache(maxsize=4096, typed=True)(lambda kinds, *args: fn(*args))

    @functools.wraps(fn)
    def call(*args):
        if torch.compiler.is_dynamo_compiling() or is_tracing():
            return fn(*args)
        kinds = []
        for a in args:
            if type(a) is tuple:
                kinds.append(tuple(map(type, a)))
        try:
            return remembered(tuple(kinds), *args)
        except TypeError:
            return fn(*args)

    call.cache_clear = remembered.cache_clear
    return call


@functools.lru_cache(maxsize=4096)  # a look-up is no Python call
def bits_of(value: float) -> int:
    """The bits of ``value`` in fp64 as an int64: kernels that may become plugins take no float scalars."""
    return struct.unpack("q", struct.pack("d", value))[0]


def source_scale(low: int, full: int, align_corners: bool, factor: float | None = None) -> float:
    """Input elements per output element of one axis of a bilinear interpolation, from ``low`` to ``full`` elements.

    A given factor counts, not the quotient of the sizes; but an axis that keeps its size is copied, whatever the factor
    (torch's rule on a CPU; on CUDA it copies where both axes keep their sizes). 0 or None: none was given.
    """
    if low == full:
        return 1.0
    if align_corners:
        return (low - 1) / (full - 1) if full > 1 else 0.0
    return 1.0 / factor if factor is not None and factor > 0 else low / full


def cdiv(n: int, block: int) -> int:
    """Blocks that cover ``n``; Triton's own function takes 1.5 us a call."""
    return -(-n // block)


def unit_of(n: int) -> int:
    """The largest power of 2 up to 16 that divides ``n`` channels.

    A kernel that takes ``n // unit`` as a number, and the unit as a constant, is compiled once for all such channels,
    and knows as much of its addresses as if it were compiled for each.
    """
    return min(n & -n, 16)


def next_power_of_2(n: int) -> int:
    """The power of 2 that is ``n`` or the next one above."""
    return 1 << max(n - 1, 0).bit_length()


def layout_of(channels_last: bool, dims: int = 2) -> torch.memory_format:
    """The memory format of maps with ``dims`` spatial axes."""
    return _CHANNELS_LAST[dims] if channels_last else torch.contiguous_format


_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
