"""One process of several, as ``torchrun`` starts them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed as dist


@dataclass(frozen=True)
class Processes:
    """The number of processes that work together, and the rank of this one.

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
        """True if this process is the one that prints and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sum the values over all processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, values: list) -> list:
        """Concatenate the lists of all processes, on each of them."""
        if self.count == 1:
            return values
        parts: list[list] = [[] for _ in range(self.count)]
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.sum(0)


@contextmanager
def processes(device: torch.device, patience: timedelta | None = None) -> Iterator[Processes]:
    """The processes that ``torchrun`` started, or this one alone; an existing group is used.

    On CUDA each process of a machine takes its own GPU. ``patience`` is how long a process waits for another before it
    gives up; the default is torch's: half an hour, on CUDA ten minutes.
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
