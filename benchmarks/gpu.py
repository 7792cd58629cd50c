"""What ``make gpu`` runs: every measurement that needs a GPU, most valuable first, inside a time budget.

    python benchmarks/gpu.py [--budget 540] [--stage ops] [--rehearse]

Each stage runs in a process of its own: a fault on the GPU ends one stage, not the run. Results go into
``benchmarks/results/<gpu>.json`` row by row, tuned configurations into ``kernels/tuned/<gpu>.json``. Needs this package
installed (``pip install --no-deps --no-build-isolation -e .``), torch, Triton and pytest; no network.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import record

# stage -> its share of the budget; what a stage does not use goes to the later ones.
SHARES = {"env": 0.08, "tests": 0.40, "ops": 0.30, "tune": 0.35, "ops-tuned": 0.15, "models": 0.50}
GRACE = 20  # seconds between a stage's own deadline and the end of its process
SHORTEST = 15  # seconds under which no stage is begun: importing torch takes most of that


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; 0 if all went well, 1 if one failed, 2 where there is nothing to run on."""
    parser = argparse.ArgumentParser(description="Measure on the GPU at hand.")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything (default 540)")
    parser.add_argument("--stage", default="", choices=["", *SHARES], help="run this one alone")
    parser.add_argument("--results", type=Path, help="file to write (default benchmarks/results/<gpu>.json)")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on any machine, into a temporary folder")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return worker(options.stage, options.results, options.budget, options.rehearse)
    try:
        path = options.results or (_temporary() if options.rehearse else _default_results())
        record.read(path)
    except (ValueError, RuntimeError) as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    stages = [options.stage] if options.stage else list(SHARES)
    status = drive(stages, path, options.budget, options.rehearse)
    print(f"results in {path}")
    return status


def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="fastseg-rehearsal-")) / "cpu.json"


def _default_results() -> Path:
    """``benchmarks/results/<gpu>.json``.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device here; run this on a machine with one, or try it out with --rehearse")
    from fastseg.kernels.runtime.config import gpu_name

    return record.RESULTS / f"{gpu_name(0)}.json"


def drive(stages: Sequence[str], path: Path, budget: float, rehearse: bool) -> int:
    """Run each stage in its own process and note in the results what became of it."""
    deadline = time.monotonic() + budget
    bad = []
    for stage in stages:
        left = deadline - time.monotonic()
        seconds = left if len(stages) == 1 else min(left, SHARES[stage] * budget)
        if seconds < SHORTEST and not rehearse:
            print(f"-- {stage}: no time left", flush=True)
            bad.append(stage)
            continue
        print(f"-- {stage}: at most {seconds:.0f} s", flush=True)
        status = run_stage(stage, path, seconds, rehearse)
        print(f"-- {stage}: {status}", flush=True)
        if status not in ("ok", "passed"):
            bad.append(stage)
    return 1 if bad else 0


def run_stage(stage: str, path: Path, seconds: float, rehearse: bool) -> str:
    """One stage in a process of its own; -> its status, which the record holds as well."""
    soft = max(seconds - GRACE, SHORTEST / 2)
    command = [sys.executable, __file__, "--worker", "--stage", stage, "--results", str(path), "--budget", str(soft)]
    command += ["--rehearse"] if rehearse else []
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if rehearse and stage == "tune":  # without a GPU, only the interpreter has launches to tune
        environment["TRITON_INTERPRET"] = "1"
    started = time.monotonic()
    try:
        code = subprocess.run(command, env=environment, timeout=seconds, check=False).returncode
        ended = f"crashed with exit status {code}"
    except subprocess.TimeoutExpired:
        ended = "cut off"
    stage_record = record.read(path).get(stage, {})
    if stage_record.get("status", "running") == "running":  # it did not come to say so itself
        stage_record |= {"status": ended, "seconds": round(time.monotonic() - started, 1)}
        record.write(path, stage, stage_record)
    return stage_record["status"]


def worker(stage: str, path: Path, seconds: float, tiny: bool) -> int:
    """The process of one stage."""
    import harness
    import stages

    device = harness.here()
    log = record.Log(path, stage, seconds, harness.machine(device))
    stages.STAGES[stage](log, device, tiny)
    if log.record["status"] == "running":
        log.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
