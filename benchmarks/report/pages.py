"""What ``make docs`` runs: a page for each op, of what its kernels say, compile to, need at least and were measured at.

    TRITON_INTERPRET=0 python -m benchmarks.report.pages [-o docs] [--target sm_90] [--op pooling] [--without-report]

A page has the headers of the op's kernel files (what is computed, traffic, why this shape), its cases on the roofline
of an H200, its floors with the times of ``benchmarks/results`` where there are any, and one line for each compiled
kernel. Nothing is written by hand: a page is as true as the code.
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.gpu.ops import OPS
from benchmarks.report import record, tables
from benchmarks.roofline.floors import DEVICES, Cost, Device
from fastseg.io.progress import progress

# op -> its kernel files, and the topic of its ahead-of-time cases
KERNELS: dict[str, tuple[tuple[str, ...], str]] = {
    "separable_conv": (("separable_conv/launch", "separable_conv/fwd", "separable_conv/bwd"), "separable_conv"),
    "atrous_branches": (("atrous_conv/fwd", "atrous_conv/bwd", "atrous_conv/regions"), "atrous_conv"),
    "inverted_residual": (("inverted_residual/fwd", "inverted_residual/cost"), "inverted_residual"),
    "conv_act": (("dense_conv/pointwise", "dense_conv/stem"), "inverted_residual"),
    "pooling": (
        ("pooling/max_pool", "pooling/max_unpool", "pooling/max_unpool_conv", "pooling/norm_max_pool_bwd"),
        "pooling",
    ),
    "batch_norm_act": (("batch_norm/fwd", "batch_norm/bwd", "batch_norm/stats"), "batch_norm"),
    "upsample_bilinear": (("upsample/bilinear", "upsample/bilinear_bwd"), "upsample"),
    "upsample_concat": (("upsample/bilinear", "upsample/bilinear_bwd"), "upsample"),
    "upsample_concat_conv2d": (("upsample/conv",), "upsample"),
    "bilinear_conv_transpose": (("upsample/bilinear", "upsample/bilinear_bwd"), "upsample"),
    "upsample_heads": (
        (
            "upsample/argmax",
            "upsample/cross_entropy_fwd",
            "upsample/cross_entropy_bwd",
        ),
        "upsample_heads",
    ),
    "heads_and_losses": (
        (
            "upsample/confidence",
            "upsample/loss_sums",
            "upsample/volume_argmax",
            "upsample/masks_to_classes",
            "upsample/masks_to_queries",
        ),
        "upsample_heads",
    ),
}
CHIP = DEVICES["H200"]
COLOURS = {"eager": "#9a9a9a", "compile": "#5b8db8", "fastseg": "#c8553d"}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pages; 0."""
    parser = argparse.ArgumentParser(description="One page for each op.")
    parser.add_argument("-o", "--output", type=Path, default=record.ROOT / "docs" / "ops")
    parser.add_argument("--op", action="append", choices=KERNELS, help="may be repeated; all without it")
    parser.add_argument("--target", default="sm_90", help="what the kernels are compiled for")
    parser.add_argument("--without-report", action="store_true", help="compile nothing: seconds in place of minutes")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    modules = {module.OP: module for module in OPS}
    results = tables.all_results()
    wanted = options.op or list(KERNELS)
    for op in progress(wanted, "pages", unit="page"):
        target = None if options.without_report else options.target
        (options.output / f"{op}.md").write_text(page(modules[op], results, options.output, target))
    lines = [
        f"- [{op}]({op}.md): {headline(KERNELS[op][0][0])}" for op in KERNELS if (options.output / f"{op}.md").exists()
    ]
    (options.output / "README.md").write_text("# Kernels, op by op\n\n" + "\n".join(lines) + "\n")
    print(f"{len(wanted)} pages in {options.output}")
    return 0


