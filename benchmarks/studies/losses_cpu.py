"""Every loss, and what comes after the logits, on a CPU against torch's steps: classes, strides, threads.

    python -m benchmarks.studies.losses_cpu --seconds 0.3 -o losses_cpu.md
    python -m benchmarks.studies.losses_cpu --names focal "ce + dice" --classes 3 4 5 --sides 128

Cases are those of ``loss_cases``, timing and table those of ``cpu_threads``: fastseg's time over torch's, at one thread
and the default; a loss forward and backward.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from benchmarks.studies.cpu_threads import Case, Row, about, compare, summary, table
from benchmarks.studies.loss_cases import CASES, call, inputs

STRIDES = (4, 8, 16, 32)


def cases(names: list[str], classes: list[int], sides: list[int], strides: list[int], images: int) -> Iterator[Case]:
    """Those that there are: a threshold has one channel, a margin two classes or more."""
    for name in names:
        case = CASES[name]
        if case.volume:
            continue
        for C in classes:
            if (C > 1 and case.one) or (C == 1 and case.several):
                continue
            for side in sides:
                for stride in strides:
                    given = inputs(case, images, C, side, stride)
                    yield Case(
                        f"{name.replace(' ', '_')} C={C} {side}^2 /{stride}",
                        lambda case=case, given=given: call(case, "fastseg", *given),
                        lambda case=case, given=given: call(case, "torch", *given),
                    )


def take(cases: Iterable[Case], threads: list[int], seconds: float, output: Path | None) -> None:
    """Time the cases, a line each as it is done, then the table; into ``output`` as far as it is, after each."""
    counts, rows = sorted(set(threads)), list[Row]()
    for case in cases:
        rows += (found := [compare(case, n, seconds) for n in counts])
        each = (f"{r.median:.2f} ({r.least:.2f}) of {r.eager_ms:.2f} ms" for r in found)
        print(case.name, *each, sep="  ", flush=True)
        if output:
            output.write_text(f"{about(0)}\n\n{summary(rows, counts)}\n\n{table(rows, counts)}\n")
    print(f"\n{about(0)}\n\n{summary(rows, counts)}")


def main() -> int:
    """Print a line a case as it is done, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--classes", nargs="+", type=int, default=[1, 2, 21, 150])
    parser.add_argument("--sides", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--strides", nargs="+", type=int, default=list(STRIDES))
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, torch.get_num_threads()], help="1, the default")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each case and number of threads")
    parser.add_argument("-o", "--output", type=Path, help="write the table here too, as markdown")
    args = parser.parse_args()
    every = cases(args.names, args.classes, args.sides, args.strides, args.images)
    take(every, args.threads, args.seconds, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
