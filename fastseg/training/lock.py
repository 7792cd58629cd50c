"""Allow one training per folder at a time."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_held: set[int] = set()


def _leave_to_the_parent() -> None:
    """Close the lock in a forked child: readers may outlive a killed training by seconds, and would keep it locked."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock the folder; the system releases the lock when the process ends in any way, so no lock is stale.

    On a file system without locks nothing is locked.

    Raises:
        ValueError: another process holds it.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ValueError(
                    f"{folder}: another training writes there; wait for its end, or use another -o"
                ) from None
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)
