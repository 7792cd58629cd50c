"""Losses on cell nuclei: the same U-Net, the same windows in the same order, another loss each.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.losses_nuclei DIR   # docs/losses.md: a run; nuclei.md: what DIR is

Each loss is a ``fastseg train --loss``; its best epoch on val is scored on the test pictures, each at its own size.
``--output`` gets ``losses.json`` and ``losses.png``; a table is printed.
"""

import argparse
import csv
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastseg.cli import main as fastseg
from fastseg.cli.common import positive_int
from fastseg.inference.segment import segment
from fastseg.io.checkpoint import load_checkpoint
from fastseg.metrics import ConfusionMatrix
from fastseg.training.dataset import FolderDataset, read_spec

HERE = Path(__file__).parent
LOSSES = ("ce", "dice", "ce+dice", "focal+dice", "tversky")
OPTIONS = ("padding=same", "norm=true", "widths=[8,16,32,64]")
NUCLEUS = 1


def trained(args: argparse.Namespace, loss: str, folder: Path) -> list[dict[str, float]]:
    """The curve of one training: a row an epoch."""
    options = [part for option in OPTIONS for part in ("--option", option)]
    line = ["train", "--data", args.data, "--dataset", HERE / "nuclei.json", "--model", "unet", *options,
            "--loss", loss, "--epochs", args.epochs, "--batch", args.batch, "--crop", args.crop, args.crop,
            "--optimizer", "adamw", "--lr", 0.003, "--weight-decay", 1e-4, "--schedule", "onecycle",
            "--scale", 0.7, 1.4, "--seed", args.seed, "--device", "cpu", "-o", folder]  # fmt: skip
    if fastseg([str(part) for part in line]):
        raise SystemExit(f"{loss}: the training failed")
    with (folder / "curves.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@torch.inference_mode()
def scored(weights: Path, test: FolderDataset) -> dict[str, float]:
    """IoU, precision and recall of the nuclei over the pixels of all test pictures."""
    model, total = load_checkpoint(weights)[0], ConfusionMatrix(2)
    for image, label in (test[i] for i in range(len(test))):
        total.update(torch.from_numpy(segment(model, image[None])), torch.as_tensor(label)[None])
    found = total.compute()
    return {name: getattr(found, name)[NUCLEUS].item() for name in ("iou", "precision", "recall")}


def draw(path: Path, results: dict[str, dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(3, 2), constrained_layout=True)
    for i, (loss, result) in enumerate(results.items()):
        curve = result["curve"]
        left.plot(
            [r["epoch"] for r in curve], [r["mean_iou"] for r in curve], marker="o", ms=3, label=loss, color=f"C{i}"
        )
        right.barh(loss, 100 * result["test"]["iou"], color=f"C{i}")
        right.text(100 * result["test"]["iou"], i, f" {100 * result['test']['iou']:.1f}", va="center")
    left.set(xlabel="epoch", ylabel="mean IoU on val")
    left.grid(alpha=0.3)
    left.legend()
    right.set(xlabel="IoU of nuclei on test, %", xlim=(0, 100))
    right.invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", metavar="DIR", help="with train, val and test")
    add("--losses", nargs="+", default=LOSSES, metavar="NAMES")
    add("--epochs", type=positive_int, default=6)
    add("--batch", type=positive_int, default=8)
    add("--crop", type=positive_int, default=96)
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=HERE.parent / "results" / "nuclei")
    args = parser.parse_args(argv)
    test = FolderDataset(args.data, "test", read_spec(HERE / "nuclei.json"))
    test.check()
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, loss in enumerate(args.losses):
            print(f"{loss} ({i + 1} of {len(args.losses)})", file=sys.stderr)
            begun, run = time.process_time(), Path(folder, str(i))
            curve = trained(args, loss, run)
            results[loss] = {"curve": curve, "test": scored(run / "best.pt", test),
                             "cpu_seconds": round(time.process_time() - begun)}  # fmt: skip
            print(f"{loss}: {results[loss]['test']}", file=sys.stderr)
    about = {"options": OPTIONS, "epochs": args.epochs, "batch": args.batch, "crop": args.crop, "seed": args.seed,
             "pictures": len(test), "torch": torch.__version__, "threads": torch.get_num_threads(),
             "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
             "date": time.strftime("%Y-%m-%d")}  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "losses.json").write_text(json.dumps({"about": about, "losses": results}, indent=1) + "\n")
    draw(args.output / "losses.png", results)
    print("| loss | IoU of nuclei, test | precision | recall | best mean IoU, val |\n| --- | --- | --- | --- | --- |")
    for loss, result in results.items():
        found, best = result["test"], max(row["mean_iou"] for row in result["curve"])
        cells = (f"{100 * found[name]:.1f}" for name in ("iou", "precision", "recall"))
        print(f"| `{loss}` | {' | '.join(cells)} | {best:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
