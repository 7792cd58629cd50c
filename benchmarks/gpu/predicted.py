"""Times of the benchmarks' cases by the static model, to stand beside measured ones; no GPU is needed.

    python -m benchmarks.gpu.predicted [--chip H200] [--op separable_conv] [--seconds 600]

``kernels/tools/predict`` has the model. A case's time is the sum over our kernels that it launches, on ``meta``
tensors, with CUDA's decisions; what else it launches (a cast, a library's convolution) is not in it. Cases already in
``predicted/<chip>.json`` are left out; those whose kernels have changed are removed by hand.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.problem import Case
from benchmarks.report import record

FOLDER = record.ROOT / "benchmarks" / "predicted"


def name_of(case: Case) -> str:
    return f"{case.op}, {case.shape}, N={case.N}, {case.mode}"


def read(chip: str, folder: Path = FOLDER) -> dict[str, float]:
    """Case -> predicted microseconds."""
    path = folder / f"{chip.replace(' ', '_')}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def beside(case: Case, chip: str | None, us: float, folder: Path = FOLDER) -> dict[str, float]:
    """What a measured row shows of its prediction: the time, and measured over predicted; empty where there is none."""
    predicted = read(chip, folder).get(name_of(case)) if chip else None
    return {} if predicted is None else {"predicted_us": predicted, "of_predicted": round(us / predicted, 3)}


def of_case(case: Case, chip) -> float:
    """Microseconds of the kernels of ours that the case launches."""
    from benchmarks.gpu import warm_cache
    from fastseg.kernels.tools.predict.model import predict_launches

    def launch() -> None:
        problem = case.build(torch.device("meta"))
        with problem.context(), warm_cache._Launchers():
            problem.function(problem.forms()["fastseg"])()

    with warm_cache._as_on(f"NVIDIA_{chip.name}", case.build.func.autocast):
        return sum(one.us for one in predict_launches(launch, chip))


def main(argv: Sequence[str] | None = None) -> int:
    """Predict cases while there is time; 0."""
    parser = argparse.ArgumentParser(description="Times of the benchmarks' cases by the static model.")
    parser.add_argument("--chip", default="H200")
    parser.add_argument("--op", action="append", help="may be repeated; all without it")
    parser.add_argument("--mode", action="append", help="may be repeated; all without it")
    parser.add_argument("--seconds", type=float, default=600, help="after which no case is begun (default 600)")
    options = parser.parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "0"
    from benchmarks.gpu.ops import cases
    from fastseg.kernels.runtime.ceilings import CHIPS

    deadline, known = time.monotonic() + options.seconds, read(options.chip)
    FOLDER.mkdir(exist_ok=True)
    for case in cases(tiny=False):
        asked = (not options.op or case.op in options.op) and (not options.mode or case.mode in options.mode)
        if name_of(case) in known or not asked:
            continue
        if time.monotonic() > deadline:
            print("no time is left for further cases")
            break
        try:
            known[name_of(case)] = round(of_case(case, CHIPS[options.chip]), 1)
        except Exception as error:  # what a case does besides its kernels may need a device
            print(f"{name_of(case)}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
            continue
        print(f"{name_of(case)}: {known[name_of(case)]} us", flush=True)
        text = json.dumps(dict(sorted(known.items())), indent=1)
        (FOLDER / f"{options.chip.replace(' ', '_')}.json").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
