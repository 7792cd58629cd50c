"""Compiles what a model needs at given sizes, before the first request."""

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn

from fastseg.inference.classes import class_map
from fastseg.inference.runner import FORWARD, PREDICT, Runner
from fastseg.io.images import first_line
from fastseg.nn.modes import evaluating

METHODS = (FORWARD, PREDICT)


class Warmed(NamedTuple):
    """One size and method."""

    shape: tuple[int, int, int, int]
    method: str  # "forward" or "predict"
    first_s: float  # of the first call, which compiles
    call_s: float  # of the second
    error: str  # why it failed, or ""

    def __str__(self) -> str:
        name = f"{'x'.join(map(str, self.shape))} {self.method}"
        if self.error:
            return f"{name}: failed: {self.error}"
        return f"{name}: {self.first_s:.1f} s, then {self.call_s * 1e3:.1f} ms a call"


def warmup(
    model: nn.Module | Runner,
    shapes: Iterable[Sequence[int]],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    methods: Sequence[str] = METHODS,
    progress: Callable[[Warmed], object] = lambda warmed: None,
) -> list[Warmed]:
    """Calls ``model`` in evaluation at each size, so that no later call has to compile; in ranks, before a collective.

    Triton keeps what it compiled in its cache folder, for processes to come too. A size that was warmed serves others:
    kernels are compiled for channels, and for a few ranges of sizes. On a CPU there is nothing to compile: nothing
    runs, and the result is empty.

    Args:
        model: its modes, statistics and gradients stay as they are. Of a ``Runner`` the graphs are captured too.
        shapes: (N, C, H, W) in pixels, or (H, W) of one RGB picture.
        dtype: of autocast, where it is not the model's own; None takes the model's. A ``Runner`` has its own.
        device: where a copy of the model is to run; None: the model itself, where it is.
        methods: of "forward", the model's output, and "predict", its class maps.
        progress: called after each size and method.

    Returns:
        Seconds of each, in order.

    Raises:
        ValueError: a shape is none, no shape is given, or an unknown method.
        RuntimeError: some failed, each of which is named; the others are compiled.
    """
    sizes = [_whole(shape) for shape in shapes]
    if not sizes:
        raise ValueError("warmup: no shapes; give (N, C, H, W) or (H, W) of each size that will come")
    if unknown := [method for method in methods if method not in METHODS]:
        raise ValueError(f"warmup: no method {unknown[0]!r}; use {' or '.join(METHODS)}")
    net = model.model if isinstance(model, Runner) else model
    if device is not None:
        if isinstance(model, Runner):
            raise ValueError("warmup: a Runner is where its model is; leave device out")
        net = model = copy.deepcopy(model).to(device)
    tensors = [t for t in chain(net.parameters(), net.buffers()) if t.is_floating_point()]
    where = tensors[0].device if tensors else torch.device("cpu")
    if not compiles(where):
        return []
    own = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
    last = any(t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in tensors if t.numel() > 1)
    warmed = []
    with evaluating(net):
        for shape in sizes:
            for method in methods:
                x = lambda shape=shape: torch.zeros(shape, dtype=own, device=where).to(
                    memory_format=torch.channels_last if last else torch.contiguous_format
                )
                with torch.no_grad(), torch.autocast(where.type, dtype, enabled=dtype not in (None, own)):
                    warmed.append(_warmed(model, method, shape, x))
                progress(warmed[-1])
    failed = [str(one) for one in warmed if one.error]
    if failed:
        raise RuntimeError(f"warmup: {len(failed)} of {len(warmed)} failed: {'; '.join(failed)}")
    return warmed


def compiles(device: torch.device) -> bool:
    """Whether anything is compiled for ``device``."""
    return device.type == "cuda"


def _warmed(model, method: str, shape: tuple[int, int, int, int], x: Callable[[], torch.Tensor]) -> Warmed:
    seconds, error = [0.0, 0.0], ""
    try:
        image = x()
        for i in range(2):
            start = time.perf_counter()
            if isinstance(model, Runner):
                model.predict(image) if method == PREDICT else model(image)
            else:
                class_map(model, image) if method == PREDICT else model(image)
            if image.is_cuda:
                torch.cuda.synchronize(image.device)
            seconds[i] = time.perf_counter() - start
    except torch.AcceleratorError:  # the device takes no more work
        raise
    except Exception as fault:  # of the model, of a compiler, of memory: the other sizes are still compiled
        error = f"{type(fault).__name__}: {first_line(fault)}"
    return Warmed(shape, method, seconds[0], seconds[1], error)


def _whole(shape: Sequence[int]) -> tuple[int, int, int, int]:
    whole = (1, 3, *shape) if len(shape) == 2 else tuple(shape)
    if len(whole) != 4 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in whole):
        raise ValueError(f"warmup: shape {tuple(shape)} is not (N, C, H, W) or (H, W) of positive integers")
    return whole
