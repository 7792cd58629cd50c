"""Segment photographs: class maps as palette PNGs, and colour overlays; under torchrun with several processes."""

import argparse
import errno
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from fastseg.cli.common import add_device, positive_int
from fastseg.cli.weights import add_weights, read_weights
from fastseg.inference.images import MAX_CLASSES, class_map, first_line, is_image, overlay, read_image, write_png
from fastseg.inference.processes import Processes, processes
from fastseg.inference.progress import progress
from fastseg.inference.segment import segment
from fastseg.inference.tiling import plan_tiles

PATIENCE = timedelta(days=7)  # for the process with the largest images; torchrun ends them all where one dies


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="PNG or JPEG files, or folders of them")
    add_weights(parser)
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="where the results go")
    parser.add_argument("--classes", type=positive_int, metavar="N", help="classes (default: what the weights say)")
    parser.add_argument(
        "--overlay", action=argparse.BooleanOptionalAction, default=True, help="write overlays too (default: yes)"
    )
    parser.add_argument("--tile", type=positive_int, metavar="N", help="work in tiles of N x N pixels (default: whole)")
    parser.add_argument(
        "--overlap", type=int, metavar="N", help="pixels that tiles share (default: what the model needs)"
    )
    parser.add_argument("--tile-batch", type=positive_int, default=1, metavar="N", help="tiles at once (default: 1)")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Segment each image; 0, or 1 in every process where one failed in any.

    Bad weights and folders raise ``ValueError`` or ``OSError``.
    """
    model, classes = read_weights(args, args.classes)
    if len(classes) > MAX_CLASSES:
        raise ValueError(f"{args.weights}: {len(classes)} classes; a class map holds at most {MAX_CLASSES}")
    if args.overlap is not None and args.tile is None:
        raise ValueError("--overlap is of tiles; give --tile too")
    with processes(args.device, PATIENCE) as group:
        paths = _images_of_first(args.images, group)
        if paths is None:
            return 1
        model = model.to(group.device)
        plan = plan_tiles(model, args.tile, args.overlap) if args.tile else None
        _make_folder(args.output)
        inputs = {path.resolve() for path in paths}
        named = list(zip(paths, _output_stems(paths), strict=True))
        bar = progress(named[group.rank :: group.count], "predict", unit="image", shown=group.first)
        failed = 0
        for path, stem in bar:
            try:
                targets = [args.output / f"{stem}_{kind}.png" for kind in ("classes", "overlay")[: 1 + args.overlay]]
                for target in targets:
                    if target.resolve() in inputs:
                        raise ValueError(f"{path}: the result would overwrite the input {target}; use another -o")
                image = read_image(path)
                labels = segment(model, image[None], plan, batch_size=args.tile_batch, progress=group.first)[0]
                if labels.shape != image.shape[:2]:
                    raise ValueError(
                        f"{path}: the model gives a map of {labels.shape}, the image is {image.shape[:2]}; use --tile"
                    )
                write_png(targets[0], class_map(labels, len(classes)))
                if args.overlay:
                    write_png(targets[1], overlay(image, labels, len(classes)))
            except (ValueError, OSError) as error:
                failed += 1
                bar.write(f"fastseg predict: {first_line(error)}")
            except (RuntimeError, MemoryError) as error:  # out of memory, on this image
                failed += 1
                bar.write(f"fastseg predict: {path}: {first_line(error)}")
        failed = int(group.sum(failed)[0])
        if group.first:
            done = f"{len(paths) - failed} of {len(paths)} images"
            print(f"{done} segmented into {args.output}; classes: {', '.join(classes)}")
    return 1 if failed else 0


def _images_of_first(paths: Sequence[Path], group: Processes) -> list[Path] | None:
    """What the first process finds, as a folder may already get results when another looks; it alone raises its error,
    and the others get None.
    """
    found: list[Path] | Exception
    try:
        found = _images(paths)
    except (ValueError, OSError) as error:
        found = error
    found = group.gather([found])[0]
    if not isinstance(found, Exception):
        return found
    if group.first:
        raise found
    return None


def _images(paths: Sequence[Path]) -> list[Path]:
    """The files, and the images of the folders in order of their names."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(filter(is_image, path.iterdir()), key=lambda inner: inner.name)
            if not inside:
                raise ValueError(f"{path}: no PNG or JPEG image is in this folder")
            found += inside
        else:
            found.append(path)
    return found


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        message = f"{folder}: cannot be made or written to ({error.strerror}); choose another folder with -o"
        raise OSError(message) from error


def _output_stems(paths: list[Path]) -> list[str]:
    """The stem of each path; where several have the same, the later ones get ``-2``, ``-3``, ..."""
    originals, used = {path.stem for path in paths}, set()
    stems = []
    for path in paths:
        stem, number = path.stem, 1
        while stem in used or (number > 1 and stem in originals):
            number += 1
            stem = f"{path.stem}-{number}"
        used.add(stem)
        stems.append(stem)
    return stems
