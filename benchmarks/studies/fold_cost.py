"""Print what folding at each call costs, and what a Runner's look at the model costs, on this machine.

OMP_NUM_THREADS=1 TRITON_INTERPRET=0 python -m benchmarks.studies.fold_cost
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "0")

import operator
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import chain

import torch
from torch import Tensor

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


class Saved(torch.autograd.Function):
    """What a backward would read again: torch compares the counts of writes of all of it in C++."""

    @staticmethod
    def forward(ctx, x: Tensor, *tensors: Tensor) -> Tensor:
        """A copy of ``x``."""
        ctx.save_for_backward(*tensors)
        return x.clone()


def parts(marks: Marks) -> dict[str, Callable[[], object]]:
    """The comparisons that ``Marks.are_current`` with "counts" consists of, and torch's own of the counts of writes."""
    node = Saved.apply(torch.ones(1, requires_grad=True), *marks.counted).grad_fn
    objects = marks.objects
    return {
        "counts of writes": lambda: [t._version for t in marks.counted] != marks.versions,
        "the same in C++": lambda: node.saved_tensors,
        "addresses": lambda: list(map(Tensor.data_ptr, marks.tensors)) != marks.addresses,
        "options": lambda: list(map(operator.call, marks.getters, marks.getters_dicts)) != marks.options,
        "submodules, tensors, hooks": lambda: all(
            map(operator.is_, list(chain.from_iterable(marks.held)), objects)
        ) and not any(marks.empty),
        "classes, new attributes": lambda: (
            list(map(len, marks.dicts)) != marks.sizes, list(map(type, marks.modules)) != marks.types
        ),
    }  # fmt: skip


def main() -> None:
    """Three tables in Markdown; with --look the last two."""
    if "--look" not in sys.argv:
        folds()
    looks()


def folds() -> None:
    """What folding costs."""
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


def looks() -> None:
    """What a look at the model costs, and what it consists of."""
    print("\n| a Runner's look at the model, us | tensors |", " | ".join(CHECKS), "|\n| --- | --- | --- | --- | --- |")
    for label, (name, options) in MODELS.items():
        model, cells = create(name, 21, **options), []
        for check in CHECKS:
            marks = Marks(model, check)
            assert marks.are_current()
            cells.append(f"{1e3 * statistics.median(milliseconds(marks.are_current, 20) for _ in range(3)):.0f}")
        print(f"| {label} | {len(marks.tensors)} |", " | ".join(cells), "|")
    print("\n| part of a look by counts, us |", " | ".join(MODELS), "|\n| --- |", " --- |" * len(MODELS))
    each = [parts(Marks(create(name, 21, **options), "counts")) for name, options in MODELS.values()]
    for part in each[0]:
        times = (1e3 * min(milliseconds(of[part], 50) for _ in range(5)) for of in each)
        print(f"| {part} |", " | ".join(f"{t:.0f}" for t in times), "|")


if __name__ == "__main__":
    main()
