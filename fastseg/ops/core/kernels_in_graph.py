"""An exported graph with fastseg's kernels in it, so that AOTInductor compiles them into its package.

A registered op is opaque to ``torch.export``, and its implementation needs Python. Here each op is replaced by what its
implementation does: torch's ops, and launches that ``torch.library.wrap_triton`` puts into the graph. That is what
``torch.library.triton_op`` does; here it is registered for the mode of an export alone, so eager calls pay nothing.
The launch guard is one place, so one function serves all ops.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram

from fastseg.ops.core.dispatch import HAS_TRITON
from fastseg.ops.core.register import KERNELS
from fastseg.ops.core.torch_private import functional_mode, wrap_triton

if HAS_TRITON:
    from fastseg.kernels.runtime.launch import intercept

SPECIAL = {"num_warps", "num_stages", "num_ctas"}  # options of a launch that a graph can hold
_opening = False


def with_kernels(program: ExportedProgram) -> ExportedProgram:
    """The program with kernels in place of registered ops, of the forms that run at its sizes; they are fixed.

    Raises:
        RuntimeError: this torch cannot hold kernels in a graph, or a launch cannot be held.
    """
    if not HAS_TRITON or wrap_triton() is None or functional_mode() is None:
        raise RuntimeError(f"with_kernels: torch {torch.__version__} has no wrap_triton, or Triton is not installed")
    _register()
    with intercept(_hold), _opened():
        return program.run_decompositions({})


def _hold(kernel: Any, grid: tuple[int, ...], args: tuple, options: dict) -> None:
    wrap = wrap_triton()
    assert wrap is not None
    wrap(kernel)[grid](*args, **{k: v for k, v in options.items() if k in SPECIAL or k in kernel.arg_names})


@contextmanager
def _opened() -> Iterator[None]:
    global _opening
    _opening = True
    try:
        yield
    finally:
        _opening = False


@functools.cache
def _register() -> None:
    for op, launch in KERNELS.items():
        torch.library.register_torch_dispatch(op.name(), functional_mode(), _rule(launch))


def _rule(launch: Callable) -> Callable:
    """What the mode in which a program is traced does with the op: it traces the implementation, in ``_opened``."""

    def rule(mode: Any, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not _opening:
            return mode.__torch_dispatch__(func, types, args, kwargs)
        with mode:
            return launch(*args, **(kwargs or {}))

    return rule
