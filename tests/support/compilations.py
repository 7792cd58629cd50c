"""How often Triton would compile on a GPU: the keys of the JIT's cache, of launches that are not made."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastseg.kernels.runtime.launch import intercept

TARGET = GPUTarget("cuda", 90, 32)


@functools.cache
def _binder(kernel: Any) -> Callable[..., tuple]:
    """Of an interpreted kernel too, which keeps what ``triton.jit`` was given."""
    jit = kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **_options(kernel))
    return create_function_from_signature(jit.signature, jit.params, make_backend(TARGET))


def _options(kernel: Any) -> dict[str, Any]:
    return {name: value for name, value in kernel.kwargs.items() if name.startswith("do_not_specialize")}


def key_of(kernel: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[str, str]:
    """What a launch is compiled for: the kernel, and its arguments as the JIT sees them."""
    _, specialization, options = _binder(kernel)(*args, **kwargs)
    return kernel.fn.__name__, f"{specialization} {options}"


@contextmanager
def compilations() -> Iterator[dict[tuple[str, str], int]]:
    """Key -> launches inside the block; none is made."""
    found: dict[tuple[str, str], int] = {}

    def on_launch(kernel, grid, args, kwargs) -> None:
        key = key_of(kernel, args, kwargs)
        found[key] = found.get(key, 0) + 1

    with intercept(on_launch):
        yield found
