"""What ``make figures`` runs: results into the README's tables, and into plots in ``benchmarks/results/figures``.

    python benchmarks/plot.py [--readme README.md] [--results benchmarks/results]

The README marks where a table goes; what stands between the marks is replaced:

    <!-- table:separable-eval -->
    <!-- end -->
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import bench_models
import record
import tables
from floors import floor_us
from op_tables import STRATEGIES
from workloads import SEPARABLE

MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
COLOURS = {"eager": "#9a9a9a", "compile": "#5b8db8", "fastseg": "#c8553d"}


def fill(text: str, results: dict[str, dict[str, dict]]) -> str:
    """``text`` with every marked table written anew: one per GPU, or the floors alone.

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
        make = tables.TABLES[match.group(2)]
        if not results:
            return f"{match.group(1)}{make('', {})}\n{match.group(3)}"
        parts = [f"**{gpu.replace('_', ' ')}**\n\n{make(gpu, stages)}\n" for gpu, stages in results.items()]
        return f"{match.group(1)}{chr(10).join(parts)}{match.group(3)}"

    return MARKED.sub(written, text)


def draw_separable(path: Path, gpu: str, stages: dict[str, dict]) -> None:
    """Inference times over the fused floor, per shape: 1 is the roofline. Floors alone where nothing was measured."""
    chip, times = tables.chip_of(gpu), tables.op_times(stages)
    series = {}
    for name, strategy in zip(tables.PROVIDERS, STRATEGIES, strict=True):
        fused = [floor_us(s, chip).us for s in SEPARABLE]
        floors = [floor_us(s, chip, strategy=strategy).us / f for s, f in zip(SEPARABLE, fused, strict=True)]
        measured = [times.get((s.name, "eval", name)) for s in SEPARABLE]
        series[name] = floors, [None if m is None else m / f for m, f in zip(measured, fused, strict=True)]
    title = f"Separable convolution, inference, {chip.name}"
    _bars(path, title, [s.name for s in SEPARABLE], series, "time / fused floor")


def draw_models(path: Path, gpu: str, stages: dict[str, dict]) -> None:
    """Time per image, the better of called and CUDA graph, beside the floors."""
    chip, found = tables.chip_of(gpu), tables.model_rows(stages)
    series = {}
    all_floors = [tables.model_floors(shape, chip) for shape in bench_models.SHAPES]
    for i, name in enumerate(tables.PROVIDERS):
        floors, measured = [], []
        for shape, floor in zip(bench_models.SHAPES, all_floors, strict=True):
            ways = [found.get((bench_models.label(shape), name, graph)) for graph in (False, True)]
            known = [row["median_us"] / shape.N for row in ways if row]
            floors.append(floor[i] / shape.N)
            measured.append(min(known) if known else None)
        series[name] = floors, measured
    labels = [bench_models.label(shape).replace("_mobilenet", "\nmobilenet") for shape in bench_models.SHAPES]
    _bars(path, f"Inference, {chip.name}", labels, series, "us per image")


def _bars(
    path: Path, title: str, labels: list[str], series: dict[str, tuple[list[float], list[float | None]]], unit: str
) -> None:
    """Grouped bars: measured ones filled, floors as outlines; written as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "fastseg"  # the same input gives the same file
    figure, axes = plt.subplots(figsize=(11, 4.5), layout="constrained")
    width = 0.8 / len(series)
    any_measured = any(value is not None for _, values in series.values() for value in values)
    for i, (name, (floors, measured)) in enumerate(series.items()):
        at = [x + (i - (len(series) - 1) / 2) * width for x in range(len(labels))]
        axes.bar(
            at, [value or 0 for value in measured], width, color=COLOURS[name], label=name if any_measured else None
        )
        axes.bar(
            at, floors, width, fill=False, edgecolor=COLOURS[name], hatch="//", linewidth=1, label=f"{name}: floor"
        )
    axes.set_xticks(range(len(labels)), labels, rotation=25, ha="right", fontsize=8)
    axes.set_ylabel(unit)
    axes.set_title(title + ("" if any_measured else ": floors (computed), not measured yet"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=130, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Write tables and plots; 0, or 2 with one line on what is wrong."""
    parser = argparse.ArgumentParser(description="Turn benchmark results into tables and plots.")
    parser.add_argument("--readme", type=Path, default=record.ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of <gpu>.json files")
    options = parser.parse_args(argv)
    try:
        results = tables.all_results(options.results)
        before = options.readme.read_text()
        after = fill(before, results)
    except (ValueError, OSError) as error:
        print(f"figures: {options.readme}: {error}", file=sys.stderr)
        return 2
    if after != before:
        part = options.readme.with_suffix(".part")
        part.write_text(after)
        part.replace(options.readme)
    print(f"{options.readme}: {len(MARKED.findall(after))} tables")
    if importlib.util.find_spec("matplotlib") is None:
        print("figures: no plots, matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return 2
    for gpu, stages in (results or {"": {}}).items():
        for name, draw in (("separable", draw_separable), ("models", draw_models)):
            path = options.results / "figures" / (f"{name}-{gpu}" if gpu else name)
            draw(path, gpu, stages)
            print(f"{path}.png, .svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
