"""Bytes that a launch moves between L2 and DRAM: its programs replayed in the hardware's order through an LRU cache.

The launch is interpreted on a small problem, and the cache is small too. Programs start in the order of their numbers,
x fastest; as many as are resident run in step: their first accesses, then their second ones. The line that leaves the
cache is the one not used for longest; what was written in it goes to DRAM then, and at the end.

A small problem stands for a large one where the same things fit: the maps are larger than the cache, in both, and the
tiles of the programs that run at once take at least the share of the cache that they take on the chip. ``stands_for``
checks that. What is left out: a cache has sets; a warp's loads are spread over time; L1, which DRAM bytes do not depend
on. Half of the L2 counts, for both partitions of a large chip may hold a line. Bytes are judged, no time.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import interpreter
import numpy as np

from fastseg.kernels.runtime.ceilings import H200, Chip

LINE = 64  # bytes that DRAM moves at a time


class Moved(NamedTuple):
    """Bytes of one launch: between cache and DRAM, and distinct ones touched, in whole lines."""

    name: str
    read: int
    written: int
    floor: int

    @property
    def ratio(self) -> float:
        """DRAM bytes for each byte that has to be moved."""
        return (self.read + self.written) / self.floor


Order = Callable[[tuple[int, int, int]], tuple]


def hardware(program: tuple[int, int, int]) -> tuple:
    """A program's place in the hardware's order: x fastest."""
    return program[::-1]


def stands_for(maps: int, tiles: int, cache: int, full_maps: int, full_tiles: int, chip: Chip = H200) -> bool:
    """Whether a cache of ``cache`` bytes judges the large problem: bytes of all maps, and of the tiles of resident
    programs, of the small one and of the large one."""
    half = chip.l2_bytes / 2
    return maps >= 2 * cache and full_maps >= 2 * half and tiles / cache >= full_tiles / half


def replay(launch: interpreter.Launch, cache_bytes: int, resident: int, order: Order = hardware) -> Moved:
    """The bytes that ``launch`` moves through an L2 of ``cache_bytes``, if ``resident`` programs run at once."""
    lines = cache_bytes // LINE
    accesses: list[list[interpreter.Access]] = [[] for _ in launch.programs]
    for access in launch.log:
        accesses[access.program].append(access)
    started = sorted(range(len(accesses)), key=lambda i: order(launch.programs[i]))
    cache: OrderedDict[int, bool] = OrderedDict()  # line -> whether it was written, the longest unused first
    ever_read, ever_written = set(), set()
    read = written = 0
    for wave in range(0, len(started), resident):
        running = [accesses[i] for i in started[wave : wave + resident]]
        for step in range(max(map(len, running))):
            now = [program[step] for program in running if step < len(program)]
            for kind in (interpreter.LOAD, interpreter.STORE, interpreter.ATOMIC):
                chosen = [a.addresses for a in now if a.kind == kind]
                if not chosen:
                    continue
                touched = np.unique(np.concatenate(chosen) // np.uint64(LINE)).tolist()
                stores = kind != interpreter.LOAD
                if kind != interpreter.STORE:
                    ever_read.update(touched)
                if stores:
                    ever_written.update(touched)
                for line in touched:
                    dirty = cache.pop(line, None)
                    if dirty is None:
                        dirty = False
                        read += kind != interpreter.STORE
                        if len(cache) >= lines:
                            written += cache.popitem(last=False)[1]
                    cache[line] = dirty or stores
    written += sum(cache.values())
    return Moved(launch.name, read * LINE, written * LINE, (len(ever_read) + len(ever_written)) * LINE)


@contextmanager
def recorded() -> Iterator[list[interpreter.Launch]]:
    """The launches inside the block, to be replayed in one order or another; the list fills as they are made."""
    if not interpreter.installed():
        raise RuntimeError("recorded: the interpreter's checker is off; run with TRITON_INTERPRET=1")
    launches: list[interpreter.Launch] = []
    interpreter.listeners.append(launches.append)
    try:
        yield launches
    finally:
        interpreter.listeners.remove(launches.append)


def ratios(fn: Callable[[], object], kernels: tuple[str, ...], cache_bytes: int, resident: int) -> dict[str, float]:
    """Kernel -> DRAM bytes over their floor, the largest of the launches that ``fn`` makes."""
    with recorded() as launches:
        fn()
    found: dict[str, float] = {}
    for launch in launches:
        name = launch.name.strip("_").removesuffix("_kernel")
        if name in kernels:
            found[name] = max(found.get(name, 0.0), replay(launch, cache_bytes, resident).ratio)
    return found
