"""Results of latency studies: files, plots, and the comparison of two."""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fastseg.io.files import atomic_write, printable, read_json
from fastseg.measure.study import Case

KEY = ("model", "height", "width", "batch", "dtype", "path")
COLOURS = ("#c8553d", "#5b8db8", "#588157", "#8a6fb0", "#e0a458", "#555555", "#3d8c95", "#b0577b")


def write_results(folder: Path, results: Mapping) -> list[Path]:
    """Write ``latency.json``, ``latency.csv`` and, with matplotlib, plots; each atomically."""
    written = [folder / "latency.json", folder / "latency.csv"]
    with atomic_write(written[0]) as file:
        file.write(json.dumps(results, indent=1).encode())
    columns = list(dict.fromkeys(column for row in results["rows"] for column in row))
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns)
    writer.writeheader()
    writer.writerows(results["rows"])
    with atomic_write(written[1]) as file:
        file.write(table.getvalue().encode())
    return written + _plots(folder, results)


FILES = ("latency.json", "latency.csv", "latency_batch.png", "latency_size.png", "roofline.png")  # that are written
_TEXTS = ("model", "dtype", "path")
_COUNTS = ("height", "width", "batch")


def read_results(path: Path) -> dict:
    """Read a ``latency.json``.

    Raises:
        ValueError: it is not such a file, or an entry that is compared is missing or of another type.
    """
    try:
        results = read_json(path)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: is not the JSON of a latency study: {reason}") from None
    rows = results.get("rows") if isinstance(results, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: is not the JSON of a latency study: it has no list of rows")
    machine = results.setdefault("machine", {})
    if not isinstance(machine, dict):
        raise ValueError(f"{path}: is not the JSON of a latency study: machine is {type(machine).__name__}, no object")
    for index, row in enumerate(rows):
        fault = _fault(row)
        if fault:
            raise ValueError(f"{path}: is not the JSON of a latency study: row {index} {fault}")
    return results


def _fault(row: object) -> str | None:
    """What is wrong with a row, or None."""
    if not isinstance(row, dict):
        return f"is a {type(row).__name__}, no object"
    missing = [name for name in KEY if name not in row]
    if missing:
        return f"has no {missing[0]}"
    wrong = [name for name in _TEXTS if not isinstance(row[name], str)]
    wrong += [name for name in _COUNTS if type(row[name]) is not int]
    if not wrong and "median_ms" in row:
        number = lambda name: type(row.get(name)) in (int, float) and 0 <= row[name] < 1e12
        wrong = [name for name in ("median_ms", "spread") if not number(name)]
        wrong = wrong or ["median_ms"] * (not row["median_ms"] > 0)
    return f"has {wrong[0]} = {row.get(wrong[0])!r}" if wrong else None


def table(rows: Sequence[Mapping], base: str = "eager") -> str:
    """A text table: for each case its paths, with times over that of ``base``."""
    lines, previous = [], None
    of_base = {_case(row): row["median_ms"] for row in rows if row["path"] == base and "median_ms" in row}
    for row in rows:
        if _case(row) != previous:
            previous = _case(row)
            lines.append(str(Case(*previous)))
        if "unavailable" in row:
            lines.append(f"  {row['path']:<15} not measured: {printable(row['unavailable'])}")
            continue
        ratio = f"{row['median_ms'] / of_base[previous]:6.2f} of {base}" if previous in of_base else ""
        memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:8.0f} MiB"
        lines.append(
            f"  {row['path']:<15} {row['median_ms']:9.2f} ms +- {50 * row['spread']:.0f} %  p95 {row['p95_ms']:.2f}  "
            f"{row['images_per_s']:8.1f} images/s {ratio}{memory}"
        )
    return "\n".join(lines)


def _case(row: Mapping) -> tuple:
    return tuple(row[k] for k in KEY[:-1])


class Verdict(NamedTuple):
    """The verdict on one row: ``ratio`` is after over before, ``noise`` is what the spreads allow for."""

    name: str
    before_ms: float
    after_ms: float
    ratio: float
    noise: float
    word: str  # "faster", "slower" or "same"

    def __str__(self) -> str:
        times = f"{self.before_ms:.2f} -> {self.after_ms:.2f} ms"
        return f"{self.word:<6} {self.ratio:5.2f} (+- {self.noise:.2f})  {times}  {self.name}"


