"""UNet++ on cell nuclei: IoU at every pruning level beside its parameters, its multiplications and its latency.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive python -m benchmarks.studies.nuclei DIR      # nuclei.md says what DIR is

A narrow UNet++ with deep supervision is trained by ``fastseg.training`` for about ``--seconds``, cut to each of its
levels and scored on the test split, each picture at its own size. What was measured goes into ``study.json``,
``levels.png`` and the learning curves in ``--output``. Checkpoints stay in ``--run``: a run that was interrupted there
goes on with the same command, and one that is finished is scored and timed anew.
"""

import argparse
import copy
import datetime
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import record
from fastseg.cli.common import positive_float, positive_int
from fastseg.io.checkpoint import load_checkpoint
from fastseg.io.processes import Processes
from fastseg.io.progress import progress
from fastseg.measure.comparison import eager_form
from fastseg.measure.timing import interleaved
from fastseg.metrics import ConfusionMatrix
from fastseg.models import UNetPlusPlus, create
from fastseg.training.batches import scoring_batches
from fastseg.training.checkpoints import read_checkpoint
from fastseg.training.curves import write_curves
from fastseg.training.dataset import FolderDataset, read_spec
from fastseg.training.evaluation import Listed, pixels
from fastseg.training.run import Settings, train

HERE = Path(__file__).parent
NUCLEUS = 1
SIDE = 256  # pixels of the square picture that is timed
REPETITIONS = 60  # samples of each level's latency
KEEP = 8  # the epoch that is timed beforehand has every 8th picture
MEAN = "mean of heads"
ALONE = Processes(torch.device("cpu"))
HEADER = ("net", "parameters", "MMAC", "latency, ms", "of the whole net's", "IoU, all pixels", "IoU, mean of pictures")


def fit(args: argparse.Namespace) -> tuple[UNetPlusPlus, dict]:
    """Train, or take up the run that is there: the net of ``best.pt``, and what the training was."""
    splits = [FolderDataset(args.data, split, read_spec(HERE / "nuclei.json")) for split in ("train", "val")]
    for split in splits:
        split.check()
    last = args.run / "last.pt"
    options = {"norm": True, "widths": args.widths, "deep_supervision": True}
    settings = lambda epochs: Settings(
        "unetplusplus", options, splits[0].spec.classes, epochs, args.batch, "adamw", args.lr, weight_decay=1e-4,
        schedule="onecycle", crop=(args.crop, args.crop), scale=(0.7, 1.4), seed=args.seed,
    )  # fmt: skip

    def run(output: Path, epochs: int, sets: Sequence[FolderDataset], **how) -> list[dict]:
        torch.manual_seed(args.seed)
        model = create("unetplusplus", len(splits[0].spec.classes), **options)
        return train(model, settings(epochs), *sets, output, ALONE, **how)

    epochs = args.epochs
    if epochs is None and last.exists():
        epochs = read_checkpoint(last, {})["training"]["settings"]["epochs"]
    if epochs is None:
        with tempfile.TemporaryDirectory() as folder:
            (row,) = run(Path(folder), 1, [_thinned(split) for split in splits])
        epochs = max(1, round(args.seconds / (KEEP * row["seconds"])))
        print(f"an epoch takes about {KEEP * row['seconds']:.0f} s here: {epochs} epochs", file=sys.stderr)
    args.run.mkdir(parents=True, exist_ok=True)
    history = run(args.run, epochs, splits, resume=last.exists())
    args.output.mkdir(parents=True, exist_ok=True)
    write_curves(args.output, history)
    best = max(history, key=lambda row: row["mean_iou"])
    about = {name: getattr(args, name) for name in ("seed", "widths", "batch", "crop", "lr")} | {
        "epochs": epochs, "steps": history[-1]["step"], "seconds": round(sum(row["seconds"] for row in history)),
        "pictures": [len(split) for split in splits], "best_epoch": best["epoch"], "val_mean_iou": best["mean_iou"],
    }  # fmt: skip
    return load_checkpoint(args.run / "best.pt")[0], about


def levels_of(model: UNetPlusPlus) -> dict[str, UNetPlusPlus]:
    """The net cut to each level, and the whole, whose probabilities are the mean of its heads'."""
    nets = {f"L{level}": model.prune(level).eval() for level in range(1, model.levels + 1)}
    x = _picture(64)
    with torch.inference_mode():
        mean = torch.stack([net(x).sigmoid() for net in nets.values()]).mean(0)
        torch.testing.assert_close(model.eval()(x).sigmoid(), mean, rtol=1e-4, atol=1e-4)
    return nets | {MEAN: model}


def scores(net: nn.Module, dataset: FolderDataset, name: str) -> tuple[float, float]:
    """IoU of the nuclei: over the pixels of all pictures, and the mean of the pictures' own."""
    total, each = ConfusionMatrix(2), []
    batches = Listed(scoring_batches(dataset, None, 1, ALONE, 0, False))
    with torch.inference_mode():
        for images, labels, _ in progress(batches, f"score {name}", "picture", leave=False):
            predicted, alone = net.predict(pixels(images, ALONE.device)), ConfusionMatrix(2)
            total.update(predicted, labels)
            alone.update(predicted, labels)
            each.append(alone.compute().iou[NUCLEUS].item())
    return total.compute().iou[NUCLEUS].item(), statistics.fmean(iou for iou in each if not math.isnan(iou))


