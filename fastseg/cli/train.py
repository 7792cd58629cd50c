"""Train a model on folders of pictures; under torchrun with several processes."""

import argparse
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import torch

from fastseg.cli.common import add_device, model_option, positive_float, positive_int
from fastseg.cli.recipe import add_recipe, introduce, model_options, open_splits, supervised
from fastseg.inference.processes import processes
from fastseg.models import create, load_encoder_weights, names
from fastseg.training.run import Settings, train
from fastseg.training.signals import sigterm

PREEMPTED = 128 + signal.SIGTERM  # as a shell reports a process that the signal ended


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.epilog = (
        f"On SIGTERM it finishes the step, writes the checkpoint, says so in one line and exits with {PREEMPTED}; with "
        "--resume the curve goes on as if nothing had been. Several GPUs finish up to ten steps."
    )
    add = parser.add_argument
    add("--data", required=True, type=Path, metavar="DIR", help="with train/ and val/, of images/ and labels/ each")
    add("--dataset", type=Path, metavar="FILE", help="classes and ignore index (default: dataset.json in --data)")
    add("--model", required=True, choices=names())
    add(
        "--option",
        action="append",
        default=[],
        type=model_option,
        metavar="NAME=VALUE",
        help="of the model; JSON value",
    )
    add("--encoder-weights", type=Path, metavar="FILE", help="torchvision's weights to begin with")
    add("-o", "--output", required=True, type=Path, metavar="DIR", help="for checkpoints and curves")
    add("--resume", action="store_true", help="go on with the run in the output folder")
    add("--epochs", type=positive_int, default=100, help="default: %(default)s")
    add("--batch", type=positive_int, default=8, help="pictures a step, of all processes (default: %(default)s)")
    add("--optimizer", choices=("sgd", "adamw"), default="sgd", help="default: %(default)s")
    add("--lr", type=positive_float, default=0.1, help="learning rate (default: %(default)s)")
    add("--momentum", type=float, default=0.9, help="of sgd (default: %(default)s)")
    add("--weight-decay", type=float, default=5e-4, help="default: %(default)s")
    add("--schedule", choices=("poly", "onecycle", "constant"), default="poly", help="default: %(default)s")
    add("--class-weights", choices=("none", "median-frequency"), default="none", help="default: %(default)s")
    add("--size", type=positive_int, nargs=2, metavar=("H", "W"), help="bring every picture to this size first")
    add("--crop", type=positive_int, nargs=2, metavar=("H", "W"), help="random window of training pictures")
    add("--scale", type=positive_float, nargs=2, default=(1.0, 1.0), metavar=("LOW", "HIGH"), help="random factor")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror at random (default: yes)")
    add("--amp", choices=("auto", "none", "bfloat16", "float16"), default="auto", help="default: on a GPU")
    add("--workers", type=int, default=0, metavar="N", help="processes that read pictures (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--save-every", type=positive_int, metavar="STEPS", help="a checkpoint within epochs too")
    add("--max-seconds", type=positive_float, metavar="S", help="then stop with a checkpoint, to be resumed")
    add_recipe(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Train; 0, also where --max-seconds ended it, or ``PREEMPTED`` where SIGTERM did.

    Bad data raises ``ValueError``, a full disk ``OSError``.
    """
    splits = open_splits(args)
    spec = splits[0].spec
    options = model_options(args)
    pair = lambda values: None if values is None else tuple(values)
    with ExitStack() as to_the_end, processes(args.device) as group:
        for split in splits:
            split.check(range(group.rank, len(split), group.count), shown=group.first)
        torch.manual_seed(args.seed)
        model = create(args.model, len(spec.classes), **options)
        if args.encoder_weights is not None:
            load_encoder_weights(model, args.encoder_weights)
        model = supervised(model, args)
        settings = Settings(
            args.model, options, spec.classes, args.epochs, args.batch, args.optimizer, args.lr, args.momentum,
            args.weight_decay, args.schedule, args.class_weights, pair(args.size), pair(args.crop), pair(args.scale),
            args.flip, _amp(args.amp, group.device), args.seed, args.deep_supervision, pair(args.supervise),
        )  # fmt: skip
        if group.first and args.recipe:
            print(f"fastseg train: {introduce(args)}", file=sys.stderr)
        args.output.mkdir(parents=True, exist_ok=True)
        came = to_the_end.enter_context(sigterm())  # while the processes part, too
        history = train(
            model, settings, *splits, args.output, group, workers=args.workers, resume=args.resume,
            save_every=args.save_every, max_seconds=args.max_seconds, stop_asked=came,
        )  # fmt: skip
        preempted = group.sum(came())[0] > 0 and len(history) < args.epochs
        if group.first:
            if history:
                best = max(history, key=lambda row: row["mean_iou"])
                print(f"best mIoU on val {best['mean_iou']:.4f}, epoch {best['epoch']}: {args.output / 'best.pt'}")
            stopped = f"stopped after {len(history)} of {args.epochs} epochs; go on with --resume"
            if preempted:
                print(f"fastseg train: SIGTERM: {stopped}", file=sys.stderr)
            elif len(history) < args.epochs:
                print(stopped)
    return PREEMPTED if preempted else 0


def _amp(choice: str, device: torch.device) -> str:
    if choice != "auto":
        return choice
    if device.type != "cuda":
        return "none"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
