"""Processes of their own: two ranks of a gloo group that run one script, and ``python -m fastseg`` under torchrun."""

import os
import subprocess
import sys
import time
from pathlib import Path

# Gloo's threads may abort an interpreter that shuts down ("terminate called without an active exception").
LEAVE = "\nimport os, sys\nsys.stdout.flush(), sys.stderr.flush()\nos._exit(0)\n"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run_two(script: str, folder: Path) -> None:
    """``script`` gets its rank, the group's store and ``folder`` as arguments; both must end with 0, or all end."""
    command = [sys.executable, "-W", "ignore", "-c", script + LEAVE]
    workers = [
        subprocess.Popen([*command, str(rank), str(folder / "store"), str(folder)], cwd=folder) for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()


def start_fastseg(*arguments: object, cwd: Path, torchrun: bool = False) -> subprocess.Popen:
    """``python -m fastseg`` on the CPU without the interpreter, as a process group of its own; its output is captured.

    Args:
        arguments: of fastseg.
        cwd: where it runs.
        torchrun: in two processes, which torchrun starts.
    """
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *(TORCHRUN if torchrun else ()), "-m", "fastseg", *map(str, arguments)],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until a process has written a file; it must not end before."""
    try:
        for _ in range(12_000):
            if path.exists():
                return
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        raise TimeoutError(f"{path} does not come")
    except BaseException:
        process.kill()
        raise


def end_of(process: subprocess.Popen) -> tuple[int, str, str]:
    """Wait for a process: its status, and what it said on stdout and stderr."""
    try:
        out, errors = process.communicate(timeout=120)
        return process.returncode, out, errors
    finally:
        process.kill()
