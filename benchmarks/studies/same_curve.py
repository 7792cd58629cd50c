"""Train one model several times from one seed, fused and not, and compare the losses step by step.

    python -m benchmarks.studies.same_curve --model segnet_basic -o benchmarks/studies/curves/same_curve_cpu
    TRITON_INTERPRET=1 python -m benchmarks.studies.same_curve ...      # the Triton kernels, on a CPU

What is a difference, and what is noise? Every run is compared with ``fastseg.reference()``:

    fastseg     as users run it: kernels on a GPU and under the interpreter
    plain       torch's modules one by one, nothing of fastseg between them
    rounding    the reference from weights that are each moved by one rounding, up or down: three such runs
    lr + 1 %    the reference at a rate that is wrong by one percent: what a mistake looks like

A rounding can grow from step to step, so noise is what ``rounding`` has differed by up to a step. "Within noise"
allows ``FACTOR`` times that at every step; else the exit status is 1. The data are generated, or windows of a data
set's pictures.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fastseg
from fastseg.cli.common import add_device, describe, positive_float, positive_int
from fastseg.models import create, names
from fastseg.ops.core.dispatch import HAS_TRITON, INTERPRETED
from fastseg.training.batches import collate
from fastseg.training.dataset import FolderDataset, read_spec
from fastseg.training.evaluation import pixels, window
from fastseg.training.transforms import Augment

FACTOR = 10  # times what roundings differ by: three runs do not show the largest
NUDGED = 3
MOMENTUM = 0.9
VOID = 255
COLOURS = {"fastseg": "#c8553d", "plain": "#5b8db8", "lr + 1 %": "#555555"}

Batch = tuple[Tensor, Tensor]  # (N, 3, H, W) as models take it, class indices (N, H, W)


def generated(steps: int, batch: int, size: tuple[int, int], classes: int, seed: int) -> list[Batch]:
    """Blobs, each class of its own colour, under noise as strong as the colours; the border is void."""
    rng = torch.Generator().manual_seed(seed)
    colours = torch.randn(classes, 3, generator=rng)
    batches = []
    for _ in range(steps):
        coarse = torch.randn(batch, classes, *(max(2, side // 8) for side in size), generator=rng)
        labels = nn.functional.interpolate(coarse, size, mode="bilinear").argmax(1)
        images = colours[labels].permute(0, 3, 1, 2) + torch.randn(batch, 3, *size, generator=rng)
        labels[:, :, 0] = VOID
        batches.append((images, labels))
    return batches


def from_folder(dataset: FolderDataset, steps: int, batch: int, size: tuple[int, int], seed: int) -> list[Batch]:
    """Random windows of ``size`` of random pictures."""
    augment, rng = Augment(crop=size, void=dataset.spec.void), np.random.default_rng(seed)
    batches = []
    for _ in range(steps):
        chosen = rng.choice(len(dataset), batch, replace=False)
        images, labels = collate([augment(*dataset[int(index)], rng) for index in chosen])
        batches.append((pixels(images, torch.device("cpu")), labels.long()))
    return batches


def losses(model: nn.Module, batches: Sequence[Batch], lr: float, void: int = VOID) -> list[float]:
    """Train ``model`` in place, one step of SGD a batch, and return the loss of each."""
    weight = next(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=MOMENTUM)
    model.train()
    curve = []
    for step, (images, labels) in enumerate(batches):
        torch.manual_seed(step)  # of dropout
        images = images.to(weight.device, weight.dtype, memory_format=torch.channels_last)
        loss = model.loss(images, window(labels, model).to(weight.device), ignore_index=void)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def nudged(model: nn.Module, seed: int) -> nn.Module:
    """``model`` with each weight moved by one rounding, up or down."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            sign = torch.randint(0, 2, p.shape, generator=rng).to(p.device) * 2 - 1
            p.mul_(1 + sign.to(p.dtype) * torch.finfo(p.dtype).eps)
    return model


