"""Latency studies: models, sizes, batches and dtypes along several paths, timed side by side."""

import argparse
import re
import sys
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import nn

from fastseg.cli.common import add_device, describe, integer, positive_int, say, threads
from fastseg.cli.weights import model_source
from fastseg.exporting.sources import FORMS, has_weights, load_model
from fastseg.io.files import first_line, look_at_folder, make_folder, printable
from fastseg.io.images import MAX_PIXELS
from fastseg.io.progress import progress
from fastseg.measure.machine import machine
from fastseg.measure.paths import PATHS
from fastseg.measure.report import FILES, compare, ratios, read_results, table, write_results
from fastseg.measure.study import DTYPES, Case, measure, roofs
from fastseg.models import names

OPTIONS: dict[str, dict[str, object]] = {  # what a study uses by default if the model's own default differs
    "unet": {"padding": "same", "norm": True},
    "fcn": {"backbone": "resnet18", "stride": 4},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--models", "--model", type=model_source, nargs="+", default=["deeplabv3plus"], metavar="MODEL",
        help=f"{', '.join(names())}, or {FORMS}",
    )  # fmt: skip
    parser.add_argument(
        "--sizes", nargs="+", type=height_and_width, default=[(512, 512)], metavar="HxW", help="pixels: 512, 360x480"
    )
    parser.add_argument("--batches", nargs="+", type=positive_int, default=[1], metavar="N")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument(
        "--paths", nargs="+", choices=PATHS, default=["eager", "eager-cl", "runner"], metavar="PATH",
        help=f"of {', '.join(PATHS)}",
    )  # fmt: skip
    parser.add_argument("--classes", type=positive_int, default=21)
    parser.add_argument(
        "--repetitions", type=integer(1, 10**6), default=20, metavar="N", help="timed calls of each path"
    )
    parser.add_argument("--threads", type=threads, metavar="N", help="of a CPU (default: torch's)")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="latency.json, latency.csv and plots go there")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="compare two latency.json; measures nothing"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, or compare; return 0, or 1 if a comparison found something slower.

    Raises:
        ValueError: a file to compare is not the result of a study.
        OSError: a file cannot be read, or the folder cannot be written to.
    """
    if args.compare:
        return _compare(*args.compare)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    if args.output is not None:
        look_at_folder(args.output, FILES)
        make_folder(args.output, FILES)
    cases = [
        Case(model, *size, batch, dtype)
        for model, size, batch, dtype in product(args.models, args.sizes, args.batches, args.dtypes)
    ]
    cases = list(dict.fromkeys(cases))  # named twice, measured once
    results = {"machine": machine(args.device), "rows": []}
    results["roofs"] = _roofs(args)
    bar = progress(cases, "latency", unit="case")
    for case in bar:
        bar.set_postfix_str(str(case))
        options = {"classes": args.classes, "options": OPTIONS.get(case.model), "repetitions": args.repetitions}
        if case.model not in names():
            options["load"] = partial(_loaded, case.model, args.classes)
        results["rows"] += measure(case, args.paths, args.device, **options)
        if args.output is not None:  # after each case: an interrupted study keeps what it has
            write_results(args.output, results)
    say(f"{describe(args.device)}, torch {results['machine']['torch']}")
    say(table(results["rows"]))
    if "eager" in args.paths and len(cases) > 1:
        print("geometric means over eager: " + ", ".join(f"{p} {r:.2f}" for p, r in ratios(results["rows"]).items()))
    if not any("median_ms" in row for row in results["rows"]):
        raise ValueError("nothing could be measured; the rows say why")
    return 0


def _loaded(source: str, classes: int) -> nn.Module:
    return load_model(source, classes=None if has_weights(source) else classes)[0]


def _roofs(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The roofs of each dtype; one that the device lacks is left out, and its rows say why."""
    found = {}
    for dtype in args.dtypes:
        try:
            found[dtype] = roofs(args.device, dtype)
        except RuntimeError as error:
            say(f"fastseg latency: no roofline in {dtype}: {first_line(error)}", sys.stderr)
    return found


def _compare(before: Path, after: Path) -> int:
    old, new = read_results(before), read_results(after)
    verdicts = compare(old, new)
    if not verdicts:
        raise ValueError(f"{before} and {after} have no case and path in common")
    for name in ("chip", "threads", "torch"):
        if old["machine"].get(name) != new["machine"].get(name):
            then, now = (printable(results["machine"].get(name)) for results in (old, new))
            say(f"note: {name} differs: {then}, then {now}")
    say("\n".join(printable(verdict) for verdict in verdicts))
    return int(any(verdict.word == "slower" for verdict in verdicts))


def height_and_width(text: str) -> tuple[int, int]:
    """argparse type: 512 or 360x480."""
    found = re.fullmatch(r"([0-9]{1,20})(?:x([0-9]{1,20}))?", text)
    if not found or int(found[1]) < 1 or int(found[2] or 1) < 1:
        raise argparse.ArgumentTypeError(f"no size: {text[:60]!r}; write 512 or 360x480")
    height, width = int(found[1]), int(found[2] or found[1])
    if height * width > MAX_PIXELS:
        raise argparse.ArgumentTypeError(f"no size: {text!r} is more than {MAX_PIXELS} pixels")
    return height, width