def compare(before: Mapping, after: Mapping) -> list[Verdict]:
    """Compare equal rows of two results: faster, slower, or no difference beyond their spreads and 2 %."""
    old = {tuple(row[k] for k in KEY): row for row in before["rows"] if "median_ms" in row}
    verdicts = []
    for row in after["rows"]:
        key = tuple(row[k] for k in KEY)
        if "median_ms" not in row or key not in old:
            continue
        ratio = row["median_ms"] / old[key]["median_ms"]
        noise = max(0.02, math.hypot(old[key]["spread"], row["spread"]))
        word = "same" if abs(math.log(ratio)) <= math.log1p(noise) else "faster" if ratio < 1 else "slower"
        name = f"{Case(*key[:5])} {key[5]}"
        verdicts.append(Verdict(name, old[key]["median_ms"], row["median_ms"], ratio, noise, word))
    return verdicts


def ratios(rows: Sequence[Mapping], base: str = "eager") -> dict[str, float]:
    """Map each path to the geometric mean over the cases of its median over that of ``base``."""
    times: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if "median_ms" in row:
            times.setdefault(_case(row), {})[row["path"]] = row["median_ms"]
    logs: dict[str, list[float]] = {}
    for of_case in times.values():
        for path, ms in of_case.items():
            if base in of_case:
                logs.setdefault(path, []).append(math.log(ms / of_case[base]))
    return {path: math.exp(statistics.fmean(values)) for path, values in logs.items()}


# --- plots


def _plots(folder: Path, results: Mapping) -> list[Path]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    rows = [row for row in results["rows"] if "median_ms" in row]
    paths = list(dict.fromkeys(row["path"] for row in rows))
    colours = {path: COLOURS[i % len(COLOURS)] for i, path in enumerate(paths)}
    written = []

    def save(figure, name: str) -> None:
        written.append(folder / name)
        with atomic_write(written[-1]) as file:
            figure.savefig(file, format="png", dpi=110)

    for name, along, label, fixed in (
        ("latency_batch.png", lambda r: r["batch"], "images in a batch", ("model", "height", "width", "dtype")),
        ("latency_size.png", lambda r: r["height"] * r["width"] / 1e6, "megapixels", ("model", "batch", "dtype")),
    ):
        groups: dict[tuple, list[Mapping]] = {}
        for row in rows:
            groups.setdefault(tuple(row[k] for k in fixed), []).append(row)
        groups = {key: group for key, group in groups.items() if len({along(row) for row in group}) > 1}
        if not groups:
            continue
        figure = Figure(figsize=(4.5 * min(3, len(groups)), 3.4 * -(-len(groups) // 3)), layout="constrained")
        grid = figure.subplots(-(-len(groups) // 3), min(3, len(groups)), squeeze=False).flat
        for axes, (key, group) in zip(grid, groups.items(), strict=False):
            for path in paths:
                line = sorted((along(row), row) for row in group if row["path"] == path)
                if line:
                    middle = [row["median_ms"] for _, row in line]
                    reach = [row["median_ms"] * row["spread"] / 2 for _, row in line]
                    axes.errorbar([at for at, _ in line], middle, reach, fmt=".-", capsize=2, label=path,
                                  color=colours[path])  # fmt: skip
            axes.set(xlabel=label, ylabel="ms", title=" ".join(map(str, key)), xscale="log", yscale="log")
            axes.legend(fontsize=7)
        save(figure, name)
    if rows and results.get("roofs"):
        save(_roofline(Figure(figsize=(6.5, 4), layout="constrained"), rows, results["roofs"], colours), "roofline.png")
    return written


def _roofline(figure, rows: Sequence[Mapping], roofs: Mapping, colours: Mapping):
    """GFLOP/s against FLOP per byte; the roofs are what a convolution and a copy reached on this device."""
    axes = figure.subplots()
    rows = [row for row in rows if row["mbytes"]]  # of an exported file nobody sees what it does
    intensity = [row["gflop"] / row["mbytes"] * 1e3 for row in rows]
    left, right = min([*intensity, 1]) / 2, max([*intensity, 1]) * 4
    for dtype, roof in roofs.items():
        ridge = roof["gflops"] / roof["gbytes"]
        xs = [left, min(max(ridge, left), right), right]
        axes.plot(xs, [min(roof["gflops"], roof["gbytes"] * x) for x in xs], "-", color="#999999", linewidth=1)
        axes.annotate(f"{dtype}: {roof['gflops']:.0f} GFLOP/s, {roof['gbytes']:.0f} GB/s", (right, roof["gflops"]),
                      ha="right", va="bottom", fontsize=7, color="#777777")  # fmt: skip
    seen = set()
    for x, row in zip(intensity, rows, strict=True):
        label = None if row["path"] in seen else row["path"]
        seen.add(row["path"])
        axes.plot(x, row["gflop"] / row["median_ms"] * 1e3, ".", color=colours[row["path"]], label=label)
    axes.set(xlabel="FLOP per byte of the eager forward's convolutions", ylabel="GFLOP/s", xscale="log", yscale="log")
    axes.legend(fontsize=7)
    return figure