def runs(
    fresh: Callable[[], nn.Module], batches: Sequence[Batch], lr: float, void: int = VOID
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """The losses of each run, and how many calls of fastseg's ops took which path, a step."""
    with fastseg.explain() as report:
        curves = {"fastseg": losses(fresh(), batches, lr, void)}
    paths = {path: count // len(batches) for path, count in Counter(f"{d.op}: {d.path}" for d in report).items()}
    with fastseg.reference():
        curves["reference"] = losses(fresh(), batches, lr, void)
        with fastseg.unfused():
            curves["plain"] = losses(fresh(), batches, lr, void)
        for seed in range(NUDGED):
            curves[f"rounding {seed}"] = losses(nudged(fresh(), seed), batches, lr, void)
        curves["lr + 1 %"] = losses(fresh(), batches, 1.01 * lr, void)
    return curves, paths


def noise(curves: dict[str, list[float]]) -> np.ndarray:
    """Of each step, the largest difference of a nudged run so far; at least one rounding of the loss."""
    reference = np.array(curves["reference"])
    spread = [np.abs(np.array(curve) - reference) for name, curve in curves.items() if name.startswith("rounding")]
    return np.maximum(np.maximum.accumulate(np.max(spread, 0)), np.finfo(np.float32).eps * np.abs(reference))


def ratios(curves: dict[str, list[float]]) -> dict[str, float]:
    """Of each run that is no rounding, its largest difference from the reference, over the noise at that step."""
    reference, scale = np.array(curves["reference"]), noise(curves)
    return {name: float((np.abs(np.array(curves[name]) - reference) / scale).max()) for name in COLOURS}


def draw(path: Path, title: str, curves: dict[str, list[float]]) -> None:
    """Both curves, and how far each run is from the reference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, reference, scale = range(1, 1 + len(curves["reference"])), np.array(curves["reference"]), noise(curves)
    left.plot(steps, reference, color="#9a9a9a", linewidth=4, label="reference")
    left.plot(steps, curves["fastseg"], color=COLOURS["fastseg"], linewidth=1.2, label="fastseg")
    left.set(xlabel="step", ylabel="training loss")
    least = np.finfo(np.float32).eps / 10  # where a difference of 0 is drawn
    right.fill_between(steps, least, FACTOR * scale, color="#e4e4e4", label=f"{FACTOR} x rounding")
    right.plot(steps, scale, color="#9a9a9a", linestyle=":", label="rounding")
    for name, colour in COLOURS.items():
        right.plot(steps, np.abs(np.array(curves[name]) - reference).clip(least), ".-", color=colour, label=name)
    right.set(xlabel="step", ylabel="|loss - reference's|", yscale="log")
    figure.suptitle(title, fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0, 1), columnspacing=1)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=names(), default="segnet_basic", help="default: %(default)s")
    add("--options", type=json.loads, default={}, metavar="JSON", help="of the model")
    add("--steps", type=positive_int, default=60, help="default: %(default)s")
    add("--batch", type=positive_int, default=4, help="default: %(default)s")
    add("--size", type=positive_int, nargs=2, default=(96, 128), metavar=("H", "W"), help="default: 96 128")
    add("--lr", type=positive_float, default=0.1, help="default: %(default)s")
    add("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    add("--data", type=Path, metavar="DIR", help="a data set's folder with train/ (default: generated pictures)")
    add("--dataset", type=Path, metavar="FILE", help="classes and ignore index (default: dataset.json in --data)")
    add("-o", "--output", type=Path, required=True, metavar="NAME", help="writes NAME.json and NAME.png")
    add_device(parser)
    args = parser.parse_args()
    size = tuple(args.size)
    if args.data is None:
        classes, void, batches = 4, VOID, generated(args.steps, args.batch, size, 4, args.seed)
    else:
        spec = read_spec(args.dataset or args.data / "dataset.json")
        classes, void = len(spec.classes), spec.void
        batches = from_folder(FolderDataset(args.data, "train", spec), args.steps, args.batch, size, args.seed)

    def fresh() -> nn.Module:
        torch.manual_seed(args.seed)
        return create(args.model, classes, **args.options).to(args.device, memory_format=torch.channels_last)

    curves, paths = runs(fresh, batches, args.lr, void)
    found = ratios(curves)
    versions = {"torch": torch.__version__}
    if HAS_TRITON:
        import triton

        versions["triton"] = triton.__version__
    about = {
        "model": args.model, "options": args.options, "data": "generated" if args.data is None else args.data.name,
        "size": size, "batch": args.batch, "steps": args.steps, "lr": args.lr, "momentum": MOMENTUM, "seed": args.seed,
        "device": describe(args.device), "interpreter": INTERPRETED, **versions, "calls a step": paths,
        "difference over rounding's": found,
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(about | {"losses": curves}, indent=1) + "\n")
    kernels = sum(count for path, count in paths.items() if path.endswith("triton"))
    where = f"{describe(args.device)}{' under the interpreter' if INTERPRETED else ''}"
    title = f"{args.model}, {args.batch} x {size[0]} x {size[1]}, {where}; calls of kernels a step: {kernels}"
    draw(args.output.with_suffix(".png"), title, curves)
    print(title)
    difference = np.abs(np.array(curves["fastseg"]) - np.array(curves["reference"]))
    print(
        f"loss {curves['reference'][0]:.4f} -> {curves['reference'][-1]:.4f}, largest difference {difference.max():.2e}"
    )
    for name, ratio in found.items():
        print(f"{name:<10}{ratio:>12.2f} x rounding, at most; {'within' if ratio <= FACTOR else 'beyond'} noise")
    return 0 if max(found["fastseg"], found["plain"]) <= FACTOR else 1


if __name__ == "__main__":
    raise SystemExit(main())
