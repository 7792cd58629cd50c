"""Convert weights: those of other codes into fastseg's own file, and back under the names they came with."""

import argparse
from pathlib import Path

from fastseg.cli.common import say
from fastseg.cli.weights import add_weights, said
from fastseg.io.checkpoint import read_checkpoint, save_checkpoint
from fastseg.io.exchange import save_weights_like


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_weights(parser)
    add = parser.add_argument
    add("--like", type=Path, metavar="FILE",
        help="write the weights as this file or folder holds them: its names, nesting and dtypes")  # fmt: skip
    add("-o", "--output", required=True, type=Path, metavar="FILE",
        help="without --like a file that names its model, its options and its classes")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Read, convert, write; 0.

    Raises:
        ValueError, OSError: the weights cannot be read or do not fit, or the output cannot be written.
    """
    if args.weights is None:
        raise ValueError("no weights to convert: give --weights FILE")
    if args.output.is_dir():
        raise IsADirectoryError(f"{args.output}: is a directory; name the file to write")
    with said(args.command):
        found = read_checkpoint(args.weights, args.model, options=dict(args.option), key=args.weights_key)
    if args.like is None:
        save_checkpoint(args.output, found.model, found.name, found.options, found.classes)
    else:
        save_weights_like(found.model, args.output, args.like)
    count = sum(value.numel() for value in found.model.state_dict().values())
    like = f", as {args.like} holds it" if args.like else ""
    say(f"{args.output}: {found.name} of {len(found.classes)} classes, {count:,} numbers{like}")
    return 0
