"""What launches cost: distinct bytes read and written in global memory, under the interpreter; and their number."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import interpreter
import numpy as np

from fastseg.kernels.runtime.launch import intercept, run


class LaunchTraffic(NamedTuple):
    """Bytes of global memory, counted once per launch however often it touches them, summed over ``launches``.

    ``reads`` and ``writes`` are elements, every access counted. An atomic counts as read and as written.
    """

    read_bytes: int = 0
    written_bytes: int = 0
    reads: int = 0
    writes: int = 0
    launches: int = 0

    def __add__(self, other: "LaunchTraffic") -> "LaunchTraffic":
        return LaunchTraffic(*(a + b for a, b in zip(self, other, strict=True)))


class Traffic:
    """The launches inside a ``count_traffic`` block, in order."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, LaunchTraffic]] = []

    @property
    def by_kernel(self) -> dict[str, LaunchTraffic]:
        """Kernel name -> sum over its launches."""
        sums: dict[str, LaunchTraffic] = {}
        for name, traffic in self.launches:
            sums[name] = sums.get(name, LaunchTraffic()) + traffic
        return sums

    @property
    def total(self) -> LaunchTraffic:
        """Sum over all launches."""
        return sum((traffic for _, traffic in self.launches), LaunchTraffic())


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count the global memory traffic of every launch inside the block.

    Example:
        >>> with count_traffic() as traffic:
        ...     op(x)
        >>> traffic.by_kernel["_op_fwd_kernel"].read_bytes
    """
    if not interpreter.installed():
        raise RuntimeError("count_traffic: the interpreter's checker is off; run with TRITON_INTERPRET=1")
    traffic = Traffic()

    def add(launch: interpreter.Launch) -> None:
        traffic.launches.append((launch.name, _measure(launch)))

    interpreter.listeners.append(add)
    try:
        yield traffic
    finally:
        interpreter.listeners.remove(add)


@contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """Count launches by kernel name; ``.total()`` is their number. Needs no interpreter."""
    counts: Counter[str] = Counter()

    def count(kernel, grid, args, kwargs) -> None:
        counts[kernel.fn.__name__] += 1
        run(kernel, grid, args, kwargs)

    with intercept(count):
        yield counts


def _measure(launch: interpreter.Launch) -> LaunchTraffic:
    reads = [a for a in launch.log if a.kind != interpreter.STORE]
    writes = [a for a in launch.log if a.kind != interpreter.LOAD]
    return LaunchTraffic(
        _distinct_bytes(launch, reads),
        _distinct_bytes(launch, writes),
        sum(a.addresses.size for a in reads),
        sum(a.addresses.size for a in writes),
        1,
    )


def _distinct_bytes(launch: interpreter.Launch, accesses: list[interpreter.Access]) -> int:
    touched: dict[int, np.ndarray] = {}
    for a in accesses:
        lo, hi = launch.lo[a.span], launch.hi[a.span]
        seen = touched.setdefault(a.span, np.zeros(hi - lo, dtype=bool))
        at = (a.addresses - np.uint64(lo)).astype(np.int64)
        for byte in range(a.width):
            seen[at + byte] = True
    return sum(int(seen.sum()) for seen in touched.values())
