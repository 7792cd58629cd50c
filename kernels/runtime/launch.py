"""The launch guard: the one place that starts a kernel."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

_intercept: Callable[[object, tuple[int, ...], tuple, dict], None] | None = None


def launch(kernel, grid: tuple[int, ...], *args, **kwargs) -> None:
    """Launch ``kernel[grid](*args, **kwargs)`` on the tensors' own device.

    Triton launches on the *current* device and stream, so this enters the device of the arguments first. It is also the
    one place where launches are counted, compiled ahead of time, or watched (``intercept``).
    """
    devices = set()
    for arg in args:
        if isinstance(arg, Tensor):
            devices.add(arg.device)
    assert len(devices) == 1, f"{kernel}: tensors on {' and '.join(sorted(map(str, devices)))}"
    assert math.prod(grid) < 2**31 and max(grid[1:], default=1) <= 65535, f"{kernel}: grid {grid} is past CUDA's limits"
    if torch.version.hip:
        kwargs.pop("maxnreg", None)  # an option of NVIDIA's backend alone
    if _intercept is not None:
        _intercept(kernel, grid, args, kwargs)
    else:
        run(kernel, grid, args, kwargs)


def run(kernel, grid: tuple[int, ...], args: tuple, kwargs: dict) -> None:
    """The launch itself; only ``launch`` and an ``intercept`` function call it."""
    first = next(arg for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device(first.device) if first.device.type == "cuda" else nullcontext():
        kernel[grid](*args, **kwargs)


@contextmanager
def intercept(fn: Callable[[object, tuple[int, ...], tuple, dict], None]) -> Iterator[None]:
    """Inside the block, call ``fn(kernel, grid, args, kwargs)`` in place of each launch; ``fn`` may call ``run``.

    How the test tools see launches: counting, traffic, ahead-of-time compilation on ``meta`` tensors. Process-wide.
    """
    global _intercept
    saved, _intercept = _intercept, fn
    try:
        yield
    finally:
        _intercept = saved
