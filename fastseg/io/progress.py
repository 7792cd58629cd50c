"""A progress bar on stderr: tqdm's if it is installed, else plain lines."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


def progress(items: Sequence, title: str, unit: str = "it", leave: bool = True, shown: bool = True) -> Any:
    """Iterate with a progress bar on stderr: tqdm's, or a line every tenth of the way where tqdm is not installed.

    The result also has ``set_postfix_str(text)`` and ``write(line)``. With ``leave=False`` the bar disappears at its
    end; with ``shown=False`` there is none.
    """
    if tqdm is None:
        return _Lines(items, title, shown)
    return _Bar(items, desc=title, unit=unit, leave=leave, disable=not shown, file=sys.stderr, dynamic_ncols=True)


class _Lines:
    """The part of tqdm that the commands use."""

    def __init__(self, items: Sequence, title: str, shown: bool):
        self.items, self.title, self.shown, self.postfix = items, title, shown, ""

    def __iter__(self) -> Iterator:
        total = len(self.items)
        for done, item in enumerate(self.items, 1):
            yield item
            if self.shown and done * 10 // total > (done - 1) * 10 // total:
                print(f"{self.title}: {done}/{total} {self.postfix}".rstrip(), file=sys.stderr)

    def set_postfix_str(self, text: str) -> None:
        self.postfix = text

    def write(self, line: str) -> None:
        print(line, file=sys.stderr)


if tqdm is not None:

    class _Bar(tqdm):
        def write(self, line: str) -> None:  # tqdm's own goes to stdout by default
            tqdm.write(line, file=sys.stderr)
