"""Exporters and compilers print; what they print is not our answer."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(level: int = logging.WARNING, *, printed: bool = True) -> Iterator[None]:
    """Suppress log lines up to ``level``, warnings, and, if ``printed``, what any thread prints on stdout."""
    before = logging.root.manager.disable
    logging.disable(level)
    stdout = contextlib.redirect_stdout(io.StringIO()) if printed else contextlib.nullcontext()
    try:
        with warnings.catch_warnings(), stdout:
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
