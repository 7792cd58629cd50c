"""The benchmark harness itself: timing, the stages of gpu.py, results that survive a crash, tables and plots."""

import json
import re
import subprocess
import sys

import bench_pooling
import bench_separable_conv as bench
import gpu
import harness
import plot
import pytest
import record
import stages as op_modules
import tables
import torch
import workloads

from fastseg.kernels.runtime.launch import intercept, run

CPU = torch.device("cpu")


# The fixture and the timing behind it.


def _conftest():
    """benchmarks/conftest.py as a module; pytest has imported tests/conftest.py only."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("benchmarks_conftest", record.ROOT / "benchmarks" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_times_taken_elsewhere_become_the_plugins_statistics(benchmark):
    """Pins pytest-benchmark's private API: `_make_stats`, `update`, `_mode`."""
    if benchmark.disabled:
        pytest.skip("statistics are off")
    _conftest().feed(benchmark, [3e-6, 1e-6, 2e-6])
    assert list(benchmark.stats.stats.data) == [3e-6, 1e-6, 2e-6]
    assert benchmark.stats.stats.median == pytest.approx(2e-6)
    assert benchmark.stats.as_dict()["stats"]["median"] == pytest.approx(2e-6)


def test_a_short_call_is_timed_as_a_graph(monkeypatch):
    calls = []

    def fake_bench(fn, milliseconds):
        calls.append(fn)
        return {"long": [2e-4], "short": [5e-5], "replay": [2e-5], "stuck": [5e-5]}[fn]

    def fake_capture(fn):
        if fn == "stuck":
            raise RuntimeError("operation not permitted when stream is capturing")
        return "replay"

    monkeypatch.setattr(harness, "do_bench", fake_bench)
    monkeypatch.setattr(harness, "captured", fake_capture)
    assert harness.device_times("long") == ([2e-4], "events")
    assert harness.device_times("short") == ([2e-5], "graph")
    assert harness.device_times("short", graph=False) == ([5e-5], "events")
    assert harness.device_times("stuck") == ([5e-5], "events")
    assert calls == ["long", "short", "replay", "short", "stuck"]


def test_summary():
    row = harness.summary(harness.Timing([4e-6, 1e-6, 2e-6, 3e-6, 5e-6], "events"), bytes_moved=6e3, floor_s=1.5e-6)
    assert row["median_us"] == pytest.approx(3)
    assert (row["p20_us"], row["p80_us"]) == (pytest.approx(1.8), pytest.approx(4.2))
    assert row["gb_per_s"] == pytest.approx(2)
    assert row["roofline"] == pytest.approx(0.5)
    assert "roofline" not in harness.summary(harness.Timing([1.0], "wall"))


def test_a_provider_that_computes_something_else_is_named():
    exact = torch.randn(1000)
    rough = exact.bfloat16()
    results = {"eager": rough, "fastseg": rough.clone(), "compile": rough * 1.05}
    assert harness.disagreement({k: results[k] for k in ("eager", "fastseg")}, exact, torch.bfloat16) == ""
    assert harness.disagreement(results, exact, torch.bfloat16).startswith("compile is 5.")
    results["compile"] = torch.full_like(rough, torch.nan)
    assert "compile is inf" in harness.disagreement(results, exact, torch.bfloat16)
    assert "eager is inf" in harness.disagreement({"eager": results["compile"]}, exact, torch.bfloat16)


# What is measured.


@pytest.mark.parametrize("mode", bench.MODES)
def test_the_exact_result_is_fp32_whatever_autocast_says(mode):
    problem = bench.Problem(workloads.tiny(workloads.SEPARABLE[0]), mode, CPU)
    want = problem.exact()
    with torch.autocast("cpu", torch.bfloat16):
        got = problem.exact()
        rounded = harness.floats(problem.function(problem.plain)())
    assert [t.dtype for t in got] == [torch.float32] * len(got)
    assert harness.distance(got, want) < 1e-6
    assert harness.distance(rounded, want) > 1e-4


def test_a_backward_holds_no_forward():
    problem = bench.Problem(workloads.tiny(workloads.SEPARABLE[0]), "train-backward", CPU)
    calls = []
    problem.plain.register_forward_hook(lambda *args: calls.append(1))
    backward = problem.function(problem.plain)
    first, second = backward(), backward()
    assert len(calls) == 1
    assert len(first) == 1 + len(list(problem.plain.parameters()))
    assert harness.distance(first, second) == 0


def test_forced_forms_launch_what_they_name(device):

    problem = bench.Problem(workloads.tiny(workloads.SEPARABLE[0]), "eval", torch.device(device))
    launched = {}
    for form in ("fused", "split"):
        names = launched[form] = []

        def note(*launch, names=names):
            names.append(launch[0].fn.__name__)
            run(*launch)

        with problem.context(), bench.forced(form), intercept(note):
            problem.function(problem.fused)()
    assert launched["fused"] == ["_separable_conv_fwd_fused_kernel"]
    assert launched["split"] == ["_separable_conv_fwd_dw_kernel", "_separable_conv_fwd_pw_kernel"]


