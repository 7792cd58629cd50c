"""Segment photographs: class maps as palette PNGs, and colour overlays; under torchrun with several processes."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastseg.cli.common import add_device, integer, positive_int, say
from fastseg.cli.weights import add_weights, read_weights
from fastseg.inference.segment import segment
from fastseg.inference.tile_plan import plan_tiles
from fastseg.io.files import NAME, first_line, look_at_folder, make_folder, printable
from fastseg.io.images import MAX_CLASSES, class_map, is_image, overlay, read, read_image, several_pages, write_png
from fastseg.io.processes import Processes, processes
from fastseg.io.progress import progress

SIDE = 2**16  # of a tile, at most
PATIENCE = timedelta(days=7)  # for the process with the largest images; torchrun ends them all if one dies


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="pictures (PNG, JPEG, TIFF, BMP, WEBP, GIF ...), or folders of them",
    )
    add_weights(parser)
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="where the results go")
    parser.add_argument("--classes", type=positive_int, metavar="N", help="classes (default: what the weights say)")
    parser.add_argument(
        "--overlay", action=argparse.BooleanOptionalAction, default=True, help="write overlays too (default: yes)"
    )
    parser.add_argument(
        "--confidence", action="store_true", help="write the probability of each pixel's class too, 255 for 1"
    )
    parser.add_argument(
        "--tile", type=integer(1, SIDE), metavar="N", help="work in tiles of N x N pixels (default: whole)"
    )
    parser.add_argument(
        "--overlap",
        type=integer(-SIDE, SIDE),
        metavar="N",
        help="pixels that tiles share (default: what the model needs)",
    )
    parser.add_argument("--tile-batch", type=positive_int, default=1, metavar="N", help="tiles at once (default: 1)")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Segment each image; return 0, or 1 in every process if one failed in any.

    Bad weights and folders raise ``ValueError`` or ``OSError``.
    """
    look_at_folder(args.output)
    model, classes = read_weights(args, args.classes)
    if len(classes) > MAX_CLASSES:
        raise ValueError(
            f"{args.weights or args.model}: {len(classes)} classes; a class map holds at most {MAX_CLASSES}"
        )
    if args.overlap is not None and args.tile is None:
        raise ValueError("--overlap is of tiles; give --tile too")
    if args.confidence and args.tile is not None:
        raise ValueError("--confidence is of whole pictures; leave --tile out")
    kinds = ("classes", *(("overlay",) if args.overlay else ()), *(("confidence",) if args.confidence else ()))
    with processes(args.device, PATIENCE) as group:
        paths = _images_of_first(args.images, group)
        if paths is None:
            return 1
        model = model.to(group.device)
        plan = plan_tiles(model, args.tile, args.overlap) if args.tile else None
        for line in _left_out(args.images) if group.first else ():
            say(f"fastseg predict: {printable(line)}", sys.stderr)
        make_folder(args.output)
        inputs = {os.path.realpath(path) for path in paths}
        named = list(zip(paths, _output_stems(paths, max(map(len, kinds))), strict=True))
        bar = progress(named[group.rank :: group.count], "predict", unit="image", shown=group.first)
        failed = 0
        for path, stem in bar:
            try:
                targets = {kind: args.output / f"{stem}_{kind}.png" for kind in kinds}
                for target in targets.values():
                    if os.path.realpath(target) in inputs:
                        raise ValueError(f"{path}: the result would overwrite the input {target}; use another -o")
                image = read_image(path)
                if read(path, several_pages):
                    bar.write(f"fastseg predict: {printable(path)}: has several pages; the first is taken")
                if stem != path.stem and len(stem) < len(path.stem):
                    short = f"its name is too long for that of a result, which is {stem}"
                    bar.write(f"fastseg predict: {printable(path)}: {printable(short)}")
                found = segment(
                    model, image[None], plan, batch_size=args.tile_batch, progress=group.first,
                    confidence=args.confidence,
                )  # fmt: skip
                labels = found[0][0] if args.confidence else found[0]
                if labels.shape != image.shape[:2]:
                    raise ValueError(
                        f"{path}: the model gives a map of {labels.shape}, the image is {image.shape[:2]}; use --tile"
                    )
                write_png(targets["classes"], class_map(labels, len(classes)))
                if args.overlay:
                    write_png(targets["overlay"], overlay(image, labels, len(classes)))
                if args.confidence:
                    write_png(
                        targets["confidence"],
                        Image.fromarray((255 * np.nan_to_num(found[1][0]) + 0.5).astype(np.uint8)),
                    )
            except (ValueError, OSError) as error:
                failed += 1
                bar.write(f"fastseg predict: {printable(first_line(error))}")
            except torch.AcceleratorError:  # the device takes no more work: every later image would fail too
                raise
            except (RuntimeError, MemoryError) as error:  # out of memory, on this image
                failed += 1
                bar.write(f"fastseg predict: {printable(path)}: {printable(first_line(error))}")
        failed = int(group.sum(failed)[0])
        if group.first:
            done = f"{len(paths) - failed} of {len(paths)} images"
            say(f"{done} segmented into {args.output}; classes: {', '.join(map(printable, classes))}")
    return 1 if failed else 0


def _images_of_first(paths: Sequence[Path], group: Processes) -> list[Path] | None:
    """The images that the first process finds; it alone raises its errors, and the others get None.
    The others do not look: the folder may already hold results by then.
    """
    found: list[Path] | Exception
    try:
        found = images_in(paths)
    except (ValueError, OSError) as error:
        found = error
    found = group.gather([found])[0]
    if not isinstance(found, Exception):
        return found
    if group.first:
        raise found
    return None


def images_in(paths: Sequence[Path]) -> list[Path]:
    """The files, and the images of the folders in order of their names."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [inner for inner in _entries(path) if is_image(inner) and not inner.is_dir()]
            if not inside:
                raise ValueError(f"{path}: no PNG or JPEG image is in this folder")
            found += inside
        else:
            found.append(path)
    return found


def _entries(folder: Path) -> list[Path]:
    """The entries of a folder, by name; hidden files are skipped."""
    return sorted((inner for inner in folder.iterdir() if not inner.name.startswith(".")), key=lambda inner: inner.name)


def _left_out(paths: Sequence[Path]) -> Iterator[str]:
    """One line for each folder that holds something besides images."""
    for path in paths:
        if path.is_dir():
            there = _entries(path)
            others = [inner.name for inner in there if inner.is_dir() or not is_image(inner)]
            if others:
                yield f"{path}: left out: {len(others)} of {len(there)} entries, which are no images, as {others[0]}"


def _output_stems(paths: list[Path], kind: int) -> list[str]:
    """The stem of each path, shortened if a result's name would be too long: ``kind`` is the most letters of its kind.
    Of several equal stems the later ones get ``-2``, ``-3``, ...
    """
    originals, used = {path.stem for path in paths}, set()
    stems = []
    for path in paths:
        stem, number = _cut(path.stem, "", kind), 1
        while stem in used or (number > 1 and stem in originals):
            number += 1
            stem = _cut(path.stem, f"-{number}", kind)
        used.add(stem)
        stems.append(stem)
    return stems


def _cut(stem: str, end: str, kind: int) -> str:
    """``stem`` and ``end``, with the stem shortened if the name of a result would exceed ``NAME`` bytes."""
    while len(os.fsencode(f"{stem}{end}_.png")) + kind > NAME:
        stem = stem[:-1]
    return stem + end
