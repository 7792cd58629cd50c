"""Tests that run in two processes, with the interpreter and without: what `make test` runs in which.

The rest is marked ``long``: another test, or the same one in the other process, stands for it.
"""

from collections.abc import Callable, Iterable

import pytest

from fastseg.ops.core.dispatch import INTERPRETED


def shared(rows: Iterable, *, interpreted: Iterable, plain: Iterable) -> list:
    """Parameters of a test: all ``rows``, of which each process keeps its own."""
    rows, kept = list(rows), list(interpreted if INTERPRETED else plain)
    assert all(row in rows for row in kept)
    values = lambda row: row if isinstance(row, tuple) else (row,)
    return [pytest.param(*values(row), marks=[] if row in kept else [pytest.mark.long]) for row in rows]


def with_the_interpreter(test: Callable) -> Callable:
    """Of the process with the interpreter."""
    return test if INTERPRETED else pytest.mark.long(test)
