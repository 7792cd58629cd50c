"""Print what folding at each call costs, and what a Runner's look at the model costs, on this machine.

OMP_NUM_THREADS=1 TRITON_INTERPRET=0 python -m benchmarks.studies.fold_cost
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "0")

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

import fastseg
from fastseg.models import create
from fastseg.ops.core.marks import CHECKS, Marks

MODELS = {
    "deeplabv3plus, mobilenet_v2": ("deeplabv3plus", {"backbone": "mobilenet_v2"}),
    "unet, norm": ("unet", {"padding": "same", "norm": True}),
    "fcn, resnet18": ("fcn", {"backbone": "resnet18"}),
}


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """The least of so many: what the machine does beside it only adds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def main() -> None:
    """Two tables in Markdown."""
    print("| model, 1 image | frozen, ms | at each call, ms |\n| --- | --- | --- |")
    with torch.no_grad():
        for label, (name, options) in MODELS.items():
            model = create(name, 21, **options).eval().to(memory_format=torch.channels_last)
            for side in (64, 128, 256):
                x = torch.randn(1, 3, side, side).to(memory_format=torch.channels_last)
                kept, made = [], []
                for _ in range(4):  # by turns
                    with fastseg.frozen(model):
                        model(x)
                        kept.append(milliseconds(partial(model, x), 2))
                    made.append(milliseconds(partial(model, x), 2))
                print(f"| {label}, {side}x{side} | {min(kept):.1f} | {min(made):.1f} |")
    print("\n| a Runner's look at the model, us | tensors |", " | ".join(CHECKS), "|\n| --- | --- | --- | --- | --- |")
    for label, (name, options) in MODELS.items():
        model, cells = create(name, 21, **options), []
        for check in CHECKS:
            marks = Marks(model, check)
            assert marks.are_current()
            cells.append(f"{1e3 * statistics.median(milliseconds(marks.are_current, 20) for _ in range(3)):.0f}")
        print(f"| {label} | {len(marks.tensors)} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
