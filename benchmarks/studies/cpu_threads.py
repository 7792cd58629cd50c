"""CPU paths against eager PyTorch at one thread and at the default number, in both layouts, on a quiet or busy machine.

    python -m benchmarks.studies.cpu_threads --ops argmax loss --classes 1 2 21 150
    python -m benchmarks.studies.cpu_threads --busy 6 -o busy.md

Each row is one case: the time of fastseg over that of eager PyTorch, by medians and by minima of samples taken in turn,
for each number of threads; a summary by op stands before. Eager has the same tensors in the same layout; ``other
layout`` says what fastseg takes of eager's time on the same values in the other one. Ratios at most 1 are what is
wanted. One thread is timed by what it computes, which other programs hardly disturb; several by the clock on the wall,
or all of it with ``--busy``. A slow spell of the machine slows both alike; still, differences of a few percent are
noise.
"""

import argparse
import contextlib
import itertools
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.inference import Runner
from fastseg.measure.comparison import eager_form
from fastseg.models import create, names
from fastseg.nn.conv import SeparableConv2d
from fastseg.ops import (
    aspp,
    atrous_conv2d,
    bilinear_conv_transpose2d,
    bilinear_kernel,
    max_pool2d,
    max_unpool2d,
    upsample_argmax,
    upsample_bilinear,
    upsample_cross_entropy,
)
from fastseg.ops.core.kept import Kept
from fastseg.ops.cpu.packed import PackedWeights, conv2d, packed_weights

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
LOAD = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(10**6))"
FULL_SIZE = {"unet": {"padding": "same", "norm": True}, "unetplusplus": {"norm": True, "up": "bilinear"}}
LEAST_SAMPLES, MOST_SAMPLES = 7, 400

Function = Callable[[], object]


class Case(NamedTuple):
    """One comparison."""

    name: str
    fastseg: Function
    eager: Function  # same layout
    other: Function | None = None  # eager in the other layout


class Row(NamedTuple):
    """Fastseg's time over eager's: of medians, of minima, and of medians against eager in the other layout."""

    name: str
    threads: int
    median: float
    least: float
    other: float | None
    eager_ms: float


# --- cases: (layout, classes) -> what is compared


def _map(*shape: int, layout: str = "NCHW", seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=LAYOUTS[layout])


def _other(layout: str) -> str:
    return next(name for name in LAYOUTS if name != layout)


