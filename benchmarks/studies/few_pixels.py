"""1x1 convolutions of few pixels on a CPU: a product of matrices by MKL over oneDNN's packed call.

    python -m benchmarks.studies.few_pixels [--threads 1 2] [--pixels 1 16 64 256 1024 2048 4096]

fp32, channels_last, bias and a ReLU in place, both calls on maps that are in the cache, in random order; the ratios are
of medians. ``fastseg/ops/cpu/matrix.py`` draws its limits from them.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastseg.measure.machine import machine
from fastseg.ops.cpu.matrix import PLAIN, Matrix
from fastseg.ops.cpu.onednn import pack

CHANNELS = ((16, 64), (24, 144), (144, 24), (40, 240), (240, 40), (64, 384), (384, 64), (672, 112), (160, 960),
            (320, 1280), (256, 21), (64, 64), (256, 256), (512, 512))  # fmt: skip
MOST = 7e7  # products of a call


def ratio(C: int, COUT: int, pixels: int) -> float:
    x = torch.randn(1, C, pixels, 1).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(COUT, C, 1, 1), torch.randn(COUT)
    runs: list[Callable[[Tensor], Tensor]] = [Matrix(weight, bias), pack(weight, bias, *PLAIN, x.shape)]
    times: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(max(9, min(40, int(1.5e8 / (C * COUT * pixels + 1e6))))):
        for i in random.sample(range(2), 2):
            runs[i](x).relu_()
            start = time.perf_counter()
            runs[i](x).relu_()
            times[i].append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--pixels", nargs="+", type=int, default=[1, 16, 64, 256, 1024, 2048, 4096])
    args = parser.parse_args()
    print(machine(torch.device("cpu")))
    print(f"| threads | channels | {' | '.join(map(str, args.pixels))} |\n|{' --- |' * (len(args.pixels) + 2)}")
    with torch.no_grad():
        for threads in args.threads:
            torch.set_num_threads(threads)
            for C, COUT in CHANNELS:
                cells = [f"{ratio(C, COUT, n):.2f}" if C * COUT * n <= MOST else "" for n in args.pixels]
                print(f"| {threads} | {C} to {COUT} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
