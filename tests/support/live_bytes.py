"""The most memory that tensors and arrays held at once, counted: no sampling, no allocator."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """``bytes``: the peak of the storages that ops returned, together with what Python and numpy allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        traced, _ = tracemalloc.get_traced_memory()
        self.bytes = max(self.bytes, traced + sum(nbytes for _, nbytes in self.live.values()))
        return out


@contextmanager
def peak() -> Iterator[Peak]:
    """Count inside the block."""
    tracemalloc.start()
    try:
        with Peak() as counted:
            yield counted
            counted.bytes = max(counted.bytes, tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
