"""The benchmark harness: the fixture and the timing behind it, providers, floors."""

import pytest
import torch

import fastseg
from benchmarks import bench_pooling, harness, workloads
from benchmarks import bench_separable_conv as bench
from benchmarks.gpu import ops as op_modules
from benchmarks.report import record
from fastseg.kernels.runtime.launch import intercept, run

CPU = torch.device("cpu")


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

        with problem.context(), fastseg.force("separable_conv2d", form), intercept(note):
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
