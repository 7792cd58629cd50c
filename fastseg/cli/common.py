"""What several commands share: argument types, and the progress bar."""

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


positive_int.__name__ = "integer"  # argparse: "invalid integer value: 'x'"


def positive_float(text: str) -> float:
    """argparse type: a number above 0."""
    value = float(text)
    if not value > 0:  # nan as well
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


positive_float.__name__ = "number"


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``: by default the GPU where there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=default, help="cpu, cuda, cuda:1 ... (default: %(default)s)")


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {str(error).splitlines()[0]}") from None
    return device


def describe(device: torch.device) -> str:
    """The device in words: the GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def progress(items: Sequence, title: str, unit: str = "it"):
    """Iterate with a progress bar on stderr: tqdm's, or a line every tenth of the way where tqdm is not installed.

    The result also has ``set_postfix_str(text)`` and ``write(line)``.
    """
    if tqdm is None:
        return _Lines(items, title)
    return _Bar(items, desc=title, unit=unit, file=sys.stderr, dynamic_ncols=True)


class _Lines:
    """As much of tqdm as the commands use."""

    def __init__(self, items: Sequence, title: str):
        self.items, self.title, self.postfix = items, title, ""

    def __iter__(self) -> Iterator:
        total = len(self.items)
        for done, item in enumerate(self.items, 1):
            yield item
            if done * 10 // total > (done - 1) * 10 // total:
                print(f"{self.title}: {done}/{total} {self.postfix}".rstrip(), file=sys.stderr)

    def set_postfix_str(self, text: str) -> None:
        self.postfix = text

    def write(self, line: str) -> None:
        print(line, file=sys.stderr)


if tqdm is not None:

    class _Bar(tqdm):
        def write(self, line: str) -> None:  # tqdm's own goes to stdout by default
            tqdm.write(line, file=sys.stderr)