def page(module: ModuleType, results: dict, folder: Path, target: str | None) -> str:
    """The page of one op; its picture goes to ``folder``."""
    files, topic = KERNELS[module.OP]
    parts = [f"# {module.OP}\n"]
    for name in files:
        parts.append(f"## [kernels/{name}.py](../../kernels/{name}.py)\n\n{header(name)}\n")
    if picture(module, folder / f"{module.OP}.png"):
        parts.append(f"## On the roofline of an {CHIP.name}\n\n![roofline]({module.OP}.png)\n")
    parts.append("## Floors and times\n")
    make = tables.op_table(module, *baselines(module))
    for gpu, found in results.items():
        if measured := make(gpu, found):
            parts.append(f"{gpu.replace('_', ' ')}:\n\n{measured}\n")
    if not results:
        parts.append(
            f"Floors of an {CHIP.name}; [results.md](../results.md) says what has been measured.\n\n{make('', {})}\n"
        )
    if target is not None:
        parts.append(f"## Compiled for {target}, bf16\n\n{compiled(topic, files, target)}\n")
    return "\n".join(parts)


def header(name: str) -> str:
    """The docstring of a kernel file."""
    return ast.get_docstring(ast.parse((record.ROOT / "kernels" / f"{name}.py").read_text()))


def headline(name: str) -> str:
    return header(name).split("\n\n")[0].replace("\n", " ")


def baselines(module: ModuleType) -> list[str]:
    """The providers that have floors beside fastseg's."""
    names = dict.fromkeys(provider for case in module.cases("full") for provider in case.floors)
    return [name for name in names if name != "fastseg"]


def compiled(topic: str, files: Sequence[str], target: str) -> str:
    """One line for each kernel of ``files`` in each case of the topic."""
    import importlib

    from fastseg.kernels.tools.report import compile_launches, table

    cases = importlib.import_module(f"fastseg.kernels.tools.cases.{topic}").CASES
    text = {name: (record.ROOT / "kernels" / f"{name}.py").read_text() for name in files}
    parts = []
    for name, case in cases.items():
        reports = compile_launches(lambda run=case: run(torch.bfloat16), target)
        reports = [r for r in reports if any(f"def {r.kernel}(" in source for source in text.values())]
        if reports:
            parts.append(f"{name}:\n\n```text\n{table(reports)}\n```")
    return "\n\n".join(parts)


def _operations(kernels: Sequence[Cost], chip: Device) -> float:
    """Work in FLOP of the tensor cores: lanes count by the time they take."""
    return sum(max(k.tensor, k.fma / chip.lanes * chip.half, k.mufu / chip.mufu * chip.half) for k in kernels)


def picture(module: ModuleType, path: Path) -> bool:
    """Each case's floor on the chip's roofline, by provider: fusion moves a point right. Whether it was drawn."""
    from matplotlib.figure import Figure

    points = []
    for case in module.cases("full"):
        for provider, kernels in case.floors.items():
            moved, work = sum(k.bytes for k in kernels), _operations(kernels, CHIP)
            if moved and work and provider in COLOURS:
                points.append((provider, work / moved, work / (case.floor_us(provider, CHIP) * 1e-6) * 1e-12))
    if not points:
        return False
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    xs = [x for _, x, _ in points]
    left, right, ridge = min(xs) / 2, max(*xs, 500) * 2, CHIP.half / CHIP.bandwidth
    line = sorted({left, min(max(ridge, left), right), right})
    axes.plot(line, [min(CHIP.half, CHIP.bandwidth * x) * 1e-12 for x in line], "-", color="#777777", linewidth=1)
    for provider in dict.fromkeys(p for p, *_ in points):
        axes.plot([x for p, x, _ in points if p == provider], [y for p, _, y in points if p == provider], ".",
                  color=COLOURS[provider], label=f"{provider}, at its floor")  # fmt: skip
    axes.set(
        xlabel="FLOP per byte (lane work as tensor FLOP of equal time)", ylabel="TFLOP/s", xscale="log", yscale="log"
    )
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return True


if __name__ == "__main__":
    sys.exit(main())
