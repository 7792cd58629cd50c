"""Watch what a workload asks of ``config.select``, and what it launches with the answers.

A workload is a function that calls ops and returns their tensors. Tuning knows nothing else about a kernel.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.kernels.runtime import config
from fastseg.kernels.runtime.launch import intercept, run
from fastseg.kernels.runtime.torch_private import TorchDispatchMode, tree_leaves

Workload = Callable[[], object]


class Row(NamedTuple):
    """One question to ``config.select``."""

    kernel: str
    size: int
    key: tuple[tuple[str, object], ...]

    def __str__(self) -> str:
        return f"{self.kernel}[{config.row_name(**dict(self.key))}] at {self.size}"


class Launch(NamedTuple):
    """One call of ``config.launch``."""

    kernel: object
    grid: tuple[int, ...]
    args: tuple
    kwargs: dict


def observe(workload: Workload) -> tuple[object, dict[Row, list[Launch]]]:
    """Run ``workload``; return its result, and for each row it asked for, the launches that followed."""
    rows: dict[Row, list[Launch]] = {}
    current: dict[str, Row] = {}

    def on_select(kernel: str, size: int, key: dict) -> None:
        row = Row(kernel, size, tuple(sorted(key.items())))
        current[f"_{kernel}_kernel"] = row
        rows.setdefault(row, [])

    def on_launch(kernel, grid: tuple[int, ...], args: tuple, kwargs: dict) -> None:
        row = current.get(kernel.fn.__name__)
        if row is not None:
            rows[row].append(Launch(kernel, grid, args, kwargs))
        run(kernel, grid, args, kwargs)

    with config.observe_selects(on_select), intercept(on_launch):
        return workload(), rows


def op_calls(workload: Workload, namespace: str = "fastseg") -> list[Workload]:
    """Run ``workload`` (a model's forward, a training step) and return each distinct call of a registered op in it.

    Calls are distinct by op, and by shapes, dtypes and plain values of the arguments, which are kept alive.
    """
    calls: dict[tuple, Workload] = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if op.namespace == namespace:
                leaves = tree_leaves((args, kwargs))
                like = [(t.shape, t.dtype, t.stride()) if isinstance(t, Tensor) else t for t in leaves]
                calls.setdefault((op, *like), torch.no_grad()(partial(op, *args, **kwargs)))
            return op(*args, **kwargs)

    with Recorder():
        workload()
    return list(calls.values())


def planned(workload: Workload, row: Row) -> list[Launch]:
    """The launches of ``row``; none of them is executed."""
    launches: list[Launch] = []
    name = f"_{row.kernel}_kernel"

    def on_launch(kernel, grid: tuple[int, ...], args: tuple, kwargs: dict) -> None:
        if kernel.fn.__name__ == name:
            launches.append(Launch(kernel, grid, args, kwargs))

    with intercept(on_launch):
        workload()
    return launches


def rows_of(
    workloads: Iterable[Workload], wanted: Callable[[str], bool] = lambda kernel: True
) -> list[tuple[Row, Workload]]:
    """Each distinct row that the workloads ask for, of the kernels wanted, with the first workload that asks."""
    rows: dict[Row, Workload] = {}
    for workload in workloads:
        for row in observe(workload)[1]:
            if wanted(row.kernel):
                rows.setdefault(row, workload)
    return list(rows.items())
