"""Exporters and compilers print; what they print is not our answer."""

import contextlib
import io
import logging
import sys
import threading
import warnings
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
        with warnings.catch_warnings(), stdout, contextlib.redirect_stderr(_OfOthers(sys.stderr)):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _OfOthers(io.TextIOBase):
    """A stream that hands on what other threads write."""

    def __init__(self, stream: TextIO | None):
        self.stream, self.thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        if self.stream is not None and threading.get_ident() != self.thread:
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        if self.stream is not None:
            self.stream.flush()
