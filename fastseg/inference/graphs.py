"""A function's launches as one CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch

WARMUP = 3  # calls before the capture: autotuning, folding and packing must not be captured


def captured(function: Callable[[], Any]) -> Callable[[], Any]:
    """``function`` as a CUDA graph; what is returned replays it and gives the same output tensors each time.

    Raises:
        torch.OutOfMemoryError: its buffers do not fit.
        RuntimeError: it does what cannot be captured, such as waiting for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = function()

    def replay() -> Any:
        graph.replay()
        return output

    return replay
