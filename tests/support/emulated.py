"""For ttsem, whose CUDA tensors are CPU tensors to torch's dispatcher: route the registered ops to their launchers."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def launchers_for_all() -> Iterator[None]:
    """Around the import of fastseg: what it registers for CUDA also serves the CPU key, in place of the plain form."""
    impl = torch.library.impl

    def register(name, key, fn=None, **options):
        if not (isinstance(name, str) and name.startswith("fastseg::")):
            return impl(name, key, fn, **options)  # torch's own, registered on the way: as a decorator, too
        if key == "CUDA":
            impl(name, "CPU", fn, **options)
        if key != "CPU":
            impl(name, key, fn, **options)

    torch.library.impl = register
    try:
        yield
    finally:
        torch.library.impl = impl
    for table in _direct_calls():  # a gradient that the autograd engine made says that it is on the CPU
        table["cpu"] = table["cuda"]
    sys.modules["fastseg.ops.core.dispatch"].EMULATED = True


def _direct_calls() -> Iterator[dict]:
    """The table of implementations of every registered op: a call that skips torch's dispatcher takes it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fastseg.ops"):
            yield from (value.direct for value in vars(module).values() if hasattr(value, "direct"))
