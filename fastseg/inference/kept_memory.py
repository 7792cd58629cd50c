"""Large maps on a CPU: their memory stays with the process between the ops and the calls of a ``Runner``.

glibc maps a block above 32 MiB, and below that until it has seen one freed, when it is allocated, and unmaps it when it
is freed: each page of each large map is zeroed by the kernel and faults at its first touch. Four images of 512x512
through SMP's U-Net with ResNet-34 took 103,000 such faults, 0.24 s of system time in 1.74 s; kept, none, and 1.45 s.

A ``Runner`` counts the faults of its calls. After two calls in a row that faulted 32 MiB or more, it asks glibc (by
``mallopt``) for blocks from the heap during its calls, and not to trim the heap while it lives. When the last such
``Runner`` is gone, what is free goes back to the system. Under another C library nothing is asked; nor where malloc is
set to keep its memory already: then no call faults.
"""

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

MUCH = 32 * 2**20  # bytes of pages that one call faulted
_CALLS = 2  # of as many faults in a row: packing weights faults too, once
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # malloc.h
_NEVER, _DEFAULT_MMAPS = -1, 65536
# Where glibc's own thresholds end in a process that has freed a large block; setting one stops their adjustment.
_MAPPED_FROM, _TRIMMED_FROM = 32 * 2**20, 64 * 2**20


class KeptMemory:
    """The faults of one ``Runner``'s calls, and what follows from them."""

    def __init__(self) -> None:
        self.keeps = False
        self._large = 0  # calls in a row that faulted much

    @contextmanager
    def call(self, *, again: bool) -> Iterator[None]:
        """Around a call; ``again`` if its shape was seen before, so that nothing is prepared in it."""
        if self.keeps:
            with HEAP:
                yield
            return
        before = faulted() if again and KEEPS else 0
        yield
        if before:
            self._large = self._large + 1 if faulted() - before >= MUCH else 0
            if self._large >= _CALLS:
                self.keeps = True
                HEAP.enlist(self)


class Heap:
    """glibc's settings, for all runners that keep memory; they hold while calls run, or while a runner lives."""

    def __init__(self, mallopt: Callable[[int, int], int], trim: Callable[[int], int]):
        self._mallopt, self._trim, self._lock = mallopt, trim, threading.Lock()
        self._calls = self._runners = 0

    def enlist(self, runner: KeptMemory) -> None:
        """Trim nothing while ``runner`` lives."""
        with self._lock:
            self._runners += 1
            self._mallopt(TRIM_THRESHOLD, _NEVER)
            self._mallopt(MMAP_THRESHOLD, _MAPPED_FROM)
        weakref.finalize(runner, self._leave)

    def _leave(self) -> None:
        with self._lock:
            self._runners -= 1
            if self._runners == 0:
                self._mallopt(TRIM_THRESHOLD, _TRIMMED_FROM)
                self._trim(0)

    def __enter__(self) -> None:
        with self._lock:
            self._calls += 1
            if self._calls == 1:
                self._mallopt(MMAP_MAX, 0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._calls -= 1
            if self._calls == 0:
                self._mallopt(MMAP_MAX, _DEFAULT_MMAPS)


def faulted() -> int:
    """Bytes of pages that this process has faulted without reading a file."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize()


def glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    if resource is None:
        return None
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version, library.mallopt, library.malloc_trim  # noqa: B018
    except (OSError, AttributeError, TypeError):
        return None
    return library


_library = glibc()
KEEPS = _library is not None
HEAP = Heap(_library.mallopt, _library.malloc_trim) if _library else Heap(lambda *_: 1, lambda _: 1)
