"""The most memory that tensors and arrays held at once, counted: no sampling, no allocator."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

from fastseg.measure.counting import Live


class Peak(Live):
    """``bytes``: the peak of the storages that ops returned, together with what Python and numpy allocated."""

    @property
    def bytes(self) -> int:
        return self.peak

    def others(self) -> int:
        return tracemalloc.get_traced_memory()[0]


@contextmanager
def peak() -> Iterator[Peak]:
    """Count inside the block."""
    tracemalloc.start()
    try:
        with Peak() as counted:
            yield counted
            counted.peak = max(counted.peak, tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