def argmax_cases(layout: str, classes: int, sides: Iterable[int], strides=(4, 16, 32)) -> Iterator[Case]:
    """One image."""
    for side, stride in itertools.product(sides, strides):
        x = _map(1, classes, side // stride, side // stride, layout=layout)
        y = x.contiguous(memory_format=LAYOUTS[_other(layout)])
        eager = lambda x, side=side: F.interpolate(x, (side, side), mode="bilinear").argmax(1)
        yield Case(
            f"argmax {layout} C={classes} {side}^2 /{stride}",
            lambda x=x, side=side: upsample_argmax(x, side),
            lambda x=x, eager=eager: eager(x),
            lambda y=y, eager=eager: eager(y),
        )


def loss_cases(layout: str, classes: int, sides: Iterable[int], strides=(4, 16, 32), **options) -> Iterator[Case]:
    """Forward and backward, batch 2."""
    for side in sides:
        target = torch.randint(classes, (2, side, side), generator=torch.Generator().manual_seed(1))
        for stride in strides:
            x = _map(2, classes, side // stride, side // stride, layout=layout).requires_grad_()
            y = x.detach().contiguous(memory_format=LAYOUTS[_other(layout)]).requires_grad_()

            def ours(x=x, target=target):
                return torch.autograd.grad(upsample_cross_entropy(x, target, **options), x)

            def eager(x, target=target, side=side):
                full = F.interpolate(x, (side, side), mode="bilinear")
                return torch.autograd.grad(F.cross_entropy(full, target, **options), x)

            name = f"loss {layout} C={classes} {side}^2 /{stride}"
            yield Case(name, ours, lambda x=x, eager=eager: eager(x), lambda y=y, eager=eager: eager(y))


def deconv_cases(layout: str, classes: int, sides: Iterable[int]) -> Iterator[Case]:
    """FCN's transposed convolutions, against a dense weight as the article has it, and against a grouped one."""
    for side in sides:
        for stride in (2, 8, 32):
            if classes > 21 and stride > 2:
                continue  # eager takes minutes
            x, K = _map(1, classes, side // stride, side // stride, layout=layout), 2 * stride
            dense = bilinear_kernel(classes, classes, K)
            grouped = dense.diagonal().permute(2, 0, 1)[:, None].contiguous()
            ours = lambda x=x, stride=stride: bilinear_conv_transpose2d(x, stride)
            for kind, weight, groups in (("dense", dense, 1), ("grouped", grouped, classes)):
                eager = lambda x=x, weight=weight, groups=groups, stride=stride: F.conv_transpose2d(
                    x, weight, None, stride, stride // 2, groups=groups
                )
                yield Case(f"deconvolution {layout} C={classes} {side}^2 x{stride}, {kind}", ours, eager)


def upsample_cases(layout: str, classes: int, sides: Iterable[int]) -> Iterator[Case]:
    """Bilinear upsampling alone, forward and backward."""
    for side in sides:
        x = _map(1, classes, side // 4, side // 4, layout=layout).requires_grad_()
        seed = _map(1, classes, side, side, layout=layout)
        step = lambda up, x=x, side=side, seed=seed: torch.autograd.grad(up(x, side), x, seed)
        yield Case(
            f"upsampling {layout} C={classes} {side}^2",
            lambda step=step: step(upsample_bilinear),
            lambda step=step: step(lambda t, size: F.interpolate(t, size, mode="bilinear")),
        )


SEPARABLE = ((128, 128, 64, 1), (728, 728, 32, 1), (256, 256, 32, 12), (64, 64, 32, 6))  # in, out, side, dilation
ATROUS = ((256, 256, 32, 12), (64, 64, 32, 2), (128, 128, 32, 18))
POOLING = ((64, 128), (512, 16), (8, 32))  # channels, side
WINOGRAD = ((64, 128), (64, 32), (128, 64), (128, 16), (256, 32), (512, 16))


@torch.no_grad()
def separable_cases(layout: str, shapes=SEPARABLE) -> Iterator[Case]:
    """The demo's shapes of DeepLabV3+, and dilation 12 of ASPP."""
    for channels, out, side, dilation in shapes:
        module = SeparableConv2d(channels, out, dilation=dilation, mid_norm=True, mid_act="relu")
        module = module.to(memory_format=LAYOUTS[layout]).eval()
        plain, x = eager_form(module), _map(1, channels, side, side, layout=layout)
        yield Case(
            f"separable {layout} {channels}->{out} {side}^2 d{dilation}",
            lambda m=module, x=x: m(x),
            lambda p=plain, x=x: p(x),
        )


def atrous_cases(layout: str, shapes=ATROUS) -> Iterator[Case]:
    """Dilated convolutions, and ASPP at the first of the shapes, with half as many channels a branch."""
    for channels, out, side, dilation in shapes:
        x, weight = _map(1, channels, side, side, layout=layout), _map(out, channels, 3, 3, seed=1)
        weight = weight.contiguous(memory_format=LAYOUTS[layout])
        yield Case(
            f"atrous {layout} {channels}->{out} {side}^2 d{dilation}",
            lambda x=x, w=weight, d=dilation: atrous_conv2d(x, w, dilation=d, act="relu"),
            lambda x=x, w=weight, d=dilation: F.conv2d(x, w, padding=d, dilation=d).relu_(),
        )
    channels, side = shapes[0][0], shapes[0][2]
    x, out = _map(1, channels, side, side, layout=layout), channels // 2
    form = lambda t: t.contiguous(memory_format=LAYOUTS[layout])
    rates = (1, 6, 12, 18)
    weights = [form(_map(out, channels, k, k, seed=k)) for k in (1, 3, 3, 3)]
    pool, project = form(_map(out, channels, 1, 1, seed=5)), form(_map(out, 5 * out, 1, 1, seed=6))

    def eager() -> Tensor:
        maps = [
            F.conv2d(x, w, padding=d * (w.shape[-1] // 2), dilation=d).relu_()
            for w, d in zip(weights, rates, strict=True)
        ]
        image = F.conv2d(x.mean((2, 3), keepdim=True), pool).relu_()
        maps.append(F.interpolate(image, x.shape[2:], mode="bilinear"))
        return F.conv2d(torch.cat(maps, 1), project).relu_()

    ours = lambda: aspp(x, weights, rates, project_weight=project, pool_weight=pool)
    yield Case(f"aspp {layout} {channels}->{out} {side}^2", ours, eager)


def pooling_cases(layout: str, shapes=POOLING) -> Iterator[Case]:
    """SegNet's pooling and unpooling."""
    for channels, side in shapes:
        x = _map(1, channels, side, side, layout=layout)
        values, index = F.max_pool2d(x, 2, return_indices=True)
        name = f"{layout} {channels}x{side}^2"
        yield Case(
            f"pooling {name}",
            lambda x=x: max_pool2d(x, 2, return_indices=True),
            lambda x=x: F.max_pool2d(x, 2, return_indices=True),
        )
        yield Case(
            f"unpooling {name}",
            lambda v=values, i=index: max_unpool2d(v, i, 2),
            lambda v=values, i=index: F.max_unpool2d(v, i, 2),
        )


@torch.no_grad()
def winograd_cases(layout: str, shapes=WINOGRAD) -> Iterator[Case]:
    """Packed 3x3 convolutions, Winograd's among them."""
    for channels, side in shapes:
        x, weight = _map(1, channels, side, side, layout=layout), _map(channels, channels, 3, 3, seed=1)
        plain = weight.contiguous(memory_format=LAYOUTS[layout])
        kept: dict[int, PackedWeights] = {}

        def ours(x=x, weight=weight, kept=kept):
            threads = torch.get_num_threads()
            if threads not in kept:
                kept[threads] = PackedWeights(Kept([weight]))
            with packed_weights(kept[threads]):
                return conv2d(x, weight, padding=(1, 1), act="relu")

        yield Case(
            f"packed 3x3 {layout} {channels} {side}^2", ours, lambda x=x, w=plain: F.conv2d(x, w, padding=1).relu_()
        )


@torch.no_grad()
def runner_cases(layout: str, side: int = 128, models: Iterable[str] = ()) -> Iterator[Case]:
    """The class map of a whole model; all of them by default."""
    for name in models or names():
        model = create(name, 21, **FULL_SIZE.get(name, {})).eval().to(memory_format=LAYOUTS[layout])
        plain, x = eager_form(model), _map(1, 3, side, side, layout=layout)
        kept: dict[int, Runner] = {}

        def ours(model=model, x=x, kept=kept):
            threads = torch.get_num_threads()
            if threads not in kept:
                kept[threads] = Runner(model, x)
            return kept[threads].predict(x)

        yield Case(f"Runner {layout} {name} {side}^2", ours, lambda p=plain, x=x: p(x).argmax(1))


HEADS = {"argmax": argmax_cases, "loss": loss_cases, "deconvolution": deconv_cases, "upsampling": upsample_cases}
LAYERS = {
    "separable": separable_cases,
    "atrous": atrous_cases,
    "pooling": pooling_cases,
    "winograd": winograd_cases,
    "runner": runner_cases,
}


# --- timing


@contextlib.contextmanager
def load(processes: int) -> Iterator[None]:
    """So many processes that compute, each ended at the end; they end by themselves if this process dies."""
    running = [subprocess.Popen([sys.executable, "-c", LOAD]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def compare(case: Case, threads: int, seconds: float, busy: bool = False) -> Row:
    """Samples in turn, in an order drawn anew each round, for about so many seconds."""
    clock = time.thread_time if threads == 1 and not busy else time.perf_counter
    functions = {"fastseg": case.fastseg, "eager": case.eager, "other": case.other}
    functions = {name: f for name, f in functions.items() if f is not None}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        samples: dict[str, list[float]] = {name: [] for name in functions}
        for f in functions.values():
            f(), f()
        shuffle, order = random.Random(0).shuffle, list(functions)
        end = time.perf_counter() + seconds
        while len(samples["eager"]) < LEAST_SAMPLES or (
            time.perf_counter() < end and len(samples["eager"]) < MOST_SAMPLES
        ):
            shuffle(order)
            for name in order:
                start = clock()
                functions[name]()
                samples[name].append(clock() - start)
    finally:
        torch.set_num_threads(before)
    middle = {name: statistics.median(values) for name, values in samples.items()}
    return Row(
        case.name,
        threads,
        middle["fastseg"] / middle["eager"],
        min(samples["fastseg"]) / min(samples["eager"]),
        middle["fastseg"] / middle["other"] if "other" in middle else None,
        1e3 * middle["eager"],
    )


def table(rows: list[Row], counts: list[int]) -> str:
    """Markdown: a line a case, columns for each number of threads."""
    head = ["case"]
    for n in counts:
        plural = "threads" if n > 1 else "thread"
        head += [f"{n} {plural}: median", "least", "other layout", "eager ms"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    by_name: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, {})[row.threads] = row
    for name, found in by_name.items():
        cells = [name]
        for n in counts:
            r = found[n]
            mark = "**" if r.median > 1 and r.least > 1 else ""
            cells += [f"{mark}{r.median:.2f}{mark}", f"{r.least:.2f}", "" if r.other is None else f"{r.other:.2f}"]
            cells.append(f"{r.eager_ms:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: list[Row], counts: list[int]) -> str:
    """Markdown: a line an op, with the range of its ratios, and the cases that take longer by medians and by minima."""
    head = ["op", "cases", *(f"{n} thread{'s' * (n > 1)}: least, middle, most" for n in counts), "longer than eager"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(counts) + 1) + " --- |"]
    for op in dict.fromkeys(row.name.split()[0] for row in rows):
        found = [row for row in rows if row.name.split()[0] == op]
        cells = [op, str(len(found) // len(counts))]
        for n in counts:
            ratios = [row.median for row in found if row.threads == n]
            cells.append(f"{min(ratios):.2f}, {statistics.median(ratios):.2f}, {max(ratios):.2f}")
        longer = [row for row in found if min(row.median, row.least) > 1.02]
        cells.append("; ".join(f"{row.name.partition(' ')[2]}, {row.threads}: {row.median:.2f}" for row in longer))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def about(busy: int) -> str:
    """What was compared, and on what machine."""
    cores, waiting = os.cpu_count(), os.getloadavg()[1]
    own = f", {busy} of them started by the tool" if busy else ""
    return (
        f"fastseg / eager, torch {torch.__version__}, {cores} cores, {waiting:.0f} processes that compute, the mean "
        f"of 5 minutes{own}"
    )


def main() -> None:
    """Print a line a case as it is done, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=[*HEADS, *LAYERS], default=[*HEADS, *LAYERS])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--classes", nargs="+", type=int, default=[1, 2, 21, 150])
    parser.add_argument("--sides", nargs="+", type=int, default=[128, 512])
    default = [1, torch.get_num_threads()]
    parser.add_argument("--threads", nargs="+", type=int, default=default, help="1 and the default")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each case and number of threads")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="processes that compute meanwhile")
    parser.add_argument("-o", "--output", type=Path, help="write the table here too, as markdown")
    args = parser.parse_args()
    torch.manual_seed(0)
    counts, rows = sorted(set(args.threads)), []
    with load(args.busy):
        for op in args.ops:
            for layout in args.layouts:
                several = op in HEADS
                cases = (
                    (case for classes in args.classes for case in HEADS[op](layout, classes, args.sides))
                    if several
                    else LAYERS[op](layout)
                )
                for case in cases:
                    with torch.set_grad_enabled(op in ("loss", "upsampling")):
                        rows += (found := [compare(case, n, args.seconds, args.busy > 0) for n in counts])
                    if args.output:  # as far as it is: a long run may be cut off
                        args.output.write_text(
                            f"{about(args.busy)}\n\n{summary(rows, counts)}\n\n{table(rows, counts)}\n"
                        )
                    print(case.name, *(f"{r.median:.2f} ({r.least:.2f})" for r in found), sep="  ", flush=True)
    print(f"\n{about(args.busy)}\n\n{summary(rows, counts)}\n\n{table(rows, counts)}")


if __name__ == "__main__":
    main()
