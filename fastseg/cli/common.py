"""Shared by several commands: argument types, options of models, printing, and the device."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import torch
from torch import nn

from fastseg.cli.options import fault_of
from fastseg.io.files import first_line, printable
from fastseg.io.images import MAX_PIXELS
from fastseg.losses.names import NAMES as LOSSES
from fastseg.losses.names import parse_loss
from fastseg.models import create

LARGEST = 2**31 - 1


def integer(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """argparse type: an integer from ``low`` to ``high``."""

    def parsed(text: str) -> int:
        value = int(text) if len(text) < 100 else _too_long(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is less than {low}")
        if value > high:
            raise argparse.ArgumentTypeError(f"{value} is more than {high}")
        return value

    parsed.__name__ = "integer"  # argparse: "invalid integer value: 'x'"
    return parsed


def number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Callable[[str], float]:
    """argparse type: a finite number from ``low`` to ``high``; ``above`` and ``below`` exclude the ends."""

    def parsed(text: str) -> float:
        value = float(text) if len(text) < 100 else _too_long(text)
        if math.isnan(value) or value < low or (above and value == low):
            raise argparse.ArgumentTypeError(
                f"{text} is {'not above' if above else 'not a number of at least'} {low:g}"
            )
        if math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if value > high or (below and value == high):
            raise argparse.ArgumentTypeError(f"{text} is not {'below' if below else 'at most'} {high:g}")
        return value

    parsed.__name__ = "number"
    return parsed


def _too_long(text: str) -> int:
    raise argparse.ArgumentTypeError(f"a number of {len(text)} characters")


def add_loss(parser: argparse.ArgumentParser) -> None:
    """Add ``--loss``, of a training."""
    known = f"of {', '.join(LOSSES)}; joined by +, with factors: ce+0.5*dice (default: %(default)s)"
    parser.add_argument("--loss", type=_loss, default="ce", metavar="NAMES", help=known)


def _loss(text: str) -> str:
    try:
        parse_loss(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


positive_int = integer(1)
positive_float = number(0, above=True)
seed = integer(0)
workers = integer(0, 256)  # each is a process
threads = integer(1, 256)


def pixels(option: str, sides: Sequence[int] | None) -> tuple[int, int] | None:
    """Height and width as a tuple.

    Raises:
        ValueError: there are more pixels than a picture may have.
    """
    if sides is None:
        return None
    height, width = sides
    if height * width > MAX_PIXELS:
        raise ValueError(f"{option} {height} {width}: {height * width} pixels, more than the limit of {MAX_PIXELS}")
    return height, width


def say(text: str, file: TextIO | None = None) -> None:
    """Print text that may hold names of files and classes: it cannot steer the terminal, and always prints."""
    file = sys.stdout if file is None else file
    fit = "\n".join(map(printable, text.split("\n")))
    encoding = getattr(file, "encoding", None) or "utf-8"
    print(fit.encode(encoding, "backslashreplace").decode(encoding), file=file)


def model_option(text: str) -> tuple[str, object]:
    """argparse type of ``--option NAME=VALUE``: a JSON value, or else a string."""
    name, found, value = text.partition("=")
    if not found or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except RecursionError:
        raise argparse.ArgumentTypeError(f"{name}: its value is nested too deeply") from None
    except ValueError:
        return name, value


def built(name: str, classes: int, pairs: Sequence[tuple[str, Any]]) -> tuple[nn.Module, dict[str, Any]]:
    """The model that ``--model`` and ``--option`` describe, and its options.

    Raises:
        ValueError: an option is unknown, is given twice, or has a wrong type or value.
    """
    options = dict(pairs)
    if len(options) < len(pairs):
        names = [option for option, _ in pairs]
        raise ValueError(f"--option {next(option for option in names if names.count(option) > 1)} is given twice")
    fault = fault_of(name, options)
    if fault:
        raise ValueError(f"--option {fault}")
    create_quietly = lambda: create(name, classes, **options)
    try:
        with torch.device("meta"):  # building on the meta device shows most faults without taking memory
            bytes_ = sum(t.numel() * t.element_size() for t in create_quietly().state_dict().values())
        if bytes_ > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise MemoryError(f"its weights take {bytes_ / 2**30:.0f} GiB, more than this machine's memory")
        return create_quietly(), options
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"no model {name} with the options {_shown(options)}: {first_line(error)}") from error


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "none"


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, by default a GPU if there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=default, help="cpu, cuda, cuda:1 ... (default: %(default)s)")


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()  # a meta tensor has no value
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # timing and capture wait for the current device
    except Exception as error:  # an absent backend may raise any type of error
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {first_line(error)}") from None
    return device


def describe(device: torch.device) -> str:
    """The device in words: the GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
