"""Models on the command line: a name of ours, of another library, or a file; its weights, and its options."""

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from fastseg.cli.common import model_option, say
from fastseg.exporting.sources import FORMS, has_weights, is_source, load_model
from fastseg.models import names


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and ``--weights``, and the arguments needed to read other codes' files."""
    add = parser.add_argument
    add("--weights", type=Path, metavar="FILE",
        help="of fastseg train, or others with --model: safetensors, or of torch.save")  # fmt: skip
    add("--model", type=model_source, metavar="MODEL",
        help=f"{', '.join(names())}, or {FORMS}; needed where no weights say which model they are of")  # fmt: skip
    add("--option", action="append", default=[], type=model_option, metavar="NAME=VALUE",
        help="of the model, as its constructor has it, such as backbone=resnet101; JSON value; goes before what the "
        "weights say")  # fmt: skip
    add("--weights-key", metavar="NAME",
        help="which to take where the file holds several sets of weights, such as model_ema")  # fmt: skip


def model_source(text: str) -> str:
    """argparse type: a text that ``load_model`` may know."""
    if is_source(text):
        return text
    raise argparse.ArgumentTypeError(f"no model {text[:80]!r}; give one of {', '.join(names())}, or {FORMS}")


def read_weights(
    args: argparse.Namespace, num_classes: int | None = None, *, random: bool = False
) -> tuple[nn.Module, list[str]]:
    """The model, in eval mode on the CPU, and its class names; what was left out is printed to stderr.

    Args:
        args: of the command.
        num_classes: None means what the weights say.
        random: accept a model without weights, with a note; else it is an error.

    Raises:
        ValueError, OSError, ImportError: as ``load_model``; or the model needs weights and none are given.
    """
    if args.weights is None and not (args.model and has_weights(args.model)):
        if not random or args.model is None:
            raise ValueError(f"{args.model or 'no model'}: give --weights FILE, or a --model with weights of its own")
        say(f"fastseg {args.command}: no --weights: the weights are random", sys.stderr)
    with said(args.command):
        return load_model(
            args.model, weights=args.weights, classes=num_classes, options=dict(args.option), key=args.weights_key
        )


@contextmanager
def said(command: str) -> Iterator[None]:
    """Print the warnings of the block to stderr, a line each, once it has ended well."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        yield
    for note in notes:
        say(f"fastseg {command}: {note.message}", sys.stderr)
