"""Two processes that run one script, as ranks of a gloo group on files in a folder."""

import subprocess
import sys
from pathlib import Path


def run_two(script: str, folder: Path) -> None:
    """``script`` gets its rank, the group's store and ``folder`` as arguments; both must end with 0, or all end."""
    command = [sys.executable, "-W", "ignore", "-c", script]
    workers = [
        subprocess.Popen([*command, str(rank), str(folder / "store"), str(folder)], cwd=folder) for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
