"""Train a model on folders of pictures; under torchrun with several processes."""

import argparse
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from fastseg.cli.common import (
    add_device,
    add_loss,
    built,
    integer,
    model_option,
    number,
    pixels,
    positive_float,
    positive_int,
    say,
    seed,
    workers,
)
from fastseg.cli.options import describe_options
from fastseg.cli.recipe import add_recipe, introduce, model_options, open_splits, supervised
from fastseg.io.files import look_at_folder, make_folder, printable
from fastseg.io.images import MAX_PIXELS
from fastseg.io.processes import Processes, processes
from fastseg.models import load_encoder_weights, names
from fastseg.training.census import Census
from fastseg.training.dataset import FolderDataset
from fastseg.training.lock import lock
from fastseg.training.run import FILES, Settings, train
from fastseg.training.signals import stop_signals

# Exit status -> the signal that ended the training, as a shell reports a process ended by that signal.
STOPPED = {128 + number: number for number in (signal.SIGTERM, signal.SIGINT)}
PREEMPTED = 128 + signal.SIGTERM
LABELS = """labels: each picture DIR/train/images/NAME.png (or .jpg, .tif, .bmp, .webp, .gif ...) has a label
DIR/train/labels/NAME.png (or .tif, .bmp ...) of the same size, grey or with a palette, whose pixel values are class
indices: 0 for the first class of dataset.json, 1 for the second, and so on, not colours and not 255 for "yes".
Pixels of the value ignore_index count for nothing. dataset.json: {"classes": ["sky", "road"], "ignore_index": 255}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        f"{LABELS}\n\noptions of the models, for --option NAME=VALUE, with their defaults:\n{describe_options()}\n\n"
        "On SIGTERM and on Ctrl-C it finishes the step, writes the checkpoint, says so in one line and exits with\n"
        f"{PREEMPTED} or {128 + signal.SIGINT}; with --resume the curve goes on as if nothing had been.\n"
        "A second Ctrl-C ends it at once. Several GPUs finish up to ten steps."
    )
    add = parser.add_argument
    add("--data", required=True, type=Path, metavar="DIR", help="with train/ and val/, of images/ and labels/ each")
    add("--dataset", type=Path, metavar="FILE", help="classes and ignore index (default: dataset.json in --data)")
    add("--model", required=True, choices=names())
    add("--option", action="append", default=[], type=model_option, metavar="NAME=VALUE",
        help="of the model, a JSON value; below is what each model has")  # fmt: skip
    add("--encoder-weights", type=Path, metavar="FILE",
        help="weights to begin with: torchvision's VGG16, ResNet or MobileNetV2, the MobileNetV2 or Xception of the "
        "DeepLabV3+ article's code, timm's xception65, the ResNet of kazuto1011/deeplab-pytorch")  # fmt: skip
    add("-o", "--output", required=True, type=Path, metavar="DIR", help="for checkpoints and curves")
    add("--resume", action="store_true", help="go on with the run in the output folder")
    add("--changed-data", action="store_true", help="resume though the data set is no longer that of the run")
    add("--epochs", type=positive_int, default=100, help="default: %(default)s")
    add("--batch", type=positive_int, default=8, help="pictures a step, of all processes (default: %(default)s)")
    add("--optimizer", choices=("sgd", "adamw"), default="sgd", help="default: %(default)s")
    add("--lr", type=positive_float, default=0.1, help="learning rate (default: %(default)s)")
    add("--momentum", type=number(0, 1, below=True), default=0.9, help="of sgd, below 1 (default: %(default)s)")
    add("--weight-decay", type=number(0), default=5e-4, help="default: %(default)s")
    add("--schedule", choices=("poly", "onecycle", "constant"), default="poly", help="default: %(default)s")
    add_loss(parser)
    add("--class-weights", choices=("none", "median-frequency"), default="none", help="default: %(default)s")
    add("--size", type=positive_int, nargs=2, metavar=("H", "W"), help="bring every picture to this size first")
    add("--crop", type=positive_int, nargs=2, metavar=("H", "W"), help="random window of training pictures")
    add("--scale", type=number(0, 64, above=True), nargs=2, default=(1.0, 1.0), metavar=("LOW", "HIGH"),
        help="random factor, between the two")  # fmt: skip
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror at random (default: yes)")
    add("--amp", choices=("auto", "none", "bfloat16", "float16"), default="auto", help="default: on a GPU")
    add("--workers", type=workers, default=0, metavar="N", help="processes that read pictures (default: %(default)s)")
    add("--seed", type=seed, default=0, help="default: %(default)s")
    add("--save-every", type=integer(1), metavar="STEPS", help="a checkpoint within epochs too")
    add("--max-seconds", type=positive_float, metavar="S", help="then stop with a checkpoint, to be resumed")
    add_recipe(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Train; return 0, also if --max-seconds ended it, or a key of ``STOPPED`` if a signal did.

    Bad data raises ``ValueError``, a full disk ``OSError``.
    """
    look_at_folder(args.output, FILES)
    size, crop, scale = pixels("--size", args.size), pixels("--crop", args.crop), tuple(args.scale)
    if scale[0] > scale[1]:
        raise ValueError(f"--scale {scale[0]:g} {scale[1]:g}: give the lower factor first")
    if args.changed_data and not args.resume:
        raise ValueError("--changed-data is of a resumed run; give --resume too")
    splits = open_splits(args)
    spec = splits[0].spec
    if spec.ignore_index is None and len(spec.classes) > spec.void:
        raise ValueError(
            f"{len(spec.classes)} classes leave no label value for padding; give an ignore_index, or fewer"
        )
    torch.manual_seed(args.seed)
    model, options = built(args.model, len(spec.classes), model_options(args))
    if args.encoder_weights is not None:
        _load_encoder(model, args.encoder_weights, args.model)
    model = supervised(model, args)
    with ExitStack() as to_the_end, processes(args.device) as group:
        censuses = [_checked(split, group) for split in splits]
        largest = max(census.largest for census in censuses) if size is None else size[0] * size[1]
        if largest * scale[1] ** 2 > MAX_PIXELS:
            raise ValueError(f"--scale {scale[1]:g} makes {largest * scale[1] ** 2:.0f} pixels of the largest picture, "
                             f"more than the limit of {MAX_PIXELS}")  # fmt: skip
        settings = Settings(
            args.model, options, spec.classes, args.epochs, args.batch, args.optimizer, args.lr, args.momentum,
            args.weight_decay, args.schedule, args.class_weights, size, crop, scale,
            args.flip, _amp(args.amp, group.device), args.seed, args.deep_supervision,
            None if args.supervise is None else tuple(args.supervise), args.loss,
        )  # fmt: skip
        if group.first and args.recipe:
            say(f"fastseg train: {introduce(args)}", sys.stderr)
        data = {split.split: census.fingerprint() for split, census in zip(splits, censuses, strict=True)}
        data["ignore_index"] = spec.ignore_index
        if not _held(args.output, group, to_the_end):
            return 1
        came = to_the_end.enter_context(stop_signals())  # while the processes part, too
        history = train(
            model, settings, *splits, args.output, group, workers=args.workers, resume=args.resume,
            save_every=args.save_every, max_seconds=args.max_seconds, stop_asked=came, data=data,
            changed_data=args.changed_data,
        )  # fmt: skip
        terminated, interrupted = group.sum(came() == signal.SIGTERM, came() == signal.SIGINT)
        stopped = signal.SIGTERM if terminated else signal.SIGINT if interrupted else None
        stopped = stopped if len(history) < args.epochs else None
        if group.first:
            if history:
                best = max(history, key=lambda row: row["mean_iou"])
                say(f"best mIoU on val {best['mean_iou']:.4f}, epoch {best['epoch']}: {args.output / 'best.pt'}")
            done = f"stopped after {len(history)} of {args.epochs} epochs; go on with --resume"
            if stopped:
                say(f"fastseg train: {stopped.name}: {done}", sys.stderr)
            elif len(history) < args.epochs:
                say(done)
    return 128 + stopped if stopped else 0


