"""The demo's latency table: ops and models against eager PyTorch, at the default number of threads and at one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastseg.io.progress import progress
from fastseg.measure import comparison
from fastseg.measure.comparison import Case, Result
from fastseg.models import create

# The full-size model that is timed, where the default cannot take any image: U-Net's would leave out a margin.
FULL_SIZE = {"unet": {"padding": "same", "norm": True}, "unetplusplus": {"norm": True, "up": "bilinear"}}
TRAINED_SIDE, FULL_SIDE = 512, 256  # pixels


def cases(name: str, model: nn.Module, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """Each op, and the model as it was trained and in full size."""
    full = create(name, 21, **FULL_SIZE.get(name, {}))
    return [
        *comparison.op_cases(device, dtype),
        comparison.model_case(f"{name}, as trained", model, TRAINED_SIDE, device, dtype),
        comparison.model_case(f"{name}, full size", full, FULL_SIDE, device, dtype),
    ]


def measured(name: str, model: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, list[Result]]:
    """Title of a column -> its results: on a CPU at the default number of threads and at one."""
    default = torch.get_num_threads()
    counts = sorted({default, 1}, reverse=True) if device.type == "cpu" else [default]
    out: dict[str, list[Result]] = {}
    for count in counts:
        title = f"{count} thread{'s' * (count > 1)}" if device.type == "cpu" else str(device)
        with threads(count):  # a Runner plans its packed weights for the threads it finds
            each = progress(cases(name, model, device, dtype), f"time, {title}", unit="case")
            out[title] = [comparison.compare(case, seconds=1 / len(counts)) for case in each]
    return out


def latency(name: str, model: nn.Module, device: torch.device, describe: Callable[[torch.device], str]) -> str:
    """The table, with a line that says what was timed.

    Args:
        name: of the model.
        model: the trained one.
        device: where.
        describe: names a device.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    title = f"Latency on {describe(device)}, {str(dtype).removeprefix('torch.')}, batch 1, eval, channels_last:"
    note = "(ratio = eager / fastseg: above 1, fastseg is faster)"
    if device.type == "cpu":
        note = "(no kernel runs on a CPU: fastseg calls PyTorch's own convolutions; ratio = eager / fastseg)"
    return "\n".join([title, note, comparison.table(measured(name, model, device, dtype))])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside the block torch computes on so many threads."""
    saved = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(saved)
