"""The scripts of examples/ run, on plain CPU, and print what they assert."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastseg.ops.core.dispatch import INTERPRETED

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ALL = """
import runpy, sys
for path in sys.argv[1:]:
    runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.skipif(INTERPRETED, reason="the examples take the CPU path, in a process of their own")
def test_examples():
    """One process for all: importing torch costs more than any of them."""
    assert len(EXAMPLES) >= 5
    command = [sys.executable, "-P", "-c", ALL, *map(str, EXAMPLES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= len(EXAMPLES)
