"""What several commands share: argument types, and the device."""

import argparse
import json

import torch


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


def model_option(text: str) -> tuple[str, object]:
    """argparse type of ``--option NAME=VALUE``: a JSON value, or else a text."""
    name, found, value = text.partition("=")
    if not found or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except RecursionError:
        raise argparse.ArgumentTypeError(f"{name}: its value is nested too deeply") from None
    except ValueError:
        return name, value


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
