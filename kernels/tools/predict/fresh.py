"""Which predictions are of the code that is there: a digest of what a launch's prediction depends on.

That is the source of the kernel and of the device functions it calls, without their places in their files; its
arguments, with the shapes of tensors; its grid; the chip's numbers; and the model itself. Nothing is compiled.
"""

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from fastseg.kernels.runtime.ceilings import Chip
from fastseg.kernels.runtime.launch import intercept

MODEL = ("model", "program", "sass", "values", "warp")  # files whose code makes a time


def digests(fn: Callable[[], object], chip: Chip, wanted: Callable[[str], bool] = lambda kernel: True) -> list[str]:
    """Of each launch that ``fn()`` would make with ``meta`` tensors, in their order."""
    found: list[str] = []

    def on_launch(kernel, grid: tuple[int, ...], args: tuple, kwargs: dict) -> None:
        if wanted(kernel.fn.__name__):
            said = (source_of(kernel), grid, *map(_like, args), *sorted((k, _like(v)) for k, v in kwargs.items()))
            found.append(hashlib.sha256(repr((said, chip, chip.core, _model())).encode()).hexdigest()[:12])

    with intercept(on_launch):
        fn()
    return found


def _like(value: object) -> object:
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.stride(), value.data_ptr() % 16
    return tuple(map(_like, value)) if isinstance(value, tuple) else repr(value)


@functools.cache
def source_of(kernel) -> str:
    """The code of a kernel and of all that it calls, comments left out."""
    return "\n".join(ast.dump(ast.parse(text_of(each))) for each in _reached(kernel, {}))


def text_of(kernel) -> str:
    return textwrap.dedent(inspect.getsource(kernel.fn))


def _reached(kernel, seen: dict[int, object]) -> Iterator:
    """``kernel`` and the device functions that it names, each once."""
    if id(kernel) in seen:
        return
    seen[id(kernel)] = kernel
    yield kernel
    for name in kernel.fn.__code__.co_names:
        named = kernel.fn.__globals__.get(name)
        if hasattr(getattr(named, "fn", None), "__code__"):
            yield from _reached(named, seen)


@functools.cache
def _model() -> str:
    return "".join(ast.dump(ast.parse(Path(__file__).with_name(f"{name}.py").read_text())) for name in MODEL)