def test_least_traffic():
    shape = workloads.SeparableShape("s", C=4, COUT=8, H=6, W=6, N=2, stride=2)
    elements = {mode: bench.Problem(shape, mode, CPU).bytes_moved / 4 for mode in bench.MODES}
    A, Y, W = 2 * 4 * 36, 2 * 8 * 9, 4 * 9 + 4 * 8
    assert elements == {"eval": A + Y + W, "train-forward": A + 2 * Y + W, "train-backward": 2 * (A + Y + W)}


def test_what_pooling_moves_and_keeps():
    """Odd sides: windows that end outside count."""
    shape = workloads.PoolShape("p", C=8, H=5, W=6, N=2)
    lo, hi = 2 * 8 * 3 * 3, 2 * 8 * 5 * 6
    assert bench_pooling.sizes(shape) == (lo, hi)
    moved = {mode: bench_pooling.Problem(shape, mode, CPU).bytes_moved for mode in ("pool", "stage-train")}
    assert moved == {"pool": 4 * (hi + lo) + lo / 4, "stage-train": 4 * (2 * hi + lo) + lo / 4}
    notes = bench_pooling.Problem(shape, "pool", CPU).notes("eager")
    assert notes == {"index_bytes": 8 * lo, "kept_bytes": 4 * hi + 8 * lo}


def test_every_case_has_a_name_of_its_own():
    for module in op_modules.OPS:
        names = [(case.shape, case.mode) for case in module.cases("full")]
        assert len(set(names)) == len(names), module.OP
        assert [case.mode for case in module.cases("tiny")] == [mode for _, mode in names]


# gpu.py.


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--rehearse" in error


def _gpu(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(record.ROOT / "benchmarks" / "gpu.py"), "--rehearse", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("stage", ["env", "ops", "tune"])
def test_rehearsal(stage, tmp_path):
    path = tmp_path / "cpu.json"
    done = _gpu("--stage", stage, "--results", str(path), "--budget", "220")
    assert done.returncode == 0, done.stdout + done.stderr
    stages = record.read(path)
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
            assert row["path"].startswith("reference") == row["provider"].startswith("fastseg")
        providers = {row["provider"] for row in rows if row["op"] == bench_pooling.OP}
        assert providers == set(bench_pooling.PROVIDERS) - {"compile"}
    elif stage == "tune":
        assert any(row["row"].startswith("separable_conv_fwd_fused[") for row in rows)
        table = json.loads((tmp_path / "tuned" / "cpu.json").read_text())
        assert {row["row"].partition("[")[0] for row in rows if row["best"]} == set(table["configs"])
    else:
        assert {"copy", "eager op, host"} <= {row["what"] for row in rows}


def _run_with(monkeypatch, tmp_path, workers):
    """`drive` with stages that are snippets of Python in place of the real workers."""
    path = tmp_path / "fake.json"
    script = tmp_path / "worker.py"
    head = f"import sys; sys.path.insert(0, {str(record.ROOT / 'benchmarks')!r})\n"
    head += "from pathlib import Path\nimport record\n"
    body = "stage, path = sys.argv[sys.argv.index('--stage') + 1], Path(sys.argv[sys.argv.index('--results') + 1])\n"
    log = "log = record.Log(path, stage, 100, {})\nlog.row(value=1)\n"
    script.write_text(head + body + log + f"exec({workers!r}[stage])\n")
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "SHARES", dict.fromkeys(workers, 1.0))
    return path, gpu.drive(list(workers), path, 100, rehearse=False)


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


def test_a_stage_that_hangs_is_cut_off_and_keeps_its_rows(tmp_path, monkeypatch):
    def hang(command, env, timeout, check):
        path, stage = (command[command.index(option) + 1] for option in ("--results", "--stage"))
        record.write(record.Path(path), stage, {"status": "running", "rows": [{"value": 1}]})
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu.subprocess, "run", hang)
    path = tmp_path / "fake.json"
    assert gpu.run_stage("ops", path, 60, rehearse=False) == "cut off"
    assert record.read(path)["ops"] | {"seconds": 0} == {"status": "cut off", "rows": [{"value": 1}], "seconds": 0}


def test_the_budget_ends_the_run(monkeypatch, tmp_path):
    begun = []
    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(gpu, "run_stage", lambda stage, path, seconds, rehearse: begun.append((stage, seconds)) or "ok")
    assert gpu.drive(["env", "tests", "ops", "tune"], tmp_path / "x.json", 200, rehearse=False) == 1
    assert begun == [("env", 0.08 * 200), ("tests", 80.0), ("ops", 20)]


def test_red_tests_follow_the_times(tmp_path):
    path = tmp_path / "x.json"
    for status in ("failed", "passed"):
        record.write(path, "tests", {"status": status, "code": record.code_digest()})
        assert record.Log(path, "ops", 1, {}).record["tests"] == status
    record.write(path, "tests", {"status": "passed", "code": "of another day"})
    assert record.Log(path, "ops", 1, {}).record["tests"] == "not run"
    record.write(path, "tests", {"status": "cut off", "code": record.code_digest()})
    assert record.Log(path, "ops", 1, {}).record["tests"] == "not run"


