"""The run on a GPU: the stages of `benchmarks.gpu`, results that survive a crash."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import bench_pooling, harness, workloads
from benchmarks import bench_separable_conv as bench
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import gpu_tests, stages
from benchmarks.gpu import ops as op_modules
from benchmarks.problem import Case
from benchmarks.report import record
from fastseg.kernels.runtime import config
from fastseg.ops.core.dispatch import INTERPRETED

CPU = torch.device("cpu")


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--rehearse" in error


def _gpu(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=record.ROOT)


# Tuning: the stage itself, below.
@pytest.mark.parametrize("stage", ["env", "ops", pytest.param("tune", marks=pytest.mark.long)])
def test_rehearsal(stage, tmp_path):
    done = _gpu("--stage", stage, "--results", str(tmp_path), "--budget", "220")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("median_us") == (tmp_path / "run.log").read_text().count("median_us")
    stages = record.read(tmp_path / "cpu.json")
    assert list(stages) == [stage]
    assert stages[stage]["status"] == "ok"
    assert stages[stage]["tests"] == "not run"
    assert stages[stage]["machine"]["torch"] == torch.__version__
    rows = stages[stage]["rows"]
    if stage == "ops":
        assert {(row["op"], row["mode"]) for row in rows} == {
            (module.OP, mode) for module in op_modules.OPS for mode in module.MODES
        }
        for row in rows:
            assert row["median_us"] > 0
            assert row["path"].startswith(("reference", "torch")) == row["provider"].startswith("fastseg")  # on a CPU
        providers = {row["provider"] for row in rows if row["op"] == bench_pooling.OP}
        assert providers == set(bench_pooling.PROVIDERS) - {"compile"}
    elif stage == "tune":
        assert any(row["row"].startswith("separable_conv_fwd_fused[") for row in rows)
        table = json.loads((tmp_path / "tuned" / "cpu.json").read_text())
        assert {row["row"].partition("[")[0] for row in rows if row["best"]} == set(table["configs"])
    else:
        assert {"copy", "eager op, host"} <= {row["what"] for row in rows}


@pytest.mark.skipif(not INTERPRETED, reason="the rehearsal's kernels are interpreted")
def test_the_tuning_stage_writes_a_table(monkeypatch, tmp_path):
    """Of the first candidates: interpreted, each takes most of a second."""
    every = config.candidates_of
    monkeypatch.setattr(config, "candidates_of", lambda *args, **key: every(*args, **key)[:2])
    log = record.Log(tmp_path / "cpu.json", "tune", 220, {})
    stages.STAGES["tune"](log, CPU, tiny=True)
    (row,) = record.read(log.path)["tune"]["rows"]
    assert row["row"].startswith("separable_conv_fwd_fused[") and row["tried"] in (2, 3) and row["best_us"] > 0
    assert log.left_out == [] and log.errors == 0
    table = json.loads((tmp_path / "tuned" / "cpu.json").read_text())
    (sizes,) = table["configs"]["separable_conv_fwd_fused"].values()
    assert [row["best"].items() <= entry.items() for entry in sizes.values()] == [True]


def _run_with(monkeypatch, tmp_path, workers, seconds=100):
    """`drive` with stages that are snippets of Python in place of the real workers."""
    path = tmp_path / "fake.json"
    script = tmp_path / "worker.py"
    head = f"import sys; sys.path.insert(0, {str(record.ROOT)!r})\n"
    head += "from pathlib import Path\nfrom benchmarks.report import record\n"
    body = "stage, path = sys.argv[sys.argv.index('--stage') + 1], Path(sys.argv[sys.argv.index('--record') + 1])\n"
    log = "log = record.Log(path, stage, 100, {})\nlog.row(value=1)\n"
    script.write_text(head + body + log + f"exec({workers!r}[stage])\n")
    monkeypatch.setattr(gpu, "WORKER", [sys.executable, str(script)])
    monkeypatch.setattr(gpu, "SHARES", dict.fromkeys(workers, 1.0))
    return path, gpu.drive(list(workers), path, tmp_path / "tuned", seconds, rehearse=True)


def test_a_stage_that_dies_takes_no_other_with_it(monkeypatch, tmp_path):
    workers = {
        "one": "log.finish()",
        "two": "import os; os.kill(os.getpid(), 11)",
        "three": "log.row(value=2); raise RuntimeError('boom')",
        "four": "log.row(value=2); log.finish()",
    }
    path, status = _run_with(monkeypatch, tmp_path, workers)
    stages = record.read(path)
    assert status == 1
    assert {name: len(stage["rows"]) for name, stage in stages.items()} == {"one": 1, "two": 1, "three": 2, "four": 2}
    assert [stages[name]["status"] for name in workers] == [
        "ok",
        "crashed with exit status -11",
        "crashed with exit status 1",
        "ok",
    ]
    assert [file.name for file in tmp_path.glob("fake*")] == ["fake.json"]
    assert (tmp_path / "run.log").read_text().count("value=1\n") == 4
    assert "RuntimeError: boom" in (tmp_path / "run.log").read_text()


def test_a_stage_that_hangs_is_killed_with_what_it_started_and_keeps_its_rows(tmp_path, monkeypatch):
    child = tmp_path / "child"
    hang = "import subprocess; p = subprocess.Popen(['sleep', '60']); "
    hang += f"Path({str(child)!r}).write_text(str(p.pid)); p.wait()"
    monkeypatch.setattr(gpu, "GRACE", 1)
    path, status = _run_with(monkeypatch, tmp_path, {"ops": hang}, seconds=8)
    assert status == 1
    found = record.read(path)["ops"]
    assert (found["status"], found["rows"]) == ("cut off", [{"value": 1}])
    with pytest.raises(ProcessLookupError):
        _wait_for_the_end_of(int(child.read_text()))


def _wait_for_the_end_of(process: int) -> None:
    for _ in range(50):
        os.kill(process, 0)
        if Path(f"/proc/{process}/stat").read_text().split()[2] == "Z":
            raise ProcessLookupError
        time.sleep(0.05)


def test_a_case_that_raises_is_a_row(tmp_path):
    log = record.Log(tmp_path / "x.json", "ops", 100, {})
    for error in (RuntimeError("PassManager::run failed\nat line 2"), torch.OutOfMemoryError("CUDA out of memory")):
        with harness.isolated(log, CPU, op="a", mode="b"):
            raise error
    log.finish()
    first = {"op": "a", "mode": "b", "error": "RuntimeError: PassManager::run failed"}
    assert record.read(log.path)["ops"]["rows"] == [first, {**first, "error": "OutOfMemoryError: CUDA out of memory"}]
    assert record.read(log.path)["ops"]["status"] == "2 errors"


def test_a_device_that_answers_no_more_ends_the_stage(tmp_path, monkeypatch):
    def gone(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    log = record.Log(tmp_path / "x.json", "ops", 100, {})
    with pytest.raises(RuntimeError, match="illegal"), harness.isolated(log, torch.device("cuda"), op="a"):
        raise ValueError("first")
    assert record.read(log.path)["ops"]["rows"] == [{"op": "a", "error": "ValueError: first"}]


def test_one_provider_that_raises_costs_no_other_its_row(tmp_path, monkeypatch):
    problem = bench.Problem(workloads.tiny(workloads.SEPARABLE[0]), "eval", CPU)

    def broken(x):
        raise RuntimeError("no engine")

    forms = {"fastseg": problem.plain, "eager": problem.plain, "broken": broken}  # no kernel: interpreted, it is slow
    monkeypatch.setattr(problem, "forms", lambda: dict(forms))
    case = Case("op", "shape", 1, "eval", lambda device: problem)
    log = record.Log(tmp_path / "x.json", "ops", 100, {})
    stages._op(log, CPU, case, lambda name: True)
    got = {row["provider"]: row.get("error", "timed") for row in log.record["rows"]}
    assert got == {"fastseg": "timed", "eager": "timed", "broken": "RuntimeError: no engine"}


TESTS = """
import os, pytest
def test_good(): pass
def test_bad(): assert 1 + 1 == 3
@pytest.mark.skip
def test_skipped(): pass
def test_last(): END
"""


@pytest.mark.parametrize("end, rows", [("pass", 4), ("os.kill(os.getpid(), 9)", 3)])
def test_outcomes_are_written_as_they_come(end, rows, tmp_path):
    """What was killed keeps the rows it had."""
    (tmp_path / "test_x.py").write_text(TESTS.replace("END", end))
    log = record.Log(tmp_path / "results" / "x.json", "tests", 200, {})
    gpu_tests.run(log, "not gpu", [str(tmp_path / "test_x.py")], workers=1)
    (row,) = log.record["rows"]
    assert (row["passed"], row["failed"], row["skipped"]) == (rows - 2, 1, 1)
    assert [line.partition("::")[2] for line in row["failures"]] == ["test_bad: assert (1 + 1) == 3"]
    assert log.record["status"] == "failed"
    assert len((tmp_path / "results" / "tests.jsonl").read_text().splitlines()) == rows
    report = tmp_path / "results" / "tests.xml"
    assert report.exists() == (rows == 4)


def test_tests_past_their_time_are_told_to_stop(tmp_path, monkeypatch):
    told = []

    class Slow:
        returncode = 2
        send_signal = lambda self, number: told.append(number)

        def wait(self, seconds):
            if not told:
                raise subprocess.TimeoutExpired("pytest", seconds)

    monkeypatch.setattr(gpu_tests.subprocess, "Popen", lambda *args, **options: Slow())
    log = record.Log(tmp_path / "x.json", "tests", 5, {})
    gpu_tests.run(log, "not gpu", [], workers=1)
    assert told == [gpu_tests.signal.SIGINT]
    assert log.record["status"] == "cut off"
    assert log.left_out == ["pytest was stopped: give it more with BUDGET=, STAGE=tests"]


def test_inputs_are_drawn_in_their_dtype_and_only_where_they_are_used(monkeypatch):
    """What a map of 1e9 elements costs: no draw in another dtype, no copy, no gradient for a forward."""
    drawn = []

    class Draws(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func._schema.name in ("aten::normal_", "aten::randn", "aten::rand", "aten::uniform_", "aten::randint"):
                drawn.append(out)
            return out

    monkeypatch.setattr(harness, "dtype_for", lambda device: torch.bfloat16)
    for module in op_modules.OPS:
        for case in {case.mode: case for case in reversed(module.cases("tiny"))}.values():
            drawn.clear()
            with Draws():
                problem = case.build(CPU)
            maps = [t for t in drawn if t.dim() == 4 and t.dtype.is_floating_point and t.shape[0] == problem.shape.N]
            assert all(t.dtype == torch.bfloat16 for t in maps), (case.op, case.mode)
            assert len({t.data_ptr() for t in maps}) == len(maps) <= 2, (case.op, case.mode)
            assert problem._dy is None, (case.op, case.mode)


def test_the_budget_ends_the_run(monkeypatch, tmp_path):
    begun = []
    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(
        gpu, "run_stage", lambda stage, path, tuned, seconds, rehearse: begun.append((stage, seconds)) or "ok"
    )
    assert gpu.drive(["gpu-tests", "tests", "ops", "tune"], tmp_path / "x.json", tmp_path, 200, False) == 1
    assert begun == [("gpu-tests", 40.0), ("tests", 60.0), ("ops", 20)]


def test_red_tests_follow_the_times(tmp_path):
    path = tmp_path / "x.json"
    record.write(path, "gpu-tests", {"status": "passed", "code": record.code_digest()})
    for status in ("failed", "passed"):
        record.write(path, "tests", {"status": status, "code": record.code_digest()})
        assert record.Log(path, "ops", 1, {}).record["tests"] == status
    for name in record.TEST_STAGES:
        for change in ({"code": "of another day"}, {"status": "cut off"}):
            green = {"status": "passed", "code": record.code_digest()}
            record.write(path, name, green | change)
            assert record.Log(path, "ops", 1, {}).record["tests"] == "not run"
            record.write(path, name, green)
    record.write(path, "gpu-tests", {"status": "failed", "code": record.code_digest()})
    assert record.Log(path, "ops", 1, {}).record["tests"] == "failed"


def test_a_broken_results_file_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "cpu.json"
    path.write_text('{"ops": ')
    assert gpu.main(["--rehearse", "--stage", "env", "--results", str(tmp_path)]) == 2
    assert "move it away" in capsys.readouterr().err
    assert path.read_text() == '{"ops": '
