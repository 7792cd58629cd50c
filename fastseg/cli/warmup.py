"""Compile what a model needs at given sizes, before the first request."""

import argparse
import sys
from functools import partial

import torch

from fastseg.cli.common import add_device, describe, positive_int, say
from fastseg.cli.latency import height_and_width
from fastseg.cli.weights import add_weights, read_weights
from fastseg.inference.runner import Runner
from fastseg.inference.warmup import METHODS, Warmed, compiles, warmup
from fastseg.measure.study import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_weights(parser)
    parser.add_argument(
        "--sizes", nargs="+", type=height_and_width, default=[(512, 512)], metavar="HxW", help="pixels: 512, 360x480"
    )
    parser.add_argument("--batches", nargs="+", type=positive_int, default=[1], metavar="N")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of a Runner's copy (default: %(default)s)")
    parser.add_argument("--classes", type=positive_int, metavar="N", help="classes (default: what the weights say)")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Compile, as ``fastseg predict`` runs the model and as a ``Runner`` does; 0, or 1 where a size failed.

    Raises:
        ValueError, OSError: the weights cannot be read.
    """
    model, _ = read_weights(args, args.classes)
    if not compiles(args.device):
        say(f"{describe(args.device)}: nothing to compile")
        return 0
    model = model.to(args.device)
    shapes = [(batch, 3, *size) for size in args.sizes for batch in args.batches]
    status = 0
    for label, make in (("model", lambda: model), ("Runner", lambda: _runner(model, shapes[0], args))):
        try:
            warmup(make(), shapes, methods=METHODS, progress=partial(_say, label))
        except RuntimeError as error:  # it names what failed
            say(f"fastseg warmup: {label}: {error}", sys.stderr)
            status = 1
    return status


def _runner(model, shape: tuple[int, ...], args: argparse.Namespace) -> Runner:
    return Runner(model, torch.zeros(shape, device=args.device), dtype=DTYPES[args.dtype])


def _say(label: str, warmed: Warmed) -> None:
    say(f"{label} {warmed}")
