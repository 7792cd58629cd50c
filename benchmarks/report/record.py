"""``benchmarks/results/<gpu>.json``: one record per stage of ``gpu.py``, each replaced in one step.

    {"ops": {"status": "ok", "tests": "passed", "machine": {...}, "rows": [...], "left_out": [...], "seconds": 61}, ...}

Only one process writes at a time. Beside it lie what a run leaves besides: ``compilations.jsonl``, the rows of tests.
"""

import hashlib
import importlib.util
import json
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
COMPILATIONS = "compilations.jsonl"  # a line for each kernel that a process of the run took from the cache or compiled
TEST_STAGES = ("gpu-tests", "tests")


def read(path: Path) -> dict[str, dict]:
    """Stage -> record; empty where there is no file.

    Raises:
        ValueError: the file is not such a record; it is not overwritten by guesswork.
    """
    if not path.exists():
        return {}
    try:
        stages = json.loads(path.read_text())
        if not all(isinstance(record, dict) for record in stages.values()):
            raise ValueError("a stage is not an object")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"results: {path} is not readable ({error}); move it away") from error
    return stages


def write(path: Path, stage: str, record: dict) -> None:
    """Replace the record of ``stage``; the file holds the old record or the new one, at any moment."""
    stages = {**read(path), stage: record}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(stages, indent=1) + "\n")
    part.replace(path)


def code_digest() -> str:
    """Names the code that was measured: a hash of the kernels, the package and the tests of the ops."""
    digest = hashlib.sha256()
    for folder in ("kernels", "fastseg", "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def tests_state(stages: dict[str, dict]) -> str:
    """How the tests went on this very code: "passed", "failed", "not run". A time counts beside the first only."""
    code = code_digest()
    records = [stages.get(name, {}) for name in TEST_STAGES]
    states = {one.get("status") if one.get("code") == code else "not run" for one in records}
    return "failed" if "failed" in states else "passed" if states == {"passed"} else "not run"


def append(path: Path, row: dict) -> None:
    """One line at the end of a file that several processes may write."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def note_compilations(path: Path) -> None:
    """From now on this process appends to ``path`` each kernel it takes from Triton's cache or compiles."""
    if importlib.util.find_spec("triton") is None:
        return
    from fastseg.kernels.tools.precompile import note

    note(path)


def compilations(path: Path) -> str:
    """What ``note_compilations`` wrote, in a line."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    missed = [row for row in rows if not row["hit"]]
    seconds = sum(row["seconds"] for row in missed)
    return f"{len(rows) - len(missed)} kernels from the cache, {len(missed)} compiled in {seconds:.0f} s"


class Log:
    """The record of one stage, written to the results file after every row; ``tuned``: the folder of tuned tables."""

    def __init__(self, path: Path, stage: str, seconds: float, machine: dict[str, str], tuned: Path | None = None):
        self.path, self.stage, self.tuned = path, stage, tuned or path.parent / "tuned"
        self.begin = time.monotonic()
        self.deadline = self.begin + seconds
        self.record = {
            "status": "running",
            "tests": tests_state(read(path)),
            "code": code_digest(),
            "machine": machine,
            "rows": [],
            "left_out": [],
        }
        self.errors = 0
        self.save()

    @property
    def left_out(self) -> list[str]:
        return self.record["left_out"]

    def time_left(self) -> float:
        return self.deadline - time.monotonic()

    def row(self, **values: object) -> None:
        """Add one measurement, and print it."""
        self.record["rows"].append(values)
        self.errors += "error" in values
        shown = {
            k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items() if not isinstance(v, list | dict)
        }
        print("  ".join(f"{key}={value}" for key, value in shown.items()), flush=True)
        self.save()

    def save(self) -> None:
        self.record["seconds"] = round(time.monotonic() - self.begin, 1)
        write(self.path, self.stage, self.record)

    def finish(self, status: str = "") -> None:
        """``status``: by default "ok", or how many rows are errors."""
        self.record["status"] = status or (f"{self.errors} errors" if self.errors else "ok")
        self.save()
