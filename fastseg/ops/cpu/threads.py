"""Run the parts of one op on all threads of a CPU; each part's torch calls run on one thread.

torch splits each of its calls over all threads and waits for the last share. A walk over blocks that stay in the cache
makes hundreds of short calls; if other programs run too, each call may wait milliseconds for a descheduled thread. Here
a thread takes the next part when it has finished one, and the caller waits once.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import count
from typing import TypeVar

import torch

from fastseg.ops.core.torch_private import dispatch_modes

Part, Result = TypeVar("Part"), TypeVar("Result")

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_size = 0


def each(function: Callable[[Part], Result], parts: Iterable[Part]) -> list[Result]:
    """Return ``[function(part) for part in parts]``, computed on as many threads as torch has in this thread.

    The parts must not depend on each other. Results are the same for any number of threads. Gradients are off. The
    parts run in this thread if torch has one thread, if a dispatch mode watches each torch call, or if there is one
    part.

    Args:
        function: called once for each part.
        parts: its arguments.

    Raises:
        Exception: that of the first part that raised.
    """
    parts, threads = list(parts), torch.get_num_threads()
    if threads == 1 or len(parts) < 2 or dispatch_modes():
        with torch.no_grad():
            return [function(part) for part in parts]
    results: list = [None] * len(parts)
    errors: dict[int, BaseException] = {}
    following, inference = count(), torch.is_inference_mode_enabled()

    def work() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            while (i := next(following)) < len(parts) and not errors:
                try:
                    results[i] = function(parts[i])
                except BaseException as error:  # raised below, in the calling thread
                    errors[i] = error

    pool = _threads(threads)
    wait([pool.submit(work) for _ in range(min(threads, len(parts)))])
    if errors:
        raise errors[min(errors)]
    return results


def _threads(size: int) -> ThreadPoolExecutor:
    """A pool of at least this many threads, each of which uses one thread for its torch calls."""
    global _pool, _size
    with _lock:
        if _pool is None or _size < size:
            _pool, _size = _start(size), size  # what still runs in the old pool ends there
        return _pool


def _start(size: int) -> ThreadPoolExecutor:
    """``torch.set_num_threads`` acts on the calling thread and on threads started later; the latter is undone."""
    pool = ThreadPoolExecutor(size, thread_name_prefix="fastseg")
    ready = threading.Barrier(size + 1)

    def bind() -> None:
        torch.get_num_threads()  # a thread's first query sets its number
        torch.set_num_threads(1)
        ready.wait()

    def keep() -> None:
        later = torch.get_num_threads()
        bound = [pool.submit(bind) for _ in range(size)]
        ready.wait()
        wait(bound)
        torch.set_num_threads(later)

    keeper = threading.Thread(target=keep)
    keeper.start()
    keeper.join()
    return pool


def _forget() -> None:
    """Drop the pool in a forked process, which has none of the threads."""
    global _pool, _size, _lock
    _pool, _size, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
