"""Masks of boxes pasted into images on a CPU, beside torchvision's ``paste_masks_in_image``.

    python -m benchmarks.studies.paste_masks

Medians of process time of calls in turn at each number of threads; theirs is torchvision's where it can be imported,
else its lines. The floor is the result, in MB.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastseg.measure.machine import machine
from fastseg.ops import paste_masks
from fastseg.ops.paste_masks import paste_masks_ref

CASES = ((100, 800, 1333), (20, 800, 1333), (100, 480, 640))  # boxes, height and width of the image


def theirs() -> Callable[[Tensor, Tensor, tuple[int, int]], Tensor]:
    """torchvision's function, or its lines."""
    try:
        from torchvision.models.detection.roi_heads import paste_masks_in_image
    except (ImportError, RuntimeError):  # absent, or built for another torch
        return paste_masks_ref
    return paste_masks_in_image


def inputs(N: int, H: int, W: int) -> tuple[Tensor, Tensor]:
    """Masks of 28 x 28, and boxes of up to half the image."""
    g = torch.Generator().manual_seed(0)
    size = torch.tensor([W, H])
    centre, half = torch.rand(N, 2, generator=g) * size, torch.rand(N, 2, generator=g) * size * 0.25 + 8
    return torch.rand(N, 1, 28, 28, generator=g), torch.cat([centre - half, centre + half], 1).clamp(min=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--samples", type=int, default=7)
    args = parser.parse_args()
    print("| boxes, image | threads | torchvision ms | fastseg ms | ratio | floor MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    other = theirs()
    for N, H, W in CASES:
        masks, boxes = inputs(N, H, W)
        for threads in args.threads:
            torch.set_num_threads(threads)
            seconds: tuple[list[float], list[float]] = ([], [])
            for _ in range(args.samples):
                for run, found in zip((other, paste_masks), seconds, strict=True):
                    start = time.process_time()
                    run(masks, boxes, (H, W))
                    found.append(time.process_time() - start)
            a, b = (1e3 * statistics.median(found) for found in seconds)
            ratio = statistics.median(y / x for x, y in zip(*seconds, strict=True))
            print(
                f"| {N}, {H}x{W} | {threads} | {a:.0f} | {b:.0f} | {ratio:.2f} | {4e-6 * N * H * W:.0f} |", flush=True
            )
    facts = machine(torch.device("cpu"))
    print(f"\n{facts['chip']}; torch {facts['torch']}; {facts['date'][:10]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
