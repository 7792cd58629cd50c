"""Launches of a forward, ours and torch's, as a CUDA device would see them; counted on a CPU, and ours not run."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils._python_dispatch import TorchDispatchMode

from fastseg.kernels import config

_NOTHING = ("aten::empty", "aten::new_empty", "aten::empty_strided", "aten::empty_like")  # allocate


class _Torch(TorchDispatchMode):
    def __init__(self, counts: Counter[str]):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("aten::") and not func.is_view and name not in _NOTHING:
            self.counts[name] += 1
            if name == "aten::convolution" and args[2] is not None:
                self.counts["bias of aten::convolution"] += 1  # cuDNN's, then an addition
        return func(*args, **(kwargs or {}))


@contextmanager
def count_all_launches() -> Iterator[Counter[str]]:
    """Count kernels by name; what our kernels would have written stays uninitialised."""
    counts: Counter[str] = Counter()
    with config.intercept(lambda kernel, *_: counts.update([kernel.fn.__name__])), _Torch(counts):
        yield counts
