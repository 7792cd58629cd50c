"""For ttsem, whose CUDA tensors are CPU tensors to torch's dispatcher: route the registered ops to their launchers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def launchers_for_all() -> Iterator[None]:
    """Around the import of fastseg: what it registers for CUDA also serves the CPU key, in place of the plain form."""
    impl = torch.library.impl

    def register(name: str, key: str, fn) -> None:
        if key == "CUDA":
            impl(name, "CPU", fn)
        if key != "CPU":
            impl(name, key, fn)

    torch.library.impl = register
    try:
        yield
    finally:
        torch.library.impl = impl
