"""SegNet's three ways up, on windows of CamVid: unpooling, interpolation, transposed convolution.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.segnet_up DIR      # docs/segnet_up.md says what DIR is

Narrow nets are trained for a few hundred steps on random windows of half-size pictures, the same windows in the same
order for every form, and scored on half-size test pictures. The time is the process's on the CPU, of whole pictures,
the forms in turn, which other processes disturb least; memory is what autograd keeps of one training step: here, and
where the kernels run (on fake tensors). ``--output`` gets ``segnet_up.json`` and ``segnet_up.png``; the table
is printed.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import harness
from fastseg.cli.common import positive_int
from fastseg.io.images import to_tensor
from fastseg.metrics import ConfusionMatrix, median_frequency_weights
from fastseg.models import create
from fastseg.training.dataset import FolderDataset, read_spec
from fastseg.training.transforms import Augment

HERE = Path(__file__).parent
UPS = ("unpool", "bilinear", "transpose")
NETS = {"segnet_basic": {"channels": 16}, "segnet": {"width": 0.125}}
LR = {"segnet_basic": 0.1, "segnet": 0.1}
HALF = (180, 240)  # height and width of the pictures
WINDOW, BATCH, LOOKS = 96, 4, 5
REPETITIONS = 15
MARKS = {"unpool": "-", "bilinear": "--", "transpose": ":"}


def build(net: str, up: str, classes: int, seed: int) -> nn.Module:
    """The same first weights for every form, where it has them."""
    torch.manual_seed(seed)
    return create(net, classes, up=up, **NETS[net]).to(memory_format=torch.channels_last)


@torch.no_grad()
def score(model: nn.Module, pictures: Sequence[tuple[np.ndarray, np.ndarray]], classes: int, void: int) -> float:
    """Mean IoU over the pixels of all pictures."""
    counts = ConfusionMatrix(classes, ignore_index=void)
    model.eval()
    for image, label in pictures:
        counts.update(model.predict(to_tensor(image.copy())), torch.tensor(label)[None])
    model.train()
    return counts.compute(absent="nan").mean_iou


def fit(
    model: nn.Module, windows: Sequence[tuple[Tensor, Tensor]], weight: Tensor, void: int, lr: float, look
) -> tuple[list[float], list[tuple[int, float]]]:
    """Losses of each step, and (step, what ``look(model)`` gives) ``LOOKS`` times."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, len(windows), power=0.9)
    losses, looks = [], []
    every = max(1, len(windows) // LOOKS)
    for step, (images, labels) in enumerate(windows, 1):
        loss = model.loss(images, labels, weight=weight, ignore_index=void)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % every == 0 or step == len(windows):
            looks.append((step, look(model)))
    return losses, looks


def cost(net: str, classes: int, side: tuple[int, int]) -> dict[str, dict]:
    """CPU time, parameters and kept bytes of each form for one picture of CamVid's own size."""
    models = {up: build(net, up, classes, 0).eval() for up in UPS}
    x = to_tensor(np.random.default_rng(0).integers(0, 256, (*side, 3), np.uint8))
    target = torch.zeros(1, *side, dtype=torch.long)
    samples = {up: [] for up in UPS}
    with torch.inference_mode():
        for _ in range(REPETITIONS + 1):  # the first one warms up
            for up, model in models.items():
                began = time.process_time()
                model.predict(x)
                samples[up].append(time.process_time() - began)
    rows = {}
    for up, model in models.items():
        low, median, high = (1e3 * q for q in statistics.quantiles(samples[up][1:], n=4, method="inclusive"))
        model.train()
        kept = harness.kept_bytes(lambda m=model: m.loss(x, target))
        parameters = sum(p.numel() for p in model.parameters())
        rows[up] = {"ms": median, "ms_quartiles": [low, high], "kept_bytes": kept, "parameters": parameters}
    return rows


def kept_where_kernels_run(classes: int, side: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Net -> form -> bytes, of the path that fake CPU tensors take in a process with ``TRITON_INTERPRET=1``."""
    models = {net: {up: build(net, up, classes, 0) for up in UPS} for net in NETS}
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, 3, *side).to(memory_format=torch.channels_last)
        target = torch.empty(1, *side, dtype=torch.long)
        bytes_of = lambda model: harness.kept_bytes(lambda: model.loss(x, target))
        return {net: {up: bytes_of(model) for up, model in forms.items()} for net, forms in models.items()}


def study(args: argparse.Namespace) -> dict:
    """Train, score and time."""
    spec = read_spec(HERE / "camvid.json")
    train_set, test_set = (FolderDataset(args.data, split, spec) for split in ("train", "test"))
    classes, void = len(spec.classes), spec.void
    shrink = Augment(size=HALF, flip=False)
    whole = lambda pair: shrink(*pair, np.random.default_rng(0))
    train_pictures = [whole(train_set[i]) for i in range(0, len(train_set), args.thin)]
    test_pictures = [whole(test_set[i]) for i in range(0, len(test_set), args.thin)]
    weight = median_frequency_weights((torch.tensor(label) for _, label in train_pictures), classes, ignore_index=void)
    few = test_pictures[::4]
    result = {"nets": {}, "curves": {}}
    sides = train_set[0][1].shape
    with_kernels = json.loads(
        subprocess.run(
            [sys.executable, "-m", "benchmarks.studies.segnet_up", str(args.data),
             "--kept", str(classes), *map(str, sides)],
            env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=HERE.parents[1], check=True, capture_output=True, text=True,
        ).stdout
    )  # fmt: skip
    for net in NETS:
        rows = cost(net, classes, sides)
        for up in UPS:
            rows[up] |= {"mean_iou": [], "kept_bytes_with_kernels": with_kernels[net][up]}
        for seed in range(args.seeds):
            rng = np.random.default_rng([seed, 1])
            cut = Augment(scale=(0.8, 1.25), crop=(WINDOW, WINDOW), void=void)
            windows = []
            for _ in range(args.steps):
                pairs = [cut(*train_pictures[i], rng) for i in rng.integers(0, len(train_pictures), BATCH)]
                images, labels = zip(*pairs, strict=True)
                windows.append((to_tensor(np.stack(images)), torch.from_numpy(np.stack(labels))))
            for up in UPS:
                began, model = time.perf_counter(), build(net, up, classes, seed)
                look = lambda model: score(model, few, classes, void)
                losses, looks = fit(model, windows, weight, void, LR[net], look)
                rows[up]["mean_iou"].append(score(model, test_pictures, classes, void))
                result["curves"][f"{net}/{up}/{seed}"] = {"loss": losses, "mean_iou": looks}
                seconds = time.perf_counter() - began
                print(f"{net} {up} seed {seed}: mIoU {rows[up]['mean_iou'][-1]:.4f}, {seconds:.0f} s", file=sys.stderr)
        result["nets"][net] = rows
    return result | {
        "settings": {
            "steps": args.steps, "seeds": args.seeds, "batch": BATCH, "window": WINDOW, "picture": HALF, "nets": NETS,
            "lr": LR, "train_pictures": len(train_pictures), "test_pictures": len(test_pictures),
        },
        "machine": {
            "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "torch": torch.__version__,
            "cpu": platform.machine(),
        },
    }  # fmt: skip


def table(result: dict) -> str:
    """The numbers as Markdown."""
    lines = [
        "| net | up | parameters | mIoU, each seed | mean | CPU time, ms (quartiles) | kept, MB | with kernels, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for net, rows in result["nets"].items():
        for up, row in rows.items():
            seeds = ", ".join(f"{value:.3f}" for value in row["mean_iou"])
            low, high = row["ms_quartiles"]
            lines.append(
                f"| {net} | {up} | {row['parameters']:,} | {seeds} | {statistics.fmean(row['mean_iou']):.3f} | "
                f"{row['ms']:.0f} ({low:.0f}-{high:.0f}) | {row['kept_bytes'] / 1e6:.0f} | "
                f"{row['kept_bytes_with_kernels'] / 1e6:.0f} |"
            )
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    """Loss, smoothed, and mean IoU over the steps, the mean over seeds; a column for each net."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots(2, len(result["nets"]), squeeze=False)
    for column, net in enumerate(result["nets"]):
        for up in UPS:
            runs = [run for key, run in result["curves"].items() if key.startswith(f"{net}/{up}/")]
            loss = np.mean([run["loss"] for run in runs], axis=0)
            width = max(1, len(loss) // 20)
            smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
            axes[0][column].plot(np.arange(len(smooth)) + width, smooth, MARKS[up], label=up)
            steps = [step for step, _ in runs[0]["mean_iou"]]
            values = np.mean([[value for _, value in run["mean_iou"]] for run in runs], axis=0)
            axes[1][column].plot(steps, values, MARKS[up], marker=".", label=up)
        axes[0][column].set(title=net, ylabel="training loss")
        axes[1][column].set(xlabel="step", ylabel="mIoU on test")
        axes[0][column].legend()
    figure.savefig(path, dpi=70)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="CamVid, with train/ and test/")
    parser.add_argument("-o", "--output", type=Path, default=HERE.parents[1] / "docs")
    parser.add_argument("--steps", type=positive_int, default=180)
    parser.add_argument("--seeds", type=positive_int, default=2)
    parser.add_argument("--thin", type=positive_int, default=4, help="every so-manyth picture of each split")
    parser.add_argument("--kept", type=int, nargs=3, metavar=("C", "H", "W"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.kept:
        print(json.dumps(kept_where_kernels_run(args.kept[0], tuple(args.kept[1:]))))
        return 0
    try:
        result = study(args)
    except ValueError as error:
        print(f"segnet_up: {error}", file=sys.stderr)
        return 1
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "segnet_up.json").write_text(json.dumps(rounded(result)) + "\n")
    draw(result, args.output / "segnet_up.png")
    print(table(result))
    return 0


def rounded(value):
    """Plain data with four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


if __name__ == "__main__":
    sys.exit(main())