def latencies(nets: dict[str, nn.Module], repetitions: int) -> dict[str, list[float]]:
    """Quartiles, in milliseconds, of the class map of one picture, one thread, channels_last, nets interleaved."""
    x, threads = _picture(SIDE), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            samples = interleaved({name: lambda net=net: net.predict(x) for name, net in nets.items()},
                                  repetitions=repetitions)  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    quartiles = lambda values: [1e3 * q for q in statistics.quantiles(values, n=4, method="inclusive")]
    return {name: quartiles(values) for name, values in samples.items()}


def macs(net: nn.Module) -> int:
    """Multiplications of the convolutions for one picture of ``SIDE`` pixels square."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        eager_form(net)(_picture(SIDE))
    return counter.get_total_flops() // 2


def study(args: argparse.Namespace) -> dict:
    """Train, score and time."""
    dataset = FolderDataset(args.data, "test", read_spec(HERE / "nuclei.json"))
    dataset.check()
    model, training = fit(args)
    nets = levels_of(model)
    rows = {}
    for name, net in nets.items():
        over_pixels, over_pictures = scores(net, dataset, name)
        parameters = sum(p.numel() for p in net.parameters())
        rows[name] = {"parameters": parameters, "macs": macs(net), "iou": over_pixels, "iou_of_pictures": over_pictures}
    load = os.getloadavg()[0]  # this process is 1 of it
    for name, (low, median, high) in latencies(nets, REPETITIONS).items():
        rows[name] |= {"ms": median, "ms_quartiles": [low, high]}
    machine = {
        "cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "load_when_timed": load,
    }  # fmt: skip
    return {"date": datetime.date.today().isoformat(), "machine": machine, "training": training,
            "test_pictures": len(dataset), "side": SIDE, "repetitions": REPETITIONS, "nets": rows}  # fmt: skip


def markdown(result: dict) -> str:
    """The table of a study."""
    whole = [row for name, row in result["nets"].items() if name != MEAN][-1]
    lines = [HEADER, ["---"] * len(HEADER)]
    for name, row in result["nets"].items():
        counts = (f"{row['parameters']:,}", f"{row['macs'] / 1e6:.0f}", f"{row['ms']:.1f}")
        iou = (f"{100 * row['iou']:.2f}", f"{100 * row['iou_of_pictures']:.2f}")
        lines.append((name, *counts, f"{row['ms'] / whole['ms']:.2f}", *iou))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(path: Path, result: dict) -> None:
    """IoU of the levels over their parameters and over their latency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    levels = {name: row for name, row in result["nets"].items() if name != MEAN}
    iou, mean = [100 * row["iou"] for row in levels.values()], result["nets"][MEAN]
    for axes, key, unit in zip(figure.subplots(1, 2, sharey=True), ("parameters", "ms"), ("parameters", "ms"),
                               strict=True):  # fmt: skip
        values = [row[key] for row in levels.values()]
        axes.plot(values, iou, "o-", color="#c8553d", label="cut to a level")
        for name, x, y in zip(levels, values, iou, strict=True):
            axes.annotate(name, (x, y), (0, 7), textcoords="offset points", ha="center")
        axes.plot(mean[key], 100 * mean["iou"], "s", color="#5b8db8", fillstyle="none", label=MEAN)
        axes.set_xlabel(f"{unit}, 1x3x{SIDE}x{SIDE}, one thread" if key == "ms" else unit)
        axes.margins(0.12)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if key == "parameters":
            axes.set(xscale="log", ylabel="IoU of nuclei, test, %")
            axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> int:
    """Train and study; 0, or 2 after one line on what is wrong."""
    parser = argparse.ArgumentParser(description="UNet++ on cell nuclei at every pruning level.")
    add = parser.add_argument
    add("data", type=Path, metavar="DIR", help="with train/, val/ and test/, of images/ and labels/ each")
    add("-o", "--output", type=Path, default=record.RESULTS / "nuclei", help="default: %(default)s")
    add("--run", type=Path, default=record.ROOT / "out" / "nuclei", help="for checkpoints (default: %(default)s)")
    add("--seconds", type=positive_float, default=240.0, help="of training, about (default: %(default)s)")
    add("--epochs", type=positive_int, help="instead of --seconds, to repeat a run")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--widths", type=positive_int, nargs="+", default=[8, 16, 32, 64, 128], help="default: %(default)s")
    add("--batch", type=positive_int, default=8, help="default: %(default)s")
    add("--crop", type=positive_int, default=128, help="pixels of the training window (default: %(default)s)")
    add("--lr", type=positive_float, default=3e-3, help="the highest of the cycle (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if not args.data.is_dir():
            raise ValueError(
                f"{args.data}: no such folder; benchmarks/studies/nuclei.md says where its pictures come from"
            )
        result = study(args)
        part = args.output / "study.part"
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(args.output / "study.json")
        draw(args.output / "levels.png", result)
    except (ValueError, OSError, ImportError) as error:
        print(f"nuclei: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nuclei: interrupted; the same command goes on with the run", file=sys.stderr)
        return 1
    print(markdown(result))
    print(f"the figure is {args.output / 'levels.png'}")
    return 0


def _thinned(dataset: FolderDataset) -> FolderDataset:
    part = copy.copy(dataset)
    part.names, part.pairs = dataset.names[::KEEP], dataset.pairs[::KEEP]
    return part


def _picture(side: int) -> torch.Tensor:
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    return image.to(memory_format=torch.channels_last)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
