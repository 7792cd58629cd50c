"""Print the floors: the least time a device could take for every op and model, ours and the baselines'.

    python -m benchmarks.roofline                          every table, for an H200
    python -m benchmarks.roofline A B --device A100        two of them, for another device
    python -m benchmarks.roofline inference --markdown     as markdown
    python -m benchmarks.roofline pruning --logits x.npy   pruned argmax on saved logits, (C, H, W), x4

Everything printed is computed, nothing is measured: a floor assumes perfect overlap at 100 % of the ceilings. Eager
and compile columns are those baselines' own floors. The formulas are in ``floors.py``, ``op_floors.py`` and
``model_walk.py``.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.roofline.floors import DEVICES, Device, floor_of
from benchmarks.roofline.model_layers import walk
from benchmarks.roofline.op_tables import OP_TABLES, STRATEGIES, Table
from benchmarks.roofline.pruned_argmax import adjacent_logits, check_pruning, smooth_logits, to_bf16
from benchmarks.workloads import MODELS, MODELS_TRAINING, ModelShape

EAGER_OP_US = 7.0  # assumed: host time of one eager operator
GRAPH_NODE_US = 2.0  # assumed: gap between two kernels of a CUDA graph


def inference(device: Device) -> Table:
    """Whole models, inference, with the launch-bound latency of one image."""
    header = ["model", "N", "GFLOP", "GB e / c / f", "us e / c / f", "e/f", "c/f", "kernels", "N=1 with launch us"]
    rows = []
    for shape in MODELS:
        nets = [walk(shape, strategy) for strategy in STRATEGIES]
        floors = [floor_of(net.kernels, device) for net in nets]
        eager, compiled, fused = (floor.us for floor in floors)
        latency = "-"
        if shape.N == 1:
            graphs = [us + GRAPH_NODE_US * net.launches for us, net in zip((compiled, fused), nets[1:], strict=True)]
            latency = "/".join(f"{us:.0f}" for us in (max(eager, EAGER_OP_US * nets[0].launches), *graphs))
        rows.append([_label(shape), f"{shape.N}", f"{nets[0].flop / 1e9:.1f}",
                     " / ".join(f"{floor.bytes / 1e9:.2f}" for floor in floors),
                     " / ".join(f"{floor.us:.0f}" for floor in floors), f"{eager / fused:.2f}",
                     f"{compiled / fused:.2f}",
                     "/".join(str(net.launches) for net in nets), latency])  # fmt: skip
    return "Models, inference (e = eager, c = compile, f = fused)", header, rows


def training(device: Device) -> Table:
    """Whole models, forward and backward, without weights and optimizer."""
    header = [
        "model",
        "N",
        "eager ms",
        "compile ms",
        "fused ms",
        "eager/fused",
        "compile/fused",
        "saved GB eager -> fused",
    ]
    rows = []
    for shape in MODELS_TRAINING:
        nets = [walk(shape, strategy, training=True) for strategy in STRATEGIES]
        eager, compiled, fused = (floor_of(net.kernels, device).us for net in nets)
        saved = [sum(net.saved.values()) / 1e9 for net in nets]
        milliseconds = [f"{us / 1e3:.1f}" for us in (eager, compiled, fused)]
        ratios = [f"{eager / fused:.2f}", f"{compiled / fused:.2f}"]
        rows.append([_label(shape), f"{shape.N}", *milliseconds, *ratios, f"{saved[0]:.1f} -> {saved[2]:.1f}"])
    return "Models, training, forward + backward", header, rows


def pruning(_: Device, logits: np.ndarray | None = None) -> Table:
    """Pruned argmax against full interpolation, on synthetic logits and on ``logits``."""
    cases = [(f"noise, {C} classes", smooth_logits(C, 24, 24, passes), scale)
             for C, scale, passes in ((19, 8, 3), (21, 16, 3), (21, 4, 1), (150, 4, 3))]  # fmt: skip
    cases.append(("adjacent values, 21 classes", adjacent_logits(21, 24, 24), 4))
    if logits is not None:
        cases.append(("from --logits", logits.astype(np.float32), 4))
    header = ["logits", "scale", "dtype", "mismatches / pixels", "same argmax at 4 corners", "candidates mean (max)",
              "classes above 2^-12 of the largest"]  # fmt: skip
    rows = []
    for name, values, scale in cases:
        for dtype in ("bf16", "fp32"):
            exact = dtype == "bf16"
            result = check_pruning(to_bf16(values) if exact else values, scale, exact=exact)
            rows.append([name, f"x{scale}", dtype, f"{result.mismatches} / {result.pixels}",
                         f"{result.same_argmax_share:.0%}", f"{result.mean_candidates:.1f} ({result.max_candidates})",
                         f"{result.mean_loss_classes:.1f}"])  # fmt: skip
    return "Pruned argmax: exactness and work left", header, rows


TABLES = OP_TABLES | {"inference": inference, "training": training, "pruning": pruning}


def render(table: Table, markdown: bool = False) -> str:
    """A table as aligned text, or as markdown."""
    title, header, rows = table
    if markdown:
        lines = [f"**{title}**", "", header, ["---"] * len(header), *rows]
        return "\n".join(line if isinstance(line, str) else f"| {' | '.join(line)} |" for line in lines)
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join([title, *lines])


def _label(shape: ModelShape) -> str:
    return f"{shape.model} {shape.H}x{shape.W} {shape.classes}c"


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; default: all")
    parser.add_argument("--device", default="H200", choices=DEVICES, help="whose ceilings")
    parser.add_argument("--markdown", action="store_true", help="print markdown tables")
    parser.add_argument("--logits", type=Path, help="a .npy file of real logits, (C, H, W), for the pruning table")
    options = parser.parse_args(arguments)
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    device = DEVICES[options.device]
    ceilings = f"{device.bandwidth / 1e12:.2f} TB/s, {device.half / 1e12:.0f} TFLOP/s bf16 ({device.source})"
    print(f"Floors, not measured. {device.name}: {ceilings}.")
    for name in options.tables or TABLES:
        if name == "pruning":
            table = pruning(device, np.load(options.logits) if options.logits else None)
        else:
            table = TABLES[name](device)
        print("\n" + render(table, options.markdown))


if __name__ == "__main__":
    main()
