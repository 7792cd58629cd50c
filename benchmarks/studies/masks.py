"""Class maps and segments of mask classifiers on a CPU: time and peak resident memory beside transformers' steps.

    python -m benchmarks.studies.masks
    python -m benchmarks.studies.masks --queries 200 --classes 19 --low 160 160 --size 640 640 --threads 1

Each row is one way of one family: "mask2former" (sigmoid at 384 x 384, sums resized), "maskformer" (sigmoid at the
masks' size, sums resized), "article" (masks resized, then sigmoid and sums) and "panoptic" (owner of each pixel and
areas, half of the queries kept). Their steps are those of transformers' processors, written out; the tests of
``fastseg.inference`` compare with the processors themselves. A peak is that of a process of its own, above what was
resident before the call. Times are medians of calls in turn, theirs and ours, in one process.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.inference import post_process_panoptic_segmentation
from fastseg.measure.machine import machine
from fastseg.ops import masks_to_classes

AT = (384, 384)
Size = tuple[int, int]


def _resize(x: Tensor, size: Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _sums(scores: Tensor, masks: Tensor) -> Tensor:
    return torch.einsum("bqc, bqhw -> bchw", scores.softmax(dim=-1)[..., :-1], masks.sigmoid())


def _their_segments(scores: Tensor, masks: Tensor, size: Size) -> Tensor:
    """``compute_segments`` of MaskFormer's processor."""
    best, labels = (t[0] for t in scores.softmax(-1).max(-1))
    kept = labels != scores.shape[-1] - 1
    probabilities = _resize(masks.sigmoid()[:, kept], size)[0]
    probabilities *= best[kept].view(-1, 1, 1)
    owners = probabilities.argmax(0)
    segmentation, segment = torch.zeros(size, dtype=torch.int32), 0
    for k in range(len(probabilities)):
        mine, whole = owners == k, (probabilities[k] >= 0.5).sum()
        if mine.sum() > 0 and whole > 0 and (mine.sum() / whole).item() > 0.8:
            segment += 1
            segmentation[mine] = segment
    return segmentation


class _Outputs(NamedTuple):
    class_queries_logits: Tensor
    masks_queries_logits: Tensor


def _our_segments(scores: Tensor, masks: Tensor, size: Size) -> Tensor:
    found = post_process_panoptic_segmentation(_Outputs(scores, masks), 0.0, target_sizes=[size], family="maskformer")
    return found[0]["segmentation"]


Way = Callable[[Tensor, Tensor, Size], Tensor]
WAYS: dict[str, tuple[Way, Way]] = {  # theirs, ours
    "mask2former": (
        lambda scores, masks, size: _resize(_sums(scores, _resize(masks, AT)), size)[0].argmax(dim=0),
        lambda scores, masks, size: masks_to_classes(scores, masks, size, scores_size=AT, dtype=torch.int64)[0],
    ),
    "maskformer": (
        lambda scores, masks, size: _resize(_sums(scores, masks), size)[0].argmax(dim=0),
        lambda scores, masks, size: masks_to_classes(
            scores, masks, size, scores_size=tuple(masks.shape[2:]), dtype=torch.int64
        )[0],
    ),
    "article": (
        lambda scores, masks, size: _sums(scores, _resize(masks, size))[0].argmax(dim=0),
        lambda scores, masks, size: masks_to_classes(scores, masks, size, dtype=torch.int64)[0],
    ),
    "panoptic": (_their_segments, _our_segments),
}


def inputs(args: argparse.Namespace, way: str) -> tuple[Tensor, Tensor, Size]:
    """One image's scores and masks; smooth masks, as networks give them."""
    g = torch.Generator().manual_seed(0)
    kept = args.queries // 2 if way == "panoptic" else args.queries
    scores = 3 * torch.randn(1, kept, args.classes + 1, generator=g)
    masks = F.interpolate(10 * torch.randn(1, kept, 8, 8, generator=g), tuple(args.low), mode="bicubic")
    return scores, masks, tuple(args.size)


def status(key: str) -> float:
    """MiB of ``VmRSS`` or ``VmHWM``."""
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) / 1024


def peak(run: Way, given: tuple[Tensor, Tensor, Size]) -> float:
    """MiB above what is resident before the call."""
    run(given[0], given[1][:, :, :8, :8].contiguous(), (64, 64))  # what is loaded and planned at the first call
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    run(*given)
    return status("VmHWM") - before


def times(ways: tuple[Way, Way], given: tuple[Tensor, Tensor, Size], samples: int) -> tuple[float, float, float, float]:
    """Seconds of theirs and ours, ours over theirs by medians, and the share of pixels that differ."""
    theirs, ours = ways
    differ = (theirs(*given) != ours(*given)).float().mean().item()
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(samples):
        for run, seconds in zip(ways, found, strict=True):
            start = time.perf_counter()
            run(*given)
            seconds.append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(*found, strict=True))
    return statistics.median(found[0]), statistics.median(found[1]), ratio, differ


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--low", type=int, nargs=2, default=(128, 128), help="height and width of the masks")
    parser.add_argument("--size", type=int, nargs=2, default=(2048, 1024), help="height and width of the image")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 0], help="0: torch's default")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # in the process of one measurement
    args = parser.parse_args()
    if args.one:
        way, which = args.one
        if args.threads[0]:
            torch.set_num_threads(args.threads[0])
        with torch.inference_mode():
            given = inputs(args, way)
            print(*times(WAYS[way], given, args.samples) if which == "times" else [peak(WAYS[way][int(which)], given)])
        return 0
    print(f"Q {args.queries}, K {args.classes}, masks {args.low[0]}x{args.low[1]}, image {args.size[0]}x{args.size[1]}")
    print("| way | threads | theirs s | fastseg s | ratio | theirs peak MiB | fastseg peak MiB | differ |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for way in args.ways:
        for threads in args.threads:
            rest = [*sys.argv[1:], "--threads", str(threads), "--one", way]
            run = lambda which, rest=rest: list(map(float, subprocess.run(
                [sys.executable, __file__, *rest, which], capture_output=True, text=True, check=True
            ).stdout.split()))  # fmt: skip
            (theirs,), (ours,) = run("0"), run("1")
            a, b, ratio, differ = run("times")
            shown = threads or torch.get_num_threads()
            print(f"| {way} | {shown} | {a:.4g} | {b:.4g} | {ratio:.2f} | {theirs:.0f} | {ours:.0f} | {differ:.1e} |",
                  flush=True)  # fmt: skip
    facts = machine(torch.device("cpu"))
    print(f"\n{facts['chip']}; torch {facts['torch']}; {facts['date'][:10]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
