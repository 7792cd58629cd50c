"""Peak resident memory of losses, and of what comes after the logits, on a CPU: beside torch's steps at full size.

    python -m benchmarks.studies.loss_memory
    python -m benchmarks.studies.loss_memory --names ce dice --shape 2 21 512 --stride 8
    python -m benchmarks.studies.loss_memory --names "ce, volume" "dice, volume" --volume 1 16 128

A loss is measured forward and backward, at the small logits. Each number is the peak of a process of its own above what
was resident before the call (Linux, /proc/self/status), after a call on small maps that loads and plans everything.
``loss_cases`` has both sides.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.studies.loss_cases import CASES, Case, call, inputs


def peak(case: Case, which: str, shape: Sequence[int], stride: int) -> float:
    """MiB above what is resident before the call."""
    call(case, which, *inputs(case, 1, shape[1], 4 * stride, stride))
    given = inputs(case, *shape, stride)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _mib("VmRSS")
    call(case, which, *given)
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
