"""A gate that many threads pass at once, or one alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """``with gate:`` for calls that may overlap; ``with gate.alone():`` waits for them, and lets none begin."""

    def __init__(self) -> None:
        self._changed, self._inside, self._waiting = threading.Condition(), 0, 0

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting == 0)
            self._inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else is inside the block, nor inside ``with gate:``."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._inside == 0)
            self._inside = -1
        try:
            yield
        finally:
            with self._changed:
                self._inside, self._waiting = 0, self._waiting - 1
                self._changed.notify_all()
