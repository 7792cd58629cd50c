"""``benchmarks/results/<gpu>.json``: one record per stage of ``gpu.py``, each replaced in one step.

    {"ops": {"status": "ok", "tests": "passed", "machine": {...}, "rows": [...], "left_out": [...], "seconds": 61}, ...}

Only one process writes at a time.
"""

import hashlib
import json
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


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
    """How the GPU tests went on this very code: "passed", "failed", "not run". A time counts beside the first only."""
    tests = stages.get("tests", {})
    if tests.get("code") != code_digest() or tests.get("status") not in ("passed", "failed"):
        return "not run"
    return tests["status"]


class Log:
    """The record of one stage, written to the results file after every row."""

    def __init__(self, path: Path, stage: str, seconds: float, machine: dict[str, str]):
        self.path, self.stage = path, stage
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
        self.save()

    @property
    def left_out(self) -> list[str]:
        return self.record["left_out"]

    def time_left(self) -> float:
        return self.deadline - time.monotonic()

    def row(self, **values: object) -> None:
        """Add one measurement, and print it."""
        self.record["rows"].append(values)
        shown = {
            k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items() if not isinstance(v, list | dict)
        }
        print("  ".join(f"{key}={value}" for key, value in shown.items()), flush=True)
        self.save()

    def save(self) -> None:
        self.record["seconds"] = round(time.monotonic() - self.begin, 1)
        write(self.path, self.stage, self.record)

    def finish(self, status: str = "ok") -> None:
        self.record["status"] = status
        self.save()
