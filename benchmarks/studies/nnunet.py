"""nnU-Net's export of a prediction beside its own function on the CPU: time, and peak memory.

    python -m benchmarks.studies.nnunet [--size 200 256 256] [--classes 2 16 118] [--threads 2] [--plan isotropic]

The logits are smooth noise, float16 as nnunetv2's predictor hands them over, at half of the output's size along each
axis (anisotropic: 2/5 along the first axis, which nnunetv2 then resamples by itself). Each path runs in its own
process. Memory is the peak of the resident set (Linux, /proc/self/status) above what was resident before the call, of
which the input is part, less the output. On a busy machine the CPU time of all threads is the one to compare. Needs
nnunetv2 2.8.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

PATHS = ("nnunetv2", "fastseg")
PLANS = {"isotropic": ([1.0, 1.0, 1.0], (2.0, 2.0, 2.0)), "anisotropic": ([5.0, 1.0, 1.0], (2.5, 2.0, 2.0))}
SAMPLE = 4096  # voxels of the result that are compared


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every path in its own process and print a table."""
    parser = argparse.ArgumentParser(description="nnU-Net's export, beside its own function.")
    parser.add_argument("--size", type=int, nargs=3, default=(200, 256, 256), help="of the output, in voxels")
    parser.add_argument("--classes", type=int, nargs="+", default=(2, 16, 118))
    parser.add_argument("--plan", nargs="+", choices=PLANS, default=("isotropic",))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", choices=PATHS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        found = measure(options.one, options.classes[0], tuple(options.size), options.plan[0], options.threads)
        print(json.dumps(found))
        return 0
    columns = ("plan, classes", "nnunetv2 s", "fastseg s", "of its time", "of its CPU time", "nnunetv2 MiB",
               "fastseg MiB", "of its memory", "differ")  # fmt: skip
    print("", *columns, "", sep=" | ")
    print("", *("---" for _ in columns), "", sep=" | ")
    for plan in options.plan:
        for classes in options.classes:
            theirs, ours = (_in_a_process(path, classes, plan, options) for path in PATHS)
            differ = float(np.mean(np.asarray(theirs["sample"]) != np.asarray(ours["sample"])))
            of_time, of_cpu, of_memory = (ours[key] / theirs[key] for key in ("s", "cpu", "mib"))
            cells = (f"{plan}, {classes}", f"{theirs['s']:.1f}", f"{ours['s']:.2f}", f"{of_time:.3f}", f"{of_cpu:.3f}",
                     f"{theirs['mib']:.0f}", f"{ours['mib']:.0f}", f"{of_memory:.3f}", f"{differ:.1e}")  # fmt: skip
            print("", *cells, "", sep=" | ", flush=True)
    return 0


def _in_a_process(path: str, classes: int, plan: str, options: argparse.Namespace) -> dict:
    size = map(str, options.size)
    command = [sys.executable, __file__, "--one", path, "--classes", str(classes), "--plan", plan, "--size", *size]
    command += ["--threads", str(options.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(path: str, classes: int, size: tuple[int, int, int], plan: str, threads: int) -> dict:
    """Seconds and MiB of one export, after a small one that loads and plans everything."""
    from nnunetv2.inference.export_prediction import (
        convert_predicted_logits_to_segmentation_with_correct_shape as own,
    )

    from fastseg.integrations.nnunet import convert_logits

    export = {"nnunetv2": own, "fastseg": convert_logits}[path]
    export(*arguments(classes, (16, 24, 24), plan), num_threads_torch=threads)
    given = arguments(classes, size, plan)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _mib("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    result = export(*given, num_threads_torch=threads)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    mib = _mib("VmHWM") - before - result.nbytes / 2**20
    flat = result.reshape(-1)
    return {"s": seconds, "cpu": cpu, "mib": mib, "sample": flat[:: max(1, flat.size // SAMPLE)].tolist()}


def _mib(key: str) -> float:
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) / 1024


def arguments(classes: int, size: tuple[int, int, int], plan: str) -> tuple:
    """What nnunetv2's function takes: smooth logits, and its managers with its default plan."""
    import torch
    from nnunetv2.utilities.label_handling.label_handling import LabelManager
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

    spacing, factors = PLANS[plan]
    low = [max(1, round(n / f)) for n, f in zip(size, factors, strict=True)]
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty(classes, *low, dtype=torch.float16)
    for c in range(classes):
        coarse = torch.randn(1, 1, *[max(2, n // 8) for n in low], generator=generator)
        logits[c] = 4 * torch.nn.functional.interpolate(coarse, low, mode="trilinear")[0, 0]
    configuration = ConfigurationManager({
        "architecture": {}, "spacing": [s * f for s, f in zip(spacing, factors, strict=True)],
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {
            "is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None,
        },
    })  # fmt: skip
    properties = {
        "spacing": spacing, "shape_after_cropping_and_before_resampling": list(size),
        "shape_before_cropping": list(size), "bbox_used_for_cropping": [[0, n] for n in size],
    }  # fmt: skip
    plans = SimpleNamespace(transpose_forward=[0, 1, 2], transpose_backward=[0, 1, 2])
    labels = LabelManager({"background": 0} | {f"label {i}": i for i in range(1, classes)}, None)
    return logits, plans, configuration, labels, properties


if __name__ == "__main__":
    sys.exit(main())