def _checked(split: FolderDataset, group: Processes) -> Census:
    """The census of a split over all processes; the first process prints the remarks."""
    census = split.check(range(group.rank, len(split), group.count), shown=group.first).of_all(group)
    remarks = census.remarks(split.split, split.spec.classes, split.spec.ignore_index)
    for line in (*split.left_out, *remarks) if group.first else ():
        say(f"fastseg train: {printable(line)}", sys.stderr)
    return census


def _held(folder: Path, group: Processes, to_the_end: ExitStack) -> bool:
    """Make the folder and lock it, in the first process; it alone raises the error, and the others get False."""
    error: Exception | None = None
    if group.first:
        try:
            make_folder(folder, FILES)
            to_the_end.enter_context(lock(folder))
        except (ValueError, OSError) as found:
            error = found
    failed = group.sum(error is not None)[0] > 0
    if error is not None:
        raise error
    return not failed


def _load_encoder(model: nn.Module, path: Path, name: str) -> None:
    try:
        load_encoder_weights(model, path)
    except TypeError as error:  # the model has no encoder that torchvision's weights fit
        raise ValueError(f"--encoder-weights: torchvision's weights fit no encoder of {name}: {error}") from error


def _amp(choice: str, device: torch.device) -> str:
    if choice != "auto":
        return choice
    if device.type != "cuda":
        return "none"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
