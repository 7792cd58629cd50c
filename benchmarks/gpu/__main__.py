"""What ``make gpu`` runs: everything that needs a GPU, correctness first, inside a time budget.

    python -m benchmarks.gpu [--budget 540] [--stage ops] [--results DIR] [--rehearse]

Each stage runs in a process of its own: a fault on the GPU ends one stage, not the run. Every file is written as it
comes, row by row: into DIR, or without ``--results`` into ``benchmarks/results``, and tuned configurations into
``kernels/tuned``. Needs this package installed (``pip install --no-deps --no-build-isolation -e .``), torch, Triton and
pytest; no network.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu import warm_cache
from benchmarks.report import record

# stage -> its share of the budget; what a stage does not use goes to the later ones.
SHARES = {
    "compile": 0.15, "gpu-tests": 0.20, "env": 0.06, "forms": 0.08, "tests": 0.30, "ops": 0.25, "tune": 0.25,
    "ops-tuned": 0.15, "models": 0.40, "ops-compiled": 0.50,
}  # fmt: skip
GRACE = 20  # seconds between a stage's own deadline and the end of its process
SHORTEST = 15  # seconds under which no stage is begun: importing torch takes most of that
WORKER = (sys.executable, "-m", "benchmarks.gpu")  # the process of a stage


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; 0 if all went well, 1 if one failed, 2 where there is nothing to run on."""
    parser = argparse.ArgumentParser(description="Measure on the GPU at hand.")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything (default 540)")
    parser.add_argument("--stage", default="", choices=["", *SHARES], help="run this one alone")
    parser.add_argument("--results", metavar="DIR", help="folder for every file of the run, tuned tables as well")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on any machine, into a temporary folder")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tuned", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return worker(options.stage, options.record, options.tuned, options.budget, options.rehearse)
    try:
        path, tuned = places(Path(options.results) if options.results else None, options.rehearse)
        record.read(path)
    except (ValueError, RuntimeError) as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    stages = [options.stage] if options.stage else list(SHARES)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(record.COMPILATIONS).unlink(missing_ok=True)
    if warm_cache.CACHE.is_dir() and not options.rehearse:
        os.environ["TRITON_CACHE_DIR"] = str(warm_cache.CACHE)
        print(f"{warm_cache.adopt(warm_cache.CACHE)} kernels in {warm_cache.CACHE}")
    status = drive(stages, path, tuned, options.budget, options.rehearse)
    print(f"results in {path}")
    return status


def places(folder: Path | None, rehearse: bool) -> tuple[Path, Path]:
    """The file of results and the folder of tuned tables.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    import torch

    if rehearse:
        folder = folder or Path(tempfile.mkdtemp(prefix="fastseg-rehearsal-"))
        return folder / "cpu.json", folder / "tuned"
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device here; run this on a machine with one, or try it out with --rehearse")
    from fastseg.kernels.runtime import config

    name = f"{config.gpu_name(0)}.json"
    return (record.RESULTS / name, config.SHIPPED) if folder is None else (folder / name, folder / "tuned")


def drive(stages: Sequence[str], path: Path, tuned: Path, budget: float, rehearse: bool) -> int:
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
        status = run_stage(stage, path, tuned, seconds, rehearse)
        print(f"-- {stage}: {status}; so far {record.compilations(path.with_name(record.COMPILATIONS))}", flush=True)
        if status not in ("ok", "passed"):
            bad.append(stage)
    return 1 if bad else 0


def run_stage(stage: str, path: Path, tuned: Path, seconds: float, rehearse: bool) -> str:
    """One stage in a process of its own; -> its status, which the record holds as well."""
    soft = max(seconds - GRACE, SHORTEST / 2)
    command = [*WORKER, "--worker", "--stage", stage, "--budget", str(soft)]
    command += ["--record", str(path), "--tuned", str(tuned)] + (["--rehearse"] if rehearse else [])
    # without a GPU, only the interpreter has launches to tune
    interpreted = "1" if rehearse and stage in ("tune", "forms") else "0"
    environment = {**os.environ, "TRITON_INTERPRET": interpreted}
    started = time.monotonic()
    ended = _logged(command, environment, path.with_name("run.log"), seconds)
    stage_record = record.read(path).get(stage, {})
    if stage_record.get("status", "running") == "running":  # it did not come to say so itself
        stage_record |= {"status": ended, "seconds": round(time.monotonic() - started, 1)}
        record.write(path, stage, stage_record)
    return stage_record["status"]


def _logged(command: Sequence[str], environment: dict[str, str], log: Path, seconds: float) -> str:
    """Run a command, its output shown and appended to ``log`` as it comes; -> how it ended.

    What it started ends with it: tests and compilers would go on using the GPU and the cores of the next stage.
    """
    process = subprocess.Popen(
        command, cwd=record.ROOT, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def copy() -> None:
        with log.open("a") as file:
            for line in process.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
                file.write(line)
                file.flush()

    copying = threading.Thread(target=copy, daemon=True)
    copying.start()
    try:
        ended = f"crashed with exit status {process.wait(seconds)}"
    except subprocess.TimeoutExpired:
        ended = "cut off"
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    copying.join(5)
    return ended


def worker(stage: str, path: Path, tuned: Path, seconds: float, tiny: bool) -> int:
    """The process of one stage."""
    from benchmarks import harness
    from benchmarks.gpu import stages

    device = harness.here()
    record.note_compilations(path.with_name(record.COMPILATIONS))
    log = record.Log(path, stage, seconds, harness.machine(device), tuned)
    stages.STAGES[stage](log, device, tiny)
    if log.record["status"] == "running":
        log.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
