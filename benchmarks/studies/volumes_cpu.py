"""Ops on volumes on a CPU against torch's steps: losses, class volumes, upsampling, pooling; sides, classes, threads.

    python -m benchmarks.studies.volumes_cpu --seconds 0.3 -o volumes_cpu.md
    python -m benchmarks.studies.volumes_cpu --names ce dice --classes 2 3 --sides 64 --strides 2

One volume. Labels are int64, as torch's cross entropy takes them. Losses are those of ``loss_cases``; timing and table
are those of ``cpu_threads``: fastseg's time over torch's, at one thread and the default; a loss forward and backward.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.studies.cpu_threads import Case
from benchmarks.studies.loss_cases import CASES, call
from benchmarks.studies.loss_cases import Case as Loss
from benchmarks.studies.losses_cpu import take
from fastseg import ops

HEADS = {
    name: CASES[name]._replace(volume=True)
    for name in (
        "ce", "ce, ignored", "ce, weights and smoothing", "dice", "ce + dice", "topk", "focal", "bce, each class",
        "dice, each class", "argmax", "confidence", "topk classes", "confusion",
    )
}  # fmt: skip
UPSAMPLING = ("upsampling", "upsampling and its gradient")
POOLING = ("pooling", "pooling with indices", "unpooling")
MOST = 2**27  # upsampled logits: 512 MB


def _head(name: str, head: Loss, C: int, side: int, stride: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, C, *[max(1, side // stride)] * 3, generator=generator).requires_grad_(head.trains)
    size = ((1, C) if head.each else (1,)) + (side,) * 3
    y = torch.randint(2 if head.each else C, size, generator=generator)
    title = f"{name.replace(' ', '_')} C={C} {side}^3 /{stride}"
    return Case(title, lambda: call(head, "fastseg", [x], y), lambda: call(head, "torch", [x], y))


def _upsampling(name: str, C: int, side: int, stride: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, C, *[max(1, side // stride)] * 3, generator=generator)
    title = f"{name.replace(' ', '_')} C={C} {side}^3 /{stride}"
    ours = lambda x: ops.upsample_trilinear(x, side)
    theirs = lambda x: F.interpolate(x, side, mode="trilinear")
    if name == "upsampling":
        return Case(title, lambda: ours(x), lambda: theirs(x))
    x.requires_grad_()
    seed = torch.randn(1, C, side, side, side, generator=generator)
    step = lambda up: torch.autograd.grad(up(x), x, seed)
    return Case(title, lambda: step(ours), lambda: step(theirs))


def _pooling(name: str, C: int, side: int) -> Case:
    x = torch.randn(1, C, side, side, side, generator=torch.Generator().manual_seed(0))
    title = f"{name.replace(' ', '_')} C={C} {side}^3"
    if name == "pooling":
        return Case(title, lambda: ops.max_pool3d(x, 2), lambda: F.max_pool3d(x, 2))
    indexed = lambda pool, **options: pool(x, 2, return_indices=True, **options)
    if name == "pooling with indices":
        return Case(title, lambda: indexed(ops.max_pool3d), lambda: indexed(F.max_pool3d))
    y, own = indexed(ops.max_pool3d)
    _, indices = indexed(F.max_pool3d)
    return Case(title, lambda: ops.max_unpool3d(y, own, 2), lambda: F.max_unpool3d(y, indices, 2))


def cases(names: list[str], classes: list[int], sides: list[int], strides: list[int]) -> Iterator[Case]:
    """Those of at most ``MOST`` values."""
    for name in names:
        for C in classes:
            for side in sides:
                if C * side**3 > MOST:
                    continue
                if name in POOLING:
                    yield _pooling(name, C, side)
                    continue
                for stride in strides:
                    yield (
                        _upsampling(name, C, side, stride)
                        if name in UPSAMPLING
                        else _head(name, HEADS[name], C, side, stride)
                    )


def main() -> int:
    """Print a line a case as it is done, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*HEADS, *UPSAMPLING, *POOLING]
    parser.add_argument("--names", nargs="+", choices=names, default=names)
    parser.add_argument("--classes", nargs="+", type=int, default=[1, 2, 3, 16, 118])
    parser.add_argument("--sides", nargs="+", type=int, default=[16, 32, 64, 128])
    parser.add_argument("--strides", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, torch.get_num_threads()], help="1, the default")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each case and number of threads")
    parser.add_argument("-o", "--output", type=Path, help="write the table here too, as markdown")
    args = parser.parse_args()
    every = cases(args.names, args.classes, args.sides, args.strides)
    take(every, args.threads, args.seconds, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
