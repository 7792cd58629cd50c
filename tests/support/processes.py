"""Processes of their own: two ranks of a gloo group that run one script, and ``python -m fastseg`` under torchrun."""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

# Reads scripts, imports what they import, and forks two processes that run them: torch is imported once for all tests.
# No script runs here, so no thread is there to be lost by a fork. The two end without Python's shutdown, which gloo's
# threads may abort ("terminate called without an active exception"), and keep what a script has made until then: a
# group that dies with Python's lock held may wait for ever for a thread of its own that asks for it.
FORKS = """
import ast, json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    script, folder = json.loads(line)
    heads = [node for node in ast.parse(script).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    exec(compile(ast.Module(heads, []), "imports", "exec"), {})
    workers = []
    for rank in range(2):
        workers.append(os.fork())
        if workers[-1] == 0:
            status = 1
            try:
                os.chdir(folder)
                sys.argv = ["-c", str(rank), folder + "/store", folder]
                scope = {"__name__": "__main__"}
                exec(compile(script, f"rank {rank}", "exec"), scope)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    print([os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers], file=answers, flush=True)
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


_forks: list[subprocess.Popen] = []  # the one that runs


def run_two(script: str, folder: Path) -> None:
    """``script`` gets its rank, the group's store and ``folder`` as arguments; both must end with 0, or all end."""
    if not _forks:
        command = [sys.executable, "-P", "-W", "ignore", "-c", FORKS]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        _forks.append(subprocess.Popen(command, text=True, start_new_session=True, **pipes))
        atexit.register(_end_forks)
    (forks,) = _forks
    try:
        print(json.dumps([script, str(folder)]), file=forks.stdin, flush=True)
        ready, _, _ = select.select([forks.stdout], [], [], 300)
        assert ready, "two processes took more than five minutes"
        statuses = forks.stdout.readline()
    except BaseException:
        _end_forks()
        raise
    assert statuses == "[0, 0]\n", f"the two ended with {statuses}"


def _end_forks() -> None:
    while _forks:
        forks = _forks.pop()
        os.killpg(forks.pid, signal.SIGKILL)
        forks.wait()
        forks.stdin.close(), forks.stdout.close()


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
