"""Time several functions against each other."""

import random
import statistics
import time
from collections.abc import Callable

import torch


def interleaved(
    functions: dict[str, Callable[[], object]],
    *,
    repetitions: int = 15,
    warmup: int = 3,
    seed: int = 0,
    settle: float = 0.0,
) -> dict[str, list[float]]:
    """Time each function ``repetitions`` times, in a new random order for each round.

    A slow phase of the machine then slows all functions alike, and ratios of medians stay fair. On CUDA the device is
    synchronised inside each sample, so a sample is launch and execution together.

    Args:
        functions: name -> function to time.
        repetitions: samples of each function.
        warmup: calls of each function before the first sample.
        seed: of the random order.
        settle: seconds to sleep before each sample, followed by a call that is not timed; 0 for neither. Threads of a
            runtime spin for a while after a call and take the cores of the next runtime; its own are asleep by then.

    Returns:
        name -> samples in seconds.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(seed).shuffle
    for _ in range(repetitions):
        shuffle(order)
        for name in order:
            if settle:
                time.sleep(settle)
                functions[name]()
            _synchronize()
            start = time.perf_counter()
            functions[name]()
            _synchronize()
            samples[name].append(time.perf_counter() - start)
    return samples


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    """name -> median of its samples."""
    return {name: statistics.median(values) for name, values in samples.items()}


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
