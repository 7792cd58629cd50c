"""Compile launches before they are made, in processes side by side, on any machine.

A ``Signature`` is all of a launch that its machine code depends on: kernel, dtypes and alignment of tensors, the
specialisation of integers, compile-time arguments and options. It holds no memory, so it can go to another process,
or kept in a file and compiled on a machine without a GPU. What is compiled lies in Triton's cache folder, under the key
that the launch itself will ask for, where Triton and the target are the same.
"""

import importlib
import inspect
import json
import os
import pickle
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastseg.kernels.runtime.launch import intercept
from fastseg.kernels.tools.report import _CompileOnly
from fastseg.kernels.tools.triton_private import GPUTarget, JITFunction, driver

ALIGNMENT = 16  # bytes, or multiples of an integer: what Triton specialises on


class Pointer(NamedTuple):
    """A tensor argument."""

    dtype: torch.dtype
    aligned: bool


class Signature(NamedTuple):
    """What a launch's machine code depends on. ``args`` and ``kwargs`` hold ``Pointer`` in place of tensors."""

    module: str
    kernel: str
    args: tuple
    kwargs: tuple[tuple[str, object], ...]

    @property
    def key(self) -> str:
        """Equal for launches that share a kernel: some values, like Triton's dtypes, have no hash of their own."""
        return repr(self)


def signature(kernel, args: tuple, kwargs: dict) -> Signature:
    """Of one launch, compiled or interpreted."""
    names = list(inspect.signature(kernel.fn).parameters.values())
    positional = [described(arg, "constexpr" in str(name.annotation)) for name, arg in zip(names, args, strict=False)]
    annotations = {name.name: str(name.annotation) for name in names}
    named = {key: described(value, "constexpr" in annotations.get(key, "constexpr")) for key, value in kwargs.items()}
    return Signature(kernel.fn.__module__, kernel.fn.__name__, tuple(positional), tuple(sorted(named.items())))


def described(arg: object, constant: bool) -> object:
    if isinstance(arg, Tensor):
        return Pointer(arg.dtype, arg.data_ptr() % ALIGNMENT == 0)
    if isinstance(arg, tuple):
        return tuple(described(each, constant) for each in arg)
    if isinstance(arg, int) and not isinstance(arg, bool) and not constant:
        return _like(arg)
    return arg


def _like(value: int) -> int:
    """An integer that Triton specialises as it does ``value``: by 1, by multiples of 16, by 32 or 64 bits."""
    if value == 1:
        return 1
    small = ALIGNMENT if value % ALIGNMENT == 0 else ALIGNMENT + 1
    return small if -(2**31) <= value < 2**31 else 2**32 + small


def stand_in(described: object) -> object:
    """The argument to compile with: a tensor without memory, aligned or not as the one it stands for."""
    if isinstance(described, Pointer):
        t = torch.empty(2, dtype=described.dtype, device="meta")
        return t if described.aligned else t[1:]
    if type(described) is tuple:
        return tuple(map(stand_in, described))
    return described


def compile_signature(wanted: Signature) -> str:
    """Compile for the active driver's target; "" or why it does not compile.

    Raises:
        RuntimeError: the kernels of this process are interpreted.
    """
    kernel = getattr(importlib.import_module(wanted.module), wanted.kernel)
    if not isinstance(kernel, JITFunction):
        raise RuntimeError(f"precompile: {wanted.kernel} is interpreted; start the process with TRITON_INTERPRET=0")
    try:
        kernel.warmup(*map(stand_in, wanted.args), grid=(1,), **{key: stand_in(v) for key, v in wanted.kwargs})
    except Exception as error:  # a compiler's refusal has many types, some of them RuntimeErrors of MLIR
        return f"{wanted.kernel}: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
    return ""


def _begin(gpu: GPUTarget, folder: str, noted: Path | None) -> None:
    """In a process of the pool."""
    if noted is not None:
        note(noted)
    triton.knobs.cache.dir = folder
    driver.set_active(_CompileOnly(gpu))


class Compiler:
    """Processes that compile signatures for ``gpu`` into Triton's cache; none of them touches a device."""

    def __init__(
        self, gpu: GPUTarget, folder: str | Path | None = None, workers: int | None = None, noted: Path | None = None
    ):
        """``folder``: by default Triton's own; ``workers``: a core each; ``noted``: file for ``note``."""
        self._known: dict[str, Future] = {}
        workers = workers or min(16, os.cpu_count() or 1)
        self._pool = ProcessPoolExecutor(
            workers, get_context("spawn"), _begin, (gpu, str(folder or triton.knobs.cache.dir), noted)
        )

    def submit(self, wanted: Signature) -> Future:
        """-> a future of "" or of why it does not compile; a signature seen before is compiled once."""
        key = wanted.key
        if key not in self._known:
            self._known[key] = self._pool.submit(compile_signature, wanted)
        return self._known[key]

    def close(self) -> None:
        """Drop what has not begun, wait for the rest."""
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def collected() -> Iterator[dict[str, Signature]]:
    """Inside the block launches are noted, by key, and not made."""
    found: dict[str, Signature] = {}

    def on_launch(kernel, grid: tuple[int, ...], args: tuple, kwargs: dict) -> None:
        one = signature(kernel, args, kwargs)
        found.setdefault(one.key, one)

    with intercept(on_launch):
        yield found


def write(path: Path, signatures: Iterable[Signature]) -> None:
    """Keep signatures in a file, those already there too."""
    kept = {one.key: one for one in (*(read(path) if path.exists() else ()), *signatures)}
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(pickle.dumps(list(kept.values())))
    part.replace(path)


def read(path: Path) -> list[Signature]:
    """Those of a file that this project wrote; a pickle, so of no other."""
    return pickle.loads(path.read_bytes())


def note(path: Path) -> None:
    """From now on this process appends to ``path`` a line of JSON for each kernel that it loads or compiles."""

    def listener(*, src, metadata, metadata_group, times, cache_hit: bool) -> None:
        row = {"kernel": src.name, "hit": cache_hit, "seconds": round(times.total / 1e6, 3)}
        with path.open("a") as file:  # a short line in one write: processes may share the file
            file.write(json.dumps(row) + "\n")

    triton.knobs.compilation.listener = listener
