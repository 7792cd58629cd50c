"""Exporters and compilers print; what they print is not our answer."""

import contextlib
import io
import logging
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def quiet(level: int = logging.WARNING, *, printed: bool = True) -> Iterator[None]:
    """Suppress log lines up to ``level``, warnings, what this thread prints on stderr, where ``torch.export`` shows the
    graph of a failure, and, if ``printed``, what any thread prints on stdout.
    """
    before = logging.root.manager.disable
    logging.disable(level)
    stdout = contextlib.redirect_stdout(io.StringIO()) if printed else contextlib.nullcontext()
    try:
        with warnings.catch_warnings(), stdout, _silent_stderr():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _OfOthers(io.TextIOBase):
    """A stream that hands on what threads write that are not silent."""

    def __init__(self, stream: TextIO | None):
        self.stream, self.silent = stream, Counter[int]()

    def write(self, text: str) -> int:
        if self.stream is not None and not self.silent[threading.get_ident()]:
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        if self.stream is not None:
            self.stream.flush()


_lock = threading.Lock()  # of the place of stderr: blocks of several threads overlap


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what this thread writes to ``sys.stderr``; the last of overlapping blocks puts the stream back."""
    me = threading.get_ident()
    with _lock:
        ours = sys.stderr if isinstance(sys.stderr, _OfOthers) else _OfOthers(sys.stderr)
        ours.silent[me] += 1
        sys.stderr = ours
    try:
        yield
    finally:
        with _lock:
            ours.silent[me] -= 1
            if sys.stderr is ours and not any(ours.silent.values()):
                sys.stderr = ours.stream
