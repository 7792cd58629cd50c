"""Peak resident memory of losses, and of what comes after the logits, on a CPU: beside torch's steps at full size.

    python -m benchmarks.studies.loss_memory
    python -m benchmarks.studies.loss_memory --names ce dice --shape 2 21 512 --stride 8
    python -m benchmarks.studies.loss_memory --names "ce, volume" "dice, volume" --volume 1 16 128

A loss is measured forward and backward, at the small logits. Each number is the peak of a process of its own above what
was resident before the call (Linux, /proc/self/status), after a call on small maps that loads and plans everything.
Torch's steps are written as people write them: ``interpolate``, then the loss on logits of full size.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg import losses, ops

Steps = Callable[[Tensor, Tensor], object]


class Case(NamedTuple):
    """What is compared: fastseg's call of small logits, torch's of logits of full size."""

    ours: Steps
    theirs: Steps
    each: bool = False  # labels for each class
    trains: bool = True
    volume: bool = False


def _term(*terms: losses.Term) -> Steps:
    return lambda x, y: ops.upsample_loss(x, y, [(1.0, term) for term in terms])


def _overlap(v: Tensor, y: Tensor, alpha: float = 0.5, *, each: bool = False) -> Tensor:
    """Dice (alpha = 1/2) or Jaccard (1) of an image and class."""
    p = v.sigmoid() if each else v.softmax(1)
    y = y if each else F.one_hot(y.long(), v.shape[1]).movedim(-1, 1)
    dims = tuple(range(2, v.dim()))
    inter, both = (p * y).sum(dims), (p + y).sum(dims)
    return (1 - (inter + 1) / (inter + alpha * (both - 2 * inter) + 1)).mean()


def _general(v: Tensor, y: Tensor) -> Tensor:
    p, y = v.softmax(1), F.one_hot(y.long(), v.shape[1]).movedim(-1, 1)
    w = 1 / (y.sum((2, 3)).double() ** 2 + 1e-9)
    return (1 - 2 * (w * (p * y).sum((2, 3))).sum(1) / (w * (p + y).sum((2, 3))).sum(1)).mean()


def _entropies(v: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(v, y.long(), reduction="none")


def _focal(v: Tensor, y: Tensor) -> Tensor:
    loss = _entropies(v, y)
    return ((1 - (-loss).exp()) ** 2 * loss).mean()


def _topk(v: Tensor, y: Tensor) -> Tensor:
    loss = _entropies(v, y).flatten()
    return loss.topk(len(loss) // 10).values.mean()


def _ohem(v: Tensor, y: Tensor) -> Tensor:
    loss = _entropies(v, y).flatten()
    return loss[(loss > 0.3567) | (loss >= loss.detach().topk(1000).values[-1])].mean()


def _binary(v: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(v, y.to(v.dtype))


def _ce(v: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(v, y.long())


def _confusion(v: Tensor, y: Tensor) -> Tensor:
    return torch.bincount((y.long() * v.shape[1] + v.argmax(1)).flatten(), minlength=v.shape[1] ** 2)


def _same(y: Tensor) -> tuple[int, ...]:
    return tuple(y.shape[-3:] if y.dim() == 5 else y.shape[1:])


CASES: dict[str, Case] = {
    "ce": Case(lambda x, y: ops.upsample_cross_entropy(x, y), _ce),
    "ce + dice": Case(_term(losses.CrossEntropy(), losses.Dice()), lambda v, y: _ce(v, y) + _overlap(v, y)),
    "dice": Case(_term(losses.Dice()), _overlap),
    "jaccard": Case(_term(losses.Jaccard()), lambda v, y: _overlap(v, y, 1.0)),
    "tversky, focal": Case(_term(losses.Tversky(0.5, 0.5, 0.75)), lambda v, y: _overlap(v, y) ** 0.75),
    "generalised dice": Case(_term(losses.GeneralizedDice()), _general),
    "focal": Case(_term(losses.Focal()), _focal),
    "topk": Case(_term(losses.TopK(0.1)), _topk),
    "ohem": Case(_term(losses.OHEM(0.7, 1000)), _ohem),
    "bce, each class": Case(_term(losses.BinaryCrossEntropy()), _binary, each=True),
    "dice, each class": Case(
        _term(losses.Dice(activation="sigmoid")), lambda v, y: _overlap(v, y, each=True), each=True
    ),
    "argmax": Case(lambda x, y: ops.upsample_argmax(x, _same(y)), lambda v, y: v.argmax(1), trains=False),
    "confidence": Case(
        lambda x, y: ops.upsample_confidence(x, _same(y)), lambda v, y: v.softmax(1).max(1), trains=False
    ),
    "topk classes": Case(
        lambda x, y: ops.upsample_topk(x, 3, _same(y)), lambda v, y: v.softmax(1).topk(3, 1), trains=False
    ),
    "confusion": Case(lambda x, y: ops.upsample_confusion(x, y, x.shape[1]), _confusion, trains=False),
    "ce, volume": Case(lambda x, y: ops.upsample_cross_entropy(x, y), _ce, volume=True),
    "ce + dice, volume": Case(
        _term(losses.CrossEntropy(), losses.Dice()), lambda v, y: _ce(v, y) + _overlap(v, y), volume=True
    ),
    "topk, volume": Case(_term(losses.TopK(0.1)), _topk, volume=True),
    "argmax, volume": Case(
        lambda x, y: ops.upsample_argmax(x, _same(y)), lambda v, y: v.argmax(1), trains=False, volume=True
    ),
    "confidence, volume": Case(
        lambda x, y: ops.upsample_confidence(x, _same(y)), lambda v, y: v.softmax(1).max(1), trains=False, volume=True
    ),
}


def inputs(case: Case, N: int, C: int, side: int, stride: int) -> tuple[Tensor, Tensor]:
    """Logits and labels of ``side`` pixels an axis."""
    generator, axes = torch.Generator().manual_seed(0), 3 if case.volume else 2
    logits = torch.randn(N, C, *[side // stride] * axes, generator=generator).requires_grad_(case.trains)
    size, most = ((N, C) if case.each else (N,)) + (side,) * axes, 2 if case.each else C
    return logits, torch.randint(most, size, generator=generator, dtype=torch.uint8)


def run(case: Case, which: str, logits: Tensor, target: Tensor) -> None:
    """One call, with its gradient."""
    if which == "fastseg":
        result = case.ours(logits, target)
    else:
        size, mode = (
            tuple(target.shape[-3:] if case.volume else target.shape[-2:]),
            "trilinear" if case.volume else "bilinear",
        )
        result = case.theirs(F.interpolate(logits, size, mode=mode), target)
    if case.trains:
        assert isinstance(result, Tensor)
        result.backward()


def peak(case: Case, which: str, shape: Sequence[int], stride: int) -> float:
    """MiB above what is resident before the call."""
    run(case, which, *inputs(case, 1, shape[1], 4 * stride, stride))
    given = inputs(case, *shape, stride)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _mib("VmRSS")
    run(case, which, *given)
    return _mib("VmHWM") - before


def _mib(key: str) -> float:
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--shape", nargs=3, type=int, default=(2, 150, 512), help="images, classes, side of maps")
    parser.add_argument("--volume", nargs=3, type=int, default=(1, 16, 128), help="the same of volumes")
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # in the process of one measurement
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(args.threads)
        name, which = args.one
        print(peak(CASES[name], which, args.volume if CASES[name].volume else args.shape, args.stride))
        return 0
    print("| loss or head | torch MiB | fastseg MiB | ratio |\n| --- | --- | --- | --- |")
    for name in args.names:
        command = [sys.executable, "-m", "benchmarks.studies.loss_memory", *sys.argv[1:], "--one", name]
        theirs, ours = (
            float(subprocess.run([*command, which], stdout=subprocess.PIPE, text=True, check=True).stdout)
            for which in ("torch", "fastseg")
        )
        print(f"| {name} | {theirs:.0f} | {ours:.0f} | {ours / theirs:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
