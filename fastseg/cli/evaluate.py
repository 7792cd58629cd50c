"""Score weights on a split of a data set: IoU of each class, and a picture of the worst results."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastseg.cli.common import add_device, integer, positive_int, say, workers
from fastseg.cli.common import pixels as checked_pixels
from fastseg.cli.recipe import add_layout
from fastseg.cli.weights import add_weights, read_weights
from fastseg.inference.classes import device_of
from fastseg.inference.final_resize import predict
from fastseg.io.files import atomic_write, look_at_folder, make_folder, printable
from fastseg.io.images import class_map, figure, write_png
from fastseg.io.processes import processes
from fastseg.training.batches import Shard, collate, scoring_batches
from fastseg.training.dataset import SPLITS, DatasetSpec
from fastseg.training.evaluation import class_mapping, evaluate, pixels, report, window
from fastseg.training.layouts import open_dataset

FILES = ("scores.json", "worst.png")
PANEL = 320  # pixels of a panel's longer side


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--data", required=True, type=Path, metavar="DIR", help="with a folder for the split, of images/ and labels/")
    add("--dataset", type=Path, metavar="FILE", help="classes and ignore index (default: dataset.json in --data)")
    add("--split", choices=SPLITS, default="test", help="default: %(default)s")
    add_weights(parser)
    add("-o", "--output", required=True, type=Path, metavar="DIR", help="for scores.json and worst.png")
    add("--size", type=positive_int, nargs=2, metavar=("H", "W"), help="bring pictures and labels to this size first")
    add("--batch", type=positive_int, default=1, help="pictures at once, all of one size (default: %(default)s)")
    add("--worst", type=integer(0, 100), default=4, metavar="N", help="pictures to show (default: %(default)s)")
    add("--workers", type=workers, default=0, metavar="N", help="processes that read pictures (default: %(default)s)")
    add_layout(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Score, and return 0. Bad data or weights raise ``ValueError``."""
    look_at_folder(args.output, FILES)
    size = checked_pixels("--size", args.size)
    dataset = open_dataset(args.layout, args.data, args.split, args.dataset)
    spec = dataset.spec
    model, names_of_weights = read_weights(args)
    source = str(args.weights or args.model)
    mapping = _mapping(names_of_weights, spec, source)
    with processes(args.device) as group:
        for line in dataset.left_out if group.first else ():
            say(f"fastseg evaluate: {printable(line)}", sys.stderr)
        model = model.to(group.device)
        pin = group.device.type == "cuda"
        loader = scoring_batches(dataset, size, args.batch, group, args.workers, pin)
        result = evaluate(model, loader, spec, group, worst=args.worst, mapping=mapping)
        if not group.first:
            return 0
        counts = result.scores.pixels
        if not counts.sum():
            raise ValueError(f"the labels of {args.split} hold no class at all: there is nothing to score")
        missing = [repr(spec.classes[index]) for index in (counts == 0).nonzero().flatten().tolist()]
        if missing:
            say(f"fastseg evaluate: no label of {args.split} holds {', '.join(map(printable, missing))}", sys.stderr)
        make_folder(args.output, FILES)
        about = {"weights": source, "split": args.split, "images": len(dataset)}
        with atomic_write(args.output / "scores.json") as file:
            file.write(json.dumps(about | report(result, spec, dataset.names), indent=1).encode())
        say(result.scores.table([printable(name) for name in spec.classes]))
        if result.worst:
            colours, shard = dataset.colours(), Shard(dataset, size, group)
            rows = [_panels(model, shard, index, colours, mapping) for _, index in result.worst]
            titles = ("picture", "truth", "prediction")
            write_png(args.output / "worst.png", figure(_framed(rows), titles, spec.classes, colours))
            worst = ", ".join(f"{printable(dataset.names[index])} {iou:.3f}" for iou, index in result.worst)
            say(f"the worst are in {args.output / 'worst.png'}, their mIoU: {worst}")
    return 0


def _mapping(names_of_weights: list[str], spec: DatasetSpec, path: str) -> torch.Tensor | None:
    """As ``class_mapping``; weights without class names get the data set's order, with a note."""
    count = len(spec.classes)
    if names_of_weights == [str(index) for index in range(count)] and sorted(spec.classes) != sorted(names_of_weights):
        say(f"fastseg evaluate: {path} names no classes; taken in the order of the data set", sys.stderr)
        return None
    try:
        mapping = class_mapping(names_of_weights, spec)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if mapping is not None:
        say(f"fastseg evaluate: {path} has the classes in another order; they are matched by name", sys.stderr)
    return mapping


def _panels(
    model: torch.nn.Module, shard: Shard, index: int, colours: np.ndarray, mapping: torch.Tensor | None
) -> list[Image.Image]:
    shard.indices = range(index, index + 1)
    images, labels, _ = collate([shard[0]])
    predicted = predict(model, pixels(images, device_of(model))).cpu().long()
    predicted = (predicted if mapping is None else mapping[predicted]).numpy()[0]
    truth = window(labels, model).numpy()[0]
    classes = len(colours)
    void = truth >= classes
    coloured = lambda labels: class_map(labels, classes, colours).convert("RGB")
    picture = Image.fromarray(np.ascontiguousarray(window(images.permute(0, 3, 1, 2), model)[0].permute(1, 2, 0)))
    true = Image.composite(Image.new("RGB", picture.size), coloured(np.where(void, 0, truth)), Image.fromarray(void))
    factor = PANEL / max(picture.size)
    size = tuple(max(1, round(side * factor)) for side in picture.size)
    smooth, sharp = Image.Resampling.BILINEAR, Image.Resampling.NEAREST
    return [picture.resize(size, smooth), true.resize(size, sharp), coloured(predicted).resize(size, sharp)]


def _framed(rows: list[list[Image.Image]]) -> list[list[Image.Image]]:
    """The panels on white ones that are all as large as the largest."""
    size = tuple(max(row[0].size[side] for row in rows) for side in (0, 1))
    framed = [[Image.new("RGB", size, (255, 255, 255)) for _ in row] for row in rows]
    for row, sheets in zip(rows, framed, strict=True):
        for panel, sheet in zip(row, sheets, strict=True):
            sheet.paste(panel)
    return framed
