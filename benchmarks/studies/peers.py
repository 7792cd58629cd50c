"""Whole models on a CPU against the peers, side by side in one run, and the table of docs/results.md.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 OMP_NUM_THREADS=1 \\
        python -m benchmarks.studies.peers [--paths ...]

Each model's paths are timed in an order drawn anew each round; a time is a median, shown as its ratio to eager NCHW.
Results go to ``benchmarks/results/peers/``. The allocator's settings spare every path the page faults of large maps.
``onnxruntime`` and ``openvino`` take part where they are installed. ``--table`` writes the table anew from the file.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.report import record
from fastseg.io.progress import progress
from fastseg.measure.machine import machine
from fastseg.measure.paths import PATHS
from fastseg.measure.report import read_results, write_results
from fastseg.measure.study import Case, measure, roofs

FOLDER = record.RESULTS / "peers"
CASES = {  # -> options of `create`
    Case("deeplabv3plus", 512, 512, 1, "fp32"): {},
    Case("segnet", 360, 480, 1, "fp32"): {},
    Case("unet", 512, 512, 1, "fp32"): {"padding": "same", "norm": True},
    Case("fcn", 320, 480, 1, "fp32"): {"backbone": "resnet18", "stride": 4},
}
DEFAULT = (
    "eager", "eager-cl", "fastseg", "runner-exact", "runner", "compile", "compile-max", "compile-freeze", "onnxruntime",
    "openvino",
)  # fmt: skip
START, END = "<!-- peers -->", "<!-- end peers -->"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write results and the table."""
    parser = argparse.ArgumentParser(description="Whole models on a CPU, against the peers.")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=DEFAULT)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--table", action="store_true", help="write the table from the results, measure nothing")
    options = parser.parse_args(argv)
    if not options.table:
        device = torch.device("cpu")
        results = {"machine": machine(device) | {"load": f"{os.getloadavg()[0]:.1f}"}, "rows": []}
        results["roofs"] = {"fp32": roofs(device, "fp32")}
        options.output.mkdir(parents=True, exist_ok=True)
        for case in progress(list(CASES), "peers", unit="model"):
            results["rows"] += measure(
                case, options.paths, device, options=CASES[case], repetitions=options.repetitions, warmup=2
            )
            write_results(options.output, results)
    text = table(read_results(options.output / "latency.json"))
    print(text)
    page = record.ROOT / "docs" / "results.md"
    before = page.read_text()
    if options.output == FOLDER and START in before:
        head, rest = before.split(START, 1)
        page.write_text(f"{head}{START}\n{text}\n{END}{rest.split(END, 1)[1]}")
    return 0


def table(results: dict) -> str:
    """Ratios to eager NCHW, one row a model, and the machine."""
    rows = results["rows"]
    paths = [path for path in dict.fromkeys(row["path"] for row in rows) if path != "eager"]
    lines = ["| model, input | eager ms | " + " | ".join(paths) + " |", "| --- " * (len(paths) + 2) + "|"]
    cases = dict.fromkeys(Case(*(row[k] for k in ("model", "height", "width", "batch", "dtype"))) for row in rows)
    for case in cases:
        own = {row["path"]: row for row in rows if _is_of(row, case)}
        base = own["eager"]["median_ms"]
        cells = [f"{own[p]['median_ms'] / base:.2f}" if "median_ms" in own.get(p, {}) else "-" for p in paths]
        lines.append(f"| {case.model} {case.height}x{case.width} | {base:.0f} | " + " | ".join(cells) + " |")
    made = results["machine"]
    versions = ", ".join(f"{name} {made[name]}" for name in ("torch", "onnxruntime", "openvino") if name in made)
    lines.append("")
    lines.append(f"{made['chip']}, {made['threads']} thread(s), load {made['load']}; {versions}; {made['date'][:10]}.")
    return "\n".join(lines)


def _is_of(row: dict, case: Case) -> bool:
    return all(row[name] == getattr(case, name) for name in ("model", "height", "width", "batch", "dtype"))


if __name__ == "__main__":
    sys.exit(main())
