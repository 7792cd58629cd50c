"""What ``make figures`` runs: floors into ``docs/roofline.md``, what was measured into ``docs/results.md``, with plots.

    python -m benchmarks.report.plot [--docs docs] [--results benchmarks/results]

A page marks where a table and its plot go; what stands between the marks is replaced:

    <!-- table:separable-eval -->
    <!-- end -->
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import bench_models
from benchmarks.report import record, tables
from benchmarks.roofline.floors import floor_us
from benchmarks.roofline.op_tables import STRATEGIES
from benchmarks.workloads import SEPARABLE

MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
COLOURS = {"eager": "#9a9a9a", "compile": "#5b8db8", "fastseg": "#c8553d"}


def fill(text: str, results: dict[str, dict[str, dict]] | None, figures: Mapping[tuple[str, str], str]) -> str:
    """``text`` with every marked table written anew.

    Args:
        text: of the page.
        results: GPU -> stages: a table for each GPU that measured one of its cases. None: the floors alone.
        figures: (table, GPU) -> path of the plot that goes under it, relative to the page.

    Raises:
        ValueError: a mark names a table that does not exist, or has no end.
    """
    marks = re.findall(r"<!-- table:([\w-]+) -->", text)
    unknown = [name for name in marks if name not in tables.TABLES]
    if unknown:
        raise ValueError(f"no table {unknown[0]!r}; there are {', '.join(tables.TABLES)}")
    blocks = [match for match in MARKED.finditer(text) if "<!-- table:" not in match.group(0)[len(match.group(1)) :]]
    if len(blocks) != len(marks):
        raise ValueError("a table's mark has no <!-- end --> before the next")

    def written(match: re.Match) -> str:
        table = match.group(2)
        make = tables.TABLES[table]
        if results is None:
            return f"{match.group(1)}{make('', {})}\n{match.group(3)}"
        parts = []
        for gpu, stages in results.items():
            name, measured = gpu.replace("_", " "), make(gpu, stages)
            if not measured:
                continue
            parts.append(f"**{name}**\n\n{measured}\n")
            if (table, gpu) in figures:
                parts.append(f"![{table}, {name}]({figures[table, gpu]})\n")
        return f"{match.group(1)}{chr(10).join(parts)}{match.group(3)}"

    return MARKED.sub(written, text)


def draw_separable(path: Path, gpu: str, stages: dict[str, dict]) -> bool:
    """Inference times over the fused floor, per shape: 1 is the roofline. False, and no file, if none was measured."""
    chip, times = tables.chip_of(gpu), tables.op_times(stages, "separable_conv")
    series = {}
    for name, strategy in zip(tables.PROVIDERS, STRATEGIES, strict=True):
        fused = [floor_us(s, chip).us for s in SEPARABLE]
        floors = [floor_us(s, chip, strategy=strategy).us / f for s, f in zip(SEPARABLE, fused, strict=True)]
        measured = [times.get((s.name, "eval", name)) for s in SEPARABLE]
        series[name] = floors, [None if m is None else m / f for m, f in zip(measured, fused, strict=True)]
    title = f"Separable convolution, inference, {chip.name}"
    return _bars(path, title, [s.name for s in SEPARABLE], series, "time / fused floor")


def draw_models(path: Path, gpu: str, stages: dict[str, dict]) -> bool:
    """Time per image, the better of called and CUDA graph, beside the floors. False, and no file, if none is known."""
    chip, found = tables.chip_of(gpu), tables.model_rows(stages)
    series = {}
    all_floors = [tables.model_floors(shape, chip) or [0.0] * 3 for shape in bench_models.SHAPES]
    for i, name in enumerate(tables.PROVIDERS):
        floors, measured = [], []
        for shape, floor in zip(bench_models.SHAPES, all_floors, strict=True):
            ways = [found.get((bench_models.label(shape), name, graph)) for graph in (False, True)]
            known = [row["median_us"] / shape.N for row in ways if row]
            floors.append(floor[i] / shape.N)
            measured.append(min(known) if known else None)
        series[name] = floors, measured
    labels = [bench_models.label(shape).replace("_mobilenet", "\nmobilenet") for shape in bench_models.SHAPES]
    return _bars(path, f"Inference, {chip.name}", labels, series, "us per image")


def _bars(
    path: Path, title: str, labels: list[str], series: dict[str, tuple[list[float], list[float | None]]], unit: str
) -> bool:
    """Grouped bars as a PNG: measured ones filled, floors as outlines. False, and no file, if nothing was measured."""
    if all(value is None for _, values in series.values() for value in values):
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 4.5), layout="constrained")
    width = 0.8 / len(series)
    for i, (name, (floors, measured)) in enumerate(series.items()):
        at = [x + (i - (len(series) - 1) / 2) * width for x in range(len(labels))]
        axes.bar(at, [value or 0 for value in measured], width, color=COLOURS[name], label=name)
        axes.bar(
            at, floors, width, fill=False, edgecolor=COLOURS[name], hatch="//", linewidth=1, label=f"{name}: floor"
        )
    axes.set_xticks(range(len(labels)), labels, rotation=25, ha="right", fontsize=8)
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})  # the same input gives the same file
    plt.close(figure)
    return True


FIGURES = {"separable-eval": draw_separable, "models": draw_models}  # table -> the plot under it


def draw(results: dict[str, dict[str, dict]], folder: Path) -> dict[tuple[str, str], Path]:
    """Plot what was measured: (table, GPU) -> PNG in ``folder``."""
    paths = {(table, gpu): folder / f"{table}-{gpu}.png" for gpu in results for table in FIGURES}
    return {(table, gpu): path for (table, gpu), path in paths.items() if FIGURES[table](path, gpu, results[gpu])}


def main(argv: Sequence[str] | None = None) -> int:
    """Write tables and plots; 0, or 2 with one line on what is wrong."""
    parser = argparse.ArgumentParser(description="Turn floors and benchmark results into tables and plots.")
    parser.add_argument("--docs", type=Path, default=record.ROOT / "docs", help="folder of roofline.md and results.md")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of <gpu>.json files")
    options = parser.parse_args(argv)
    drawing = importlib.util.find_spec("matplotlib") is not None
    page = options.docs
    try:
        results = tables.all_results(options.results)
        paths = draw(results, options.docs / "figures") if drawing else {}
        links = {key: path.relative_to(options.docs).as_posix() for key, path in paths.items()}
        written = {}
        for name, shown in (("roofline.md", None), ("results.md", results)):
            page = options.docs / name
            written[page] = fill(page.read_text(), shown, {} if shown is None else links)
    except (ValueError, OSError) as error:
        print(f"figures: {page}: {error}", file=sys.stderr)
        return 2
    for page, text in written.items():
        if text != page.read_text():
            part = page.with_suffix(".part")
            part.write_text(text)
            part.replace(page)
        print(f"{page}: {len(MARKED.findall(text))} tables")
    for path in paths.values():
        print(path)
    if not drawing:
        print("figures: no plots, matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
