"""One process of several, as ``torchrun`` starts them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed as dist


@dataclass(frozen=True)
class Processes:
    """How many processes work together, and which one this is.

    Attributes:
        device: of this process.
        count: of processes.
        rank: 0 to ``count - 1``.
    """

    device: torch.device
    count: int = 1
    rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sums of the values of all processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, values: list) -> list:
        """The lists of all processes in one, on every one of them."""
        if self.count == 1:
            return values
        parts: list[list] = [[] for _ in range(self.count)]
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]

    def wait(self) -> None:
        """Until all processes are here."""
        self.sum(0)


@contextmanager
def processes(device: torch.device, patience: timedelta | None = None) -> Iterator[Processes]:
    """The processes that ``torchrun`` has started, or this one alone; a group that exists already is used.

    On CUDA each process of a machine takes a GPU of its own. ``patience`` is how long one waits for another before it
    gives up, by default as long as torch does: half an hour, on CUDA ten minutes.
    """
    started = dist.is_available() and not dist.is_initialized() and dist.is_torchelastic_launched()
    if started:
        if device.type == "cuda":
            device = torch.device("cuda", dist.get_node_local_rank())
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        if dist.is_available() and dist.is_initialized():
            yield Processes(device, dist.get_world_size(), dist.get_rank())
        else:
            yield Processes(device)
    finally:
        if started:
            dist.destroy_process_group()
