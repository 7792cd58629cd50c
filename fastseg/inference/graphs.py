"""Capture the launches of a function as one CUDA graph."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch

from fastseg.ops.core.torch_private import end_allocate_to_pool

WARMUP = 3  # calls before the capture: autotuning, folding and packing must not be captured
_capturing = threading.Lock()  # of the process: an allocation in another thread would end a capture


def captured(function: Callable[[], Any], pool: tuple[int, int] | None = None) -> Callable[[], Any]:
    """Capture ``function`` as a CUDA graph; a call of the result replays it and returns the same output tensors.

    The capture is on the current device, on a stream of its own.

    Args:
        function: the function whose launches are captured.
        pool: from ``torch.cuda.graph_pool_handle()``; graphs that are never replayed at once may share one.

    Raises:
        torch.OutOfMemoryError: the buffers do not fit into memory.
        RuntimeError: the function does something that cannot be captured, such as waiting for the device.
    """
    with _capturing:
        outer = torch.cuda.current_stream()
        stream = torch.cuda.Stream(outer.device)
        with torch.cuda.device(outer.device):
            stream.wait_stream(outer)
            with torch.cuda.stream(stream):
                for _ in range(WARMUP):
                    function()
            outer.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            pool = torch.cuda.graph_pool_handle() if pool is None else pool
            try:
                # the warm-up's own stream: torch's default was made once, on whatever device came first
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    output = function()
            except BaseException:
                _leave(outer.device, pool)
                raise

    def replay() -> Any:
        graph.replay()
        return output

    return replay


def _leave(device: torch.device, pool: tuple[int, int]) -> None:
    """After a failed capture: the allocator may still fill ``pool``, and frees nothing as long as it does."""
    with contextlib.suppress(RuntimeError):  # it has left
        end_allocate_to_pool(device.index, pool)
