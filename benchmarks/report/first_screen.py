"""The README's picture: photograph, truth and prediction of the demo, and the measured times of the peers' table.

    fastseg demo -o demo && python -m benchmarks.report.first_screen    # the demo trains for a minute

Reads ``DIR/weights.pt`` of ``fastseg demo -o DIR`` and ``benchmarks/results/peers/latency.json``, writes
``docs/first_screen.png``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.report import record
from benchmarks.studies import peers
from fastseg.demo.mosaic import CLASSES, halves, load_photographs, mosaics
from fastseg.inference import Predictor
from fastseg.io.images import class_map
from fastseg.measure.report import read_results

SIDE, SEED = 160, 1
SHOWN = {  # path -> what it is called, and its colour
    "eager-cl": ("eager, channels_last", "#9a9a9a"),
    "compile-max": ("torch.compile, max-autotune", "#5b8db8"),
    "onnxruntime": ("onnxruntime", "#7fa37f"),
    "openvino": ("OpenVINO", "#b8a15b"),
    "runner": ("fastseg.inference.Runner", "#c8553d"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Draw; 0."""
    parser = argparse.ArgumentParser(description="Draw the README's picture.")
    parser.add_argument("--weights", type=Path, default=Path("demo/weights.pt"), help="of `fastseg demo`")
    parser.add_argument("-o", "--output", type=Path, default=record.ROOT / "docs" / "first_screen.png")
    options = parser.parse_args(argv)
    pictures, labels = mosaics(halves(load_photographs())[1], 1, SIDE, np.random.default_rng(SEED))
    predicted = Predictor(options.weights)({"image": pictures})["classes"][0]
    agreement = float((predicted == labels[0]).mean())

    figure = Figure(figsize=(11, 2.6), layout="constrained")
    *panels, bars = figure.subplots(1, 4, width_ratios=(1, 1, 1, 2.4))
    images = (
        pictures[0],
        class_map(labels[0], len(CLASSES)).convert("RGB"),
        class_map(predicted, len(CLASSES)).convert("RGB"),
    )
    titles = "photographs, composed", "truth", f"prediction, {agreement:.0%} right"
    for axes, image, title in zip(panels, images, titles, strict=True):
        axes.imshow(np.asarray(image))
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    draw_peers(bars, read_results(peers.FOLDER / "latency.json"))
    figure.savefig(options.output, dpi=120, metadata={"Software": None})
    print(options.output)
    return 0


def draw_peers(axes, results: dict) -> None:
    """Bars of time over eager NCHW's, a group for each model."""
    rows = results["rows"]
    cases = dict.fromkeys((row["model"], row["height"], row["width"]) for row in rows)
    width = 0.8 / len(SHOWN)
    for i, (path, (name, colour)) in enumerate(SHOWN.items()):
        heights = []
        for case in cases:
            own = {row["path"]: row for row in rows if (row["model"], row["height"], row["width"]) == case}
            measured = own.get(path, {}).get("median_ms")
            heights.append(0 if measured is None else measured / own["eager"]["median_ms"])
        axes.bar([x + i * width for x in range(len(cases))], heights, width, color=colour, label=name)
    axes.set_xticks(
        [x + 0.4 - width / 2 for x in range(len(cases))], [f"{m}\n{h}x{w}" for m, h, w in cases], fontsize=8
    )
    made = results["machine"]
    axes.set_ylim(0, 1.2)
    axes.axhline(1, color="#444444", linewidth=0.8)
    axes.set_ylabel("time / eager", fontsize=8)
    axes.set_title(f"CPU, {made['threads']} thread(s), torch {made['torch']}: shorter is faster", fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=6.5, ncols=2, frameon=False, loc="upper left")


if __name__ == "__main__":
    sys.exit(main())