def test_a_broken_results_file_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text('{"ops": ')
    assert gpu.main(["--rehearse", "--stage", "env", "--results", str(path)]) == 2
    assert "move it away" in capsys.readouterr().err
    assert path.read_text() == '{"ops": '


# Tables and plots.


def _stages(tests: str = "passed") -> dict:
    row = {"op": "separable_conv", "shape": "decoder", "mode": "eval", "median_us": 100.0}
    ops = [row | {"provider": "fastseg"}, row | {"provider": "eager", "median_us": 600.0}]
    ops += [row | {"provider": "compile", "wrong": "compile is 5.0 from fp32"}]
    return {
        "ops": {"tests": tests, "rows": ops},
        "ops-tuned": {"tests": tests, "rows": [row | {"provider": "fastseg", "median_us": 80.0}]},
    }


def _cells(text: str, shape: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {shape} ")]
    return [cell.strip() for cell in line.strip("|").split("|")][2:]


def test_a_table_shows_what_was_measured():
    text = tables.separable_eval("NVIDIA_H200", _stages())
    assert _cells(text, "decoder") == ["600", "-", "80.0", "7.50x", "", "85%"]
    assert "xception_middle" not in text
    floors = tables.separable_eval("", {})
    assert "xception_middle" in floors
    assert "vs eager" not in floors


@pytest.mark.parametrize("tests", ["failed", "not run"])
def test_a_time_on_red_tests_is_no_time(tests):
    assert tables.separable_eval("NVIDIA_H200", _stages(tests)) == ""


def test_a_training_step_is_forward_and_backward():
    times = {("s", "train-forward", "eager"): 1.0, ("s", "train-backward", "eager"): 2.0}
    assert tables.step_time(times, "s", "eager") == 3.0
    assert tables.step_time({("s", "train-forward", "eager"): 1.0}, "s", "eager") is None


def test_figures_fill_the_pages(tmp_path, capsys):
    first, second = "<!-- table:separable-eval -->\nold\n<!-- end -->", "<!-- table:models -->\n<!-- end -->"
    floors, measured = tmp_path / "roofline.md", tmp_path / "results.md"
    for page in (floors, measured):
        page.write_text(f"# Title\n{first}\nbetween\n{second}\nlast\n")
    arguments = ["--docs", str(tmp_path), "--results", str(tmp_path)]
    assert plot.main(arguments) == 0
    once = floors.read_text()
    assert once.startswith("# Title\n<!-- table:separable-eval -->\n| shape |")
    assert "old" not in once
    assert "\n<!-- end -->\nbetween\n" in once
    assert once.endswith("<!-- end -->\nlast\n")
    empty = f"# Title\n{first}\nbetween\n{second}\nlast\n".replace("old\n", "")
    assert measured.read_text() == empty
    assert plot.main(arguments) == 0
    assert floors.read_text() == once
    assert not (tmp_path / "figures").exists()

    record.write(tmp_path / "NVIDIA_H200.json", "ops", _stages()["ops"])
    assert plot.main(arguments) == 0
    assert floors.read_text() == once
    text = measured.read_text()
    assert "**NVIDIA H200**" in text
    assert _cells(text, "decoder")[0] == "600"
    assert "xception_middle" not in text
    (link,) = re.findall(r"\n\n!\[.*\]\((.*)\)\n<!-- end -->\nbetween", text)
    assert text.count("![") == 1  # no model was measured
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["separable-eval-NVIDIA_H200.png"]
    assert (tmp_path / link).read_bytes().startswith(b"\x89PNG")

    record.write(tmp_path / "NVIDIA_H200.json", "ops", _stages("failed")["ops"])
    assert plot.main(arguments) == 0
    assert measured.read_text() == empty


@pytest.mark.parametrize(
    "text", ["<!-- table:nothing -->\n<!-- end -->", "<!-- table:models -->\n<!-- table:machine -->\n<!-- end -->"]
)
def test_a_bad_mark_leaves_the_pages_alone(tmp_path, text, capsys):
    for name in ("roofline.md", "results.md"):
        (tmp_path / name).write_text(text)
    assert plot.main(["--docs", str(tmp_path), "--results", str(tmp_path)]) == 2
    assert (tmp_path / "roofline.md").read_text() == text
    assert capsys.readouterr().err.count("\n") == 1


def test_the_pages_are_fresh():
    """docs/roofline.md and docs/results.md hold what ``make figures`` writes."""
    results = tables.all_results()
    for name, shown in (("roofline.md", None), ("results.md", results)):
        text = (record.ROOT / "docs" / name).read_text()
        if shown is None or not shown:  # plots' links depend on what was drawn
            assert plot.fill(text, shown, {}) == text, f"docs/{name}: run `make figures`"
