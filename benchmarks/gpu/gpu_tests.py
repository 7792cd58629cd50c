"""The stages of tests: pytest in a process of its own, outcomes written down as they come; and the plugin that does it.

As a plugin (``-p benchmarks.gpu.gpu_tests --rows FILE``) this notes outcomes in FILE, a line of JSON each, and beside
it what came out of Triton's cache and what had to be compiled. What is stopped or killed leaves the lines it had.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.report import record

FOLDERS = ("tests/ops", "tests/nn", "tests/models", "tests/optimizing/test_gpu.py")
NOT_HERE = "*/test_graphs*.py"  # torch.compile and export on a CPU, minutes of them: nothing of a GPU is in them
SIDE_BY_SIDE = {
    "gpu": 4,
    "not gpu": 16,
}  # processes: compiling takes most of the time, but maps of 2^31 elements memory
STOP = 20  # seconds for pytest to write its report once it was told to stop


def run(log: record.Log, expression: str, paths: Sequence[str], workers: int, skips_pass: bool = False) -> None:
    """Run the tests that ``expression`` marks, and note in ``log`` how they went.

    Args:
        log: of the stage; its name names the files beside the results.
        expression: of pytest's ``-m``.
        paths: files and folders under the repository's root.
        workers: processes side by side, where pytest-xdist is installed.
        skips_pass: a run in which every test was skipped is good, as one of GPU tests without a GPU.
    """
    rows, report = (log.path.with_name(f"{log.stage}.{kind}") for kind in ("jsonl", "xml"))
    rows.unlink(missing_ok=True)
    command = [
        sys.executable, "-P", "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.gpu_tests",
        f"--rows={rows}", f"--junitxml={report}", "--continue-on-collection-errors", f"--ignore-glob={NOT_HERE}",
        "-m", expression,
    ]  # fmt: skip
    if workers > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(workers, os.cpu_count() or 1))]
    found_at = [str(record.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # the plugin
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(found_at)}
    process = subprocess.Popen([*command, *paths], cwd=record.ROOT, env=environment)
    cut = False
    try:
        process.wait(max(log.time_left() - STOP, 1))
    except subprocess.TimeoutExpired:
        cut = True
        process.send_signal(signal.SIGINT)  # it then writes its report of what ran
        try:
            process.wait(STOP / 2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    counts, failed = outcomes(rows)
    log.row(
        what=f"pytest -m {expression!r} {' '.join(paths)}", **counts, failures=failed, exit_status=process.returncode
    )
    if cut:
        log.left_out.append(f"pytest was stopped: give it more with BUDGET=, STAGE={log.stage}")
    good = process.returncode == 0 and counts["passed"] + skips_pass * counts["skipped"]
    log.finish("failed" if failed else "cut off" if cut else "passed" if good else "failed")


def outcomes(rows: Path) -> tuple[dict[str, int], list[str]]:
    """Counts of passed, failed and skipped tests in a file of rows, and the failures: name, and why in a line."""
    lines = rows.read_text().splitlines() if rows.exists() else []
    found = {}  # an error in a fixture's end comes after the test's own row
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the line in flight when it was killed
            continue
        if found.get(row["test"], {}).get("outcome") != "failed":
            found[row["test"]] = row
    counts = Counter(row["outcome"] for row in found.values())
    failed = [f"{row['test']}: {row['why']}" for row in found.values() if row["outcome"] == "failed"]
    return {kind: counts[kind] for kind in ("passed", "failed", "skipped")}, failed


# The plugin.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, help="file that gets a line for each outcome, as it comes")


def pytest_configure(config: pytest.Config) -> None:
    rows = config.getoption("rows")
    if rows is not None:
        config.pluginmanager.register(_Rows(rows, controller=not hasattr(config, "workerinput")))


class _Rows:
    def __init__(self, rows: Path, controller: bool):
        self.rows, self.controller = rows, controller
        record.note_compilations(rows.with_name(record.COMPILATIONS))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.controller:
            self._note(report.nodeid, "failed", report.duration if hasattr(report, "duration") else 0.0, report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.controller and (report.when == "call" or report.outcome != "passed"):
            self._note(report.nodeid, report.outcome, report.duration, report)

    def _note(self, test: str, outcome: str, seconds: float, report) -> None:
        crash = getattr(report.longrepr, "reprcrash", None)
        why = str(crash.message if crash else report.longrepr or "").strip().splitlines() if outcome == "failed" else []
        row = {"test": test, "outcome": outcome, "seconds": round(seconds, 3), "why": " ".join(why[:1])}
        record.append(self.rows, row)
