"""Weights on the command line: the file, its model if the file does not say so, and the model's options."""

import argparse
import sys
import warnings
from pathlib import Path

from torch import nn

from fastseg.cli.common import model_option
from fastseg.io.checkpoint import load_checkpoint
from fastseg.models import names


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add ``--weights``, and the arguments needed to read other codes' files."""
    add = parser.add_argument
    add("--weights", required=True, type=Path, metavar="FILE",
        help="of fastseg train, or others with --model: safetensors, or of torch.save")  # fmt: skip
    add("--model", choices=names(), help="needed where the weights do not say which model they are of")
    add("--option", action="append", default=[], type=model_option, metavar="NAME=VALUE",
        help="of the model, as its constructor has it, such as backbone=resnet101; JSON value; goes before what the "
        "weights say")  # fmt: skip
    add("--weights-key", metavar="NAME",
        help="which to take where the file holds several sets of weights, such as model_ema")  # fmt: skip


def read_weights(args: argparse.Namespace, num_classes: int | None = None) -> tuple[nn.Module, list[str]]:
    """The model, in eval mode on the CPU, and its class names; what was left out is printed to stderr.

    Raises:
        ValueError, OSError: as ``load_checkpoint``.
    """
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        result = load_checkpoint(args.weights, args.model, num_classes, options=dict(args.option), key=args.weights_key)
    for note in notes:
        print(f"fastseg {args.command}: {note.message}", file=sys.stderr)
    return result
