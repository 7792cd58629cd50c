"""Tuning under the interpreter: a kernel with good, wrong and impossible candidates, and a made-up clock."""

import argparse
import json
import time

import pytest
import torch
import triton
import triton.language as tl

from fastseg.cli import tune as command
from fastseg.kernels.runtime import config
from fastseg.kernels.runtime.config import select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.launch import run as run_kernel
from fastseg.kernels.tools import tune
from fastseg.kernels.tools import watch as observe
from fastseg.ops.core.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the toys run in Triton's interpreter")

SPEED = {16: 10.0, 32: 5.0, 64: 1.0, 128: 0.5, 256: 0.1}  # microseconds by BLOCK: the smaller ones are the right ones


@triton.jit
def _toy_scale_kernel(x_ptr, y_ptr, n, covered, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < covered
    tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs, mask=mask, other=0.0), mask=mask)


@triton.jit
def _toy_shift_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, 1 + tl.load(x_ptr + offs, mask=offs < n, other=0.0), mask=offs < n)


def scale(x: torch.Tensor) -> torch.Tensor:
    """2 x; wrong with BLOCK=128 (the last element is not written)."""
    y = torch.empty_like(x)
    cfg = select("toy_scale", size=x.numel(), device=x.device, dtype=x.dtype)
    covered = x.numel() - (cfg.BLOCK == 128)
    launch(_toy_scale_kernel, (triton.cdiv(x.numel(), cfg.BLOCK),), x, y, x.numel(), covered, **cfg.launch)
    return y


def shift(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    cfg = select("toy_shift", size=x.numel(), device=x.device, dtype=x.dtype)
    launch(_toy_shift_kernel, (triton.cdiv(x.numel(), cfg.BLOCK),), x, y, x.numel(), **cfg.launch)
    return y


def _timer(launches):
    return SPEED[launches[0].kwargs["BLOCK"]]


@pytest.fixture(autouse=True)
def toys(monkeypatch, tmp_path):
    values = {"num_warps": 4, "num_stages": 1}
    heuristics = {"toy_scale": 32, "toy_shift": 64}
    fixed = {name: lambda size, dtype, block=block: {"BLOCK": block, **values} for name, block in heuristics.items()}
    monkeypatch.setattr(config, "_heuristics", fixed)
    blocks = [{"BLOCK": block, **values} for block in (16, 48, 64, 128, 256)]  # 48: no power of two, does not compile
    monkeypatch.setattr(config, "_candidates", {"toy_scale": lambda size, dtype: blocks})
    monkeypatch.setattr(config, "USER", tmp_path / "user")
    monkeypatch.setattr(config, "SHIPPED", tmp_path / "shipped")
    config.forget_tables()
    config.table_names.cache_clear()
    yield
    config.forget_tables()
    config.table_names.cache_clear()


@pytest.fixture
def x():
    return torch.randn(200)


def _trials(x, **options):
    workload = lambda: scale(x)
    (row,) = observe.observe(workload)[1]
    return tune.search(workload, row, timer=_timer, **options)


def _spills(launches):
    return "5 spills" if launches[0].kwargs["BLOCK"] == 256 else ""


def test_observe_ties_launches_to_the_questions_they_answer(x):
    (first, second), rows = observe.observe(lambda: (shift(scale(shift(x))), scale(x[:100])))
    torch.testing.assert_close(first, 1 + 2 * (1 + x))
    torch.testing.assert_close(second, 2 * x[:100])
    assert [(row.kernel, row.size, len(launches)) for row, launches in rows.items()] == [
        ("toy_shift", 200, 2),
        ("toy_scale", 200, 1),
        ("toy_scale", 100, 1),
    ]


def test_search_times_the_right_ones_only(x):
    trials = _trials(x, implausible=_spills)
    assert [trial.values["BLOCK"] for trial in trials] == [32, 16, 48, 64, 128, 256]
    assert [trial.us for trial in trials] == [5.0, 10.0, None, 1.0, None, None]
    notes = {trial.values["BLOCK"]: trial.note for trial in trials if trial.note}
    assert set(notes) == {48, 128, 256}
    assert notes[128].startswith("wrong")
    assert notes[256] == "5 spills"
    assert tune.best(trials).values["BLOCK"] == 64


def test_a_store_left_out_shows_where_freed_memory_held_the_right_value(x, monkeypatch):
    torch.use_deterministic_algorithms(False)  # the tests' own NaN filling
    empty_like = torch.empty_like

    def recycled(like):
        """What an allocator hands out after a correct run; NaN where new memory is filled."""
        memory = empty_like(like)
        return memory if torch.are_deterministic_algorithms_enabled() else memory.copy_(2 * like)

    monkeypatch.setattr(torch, "empty_like", recycled)
    (wrong,) = [trial for trial in _trials(x) if trial.values["BLOCK"] == 128]
    assert wrong.us is None
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_implausible_candidate_is_never_launched(x, monkeypatch):
    launched = []
    monkeypatch.setattr(observe, "run", lambda *launch: (launched.append(launch[3]["BLOCK"]), run_kernel(*launch)))
    _trials(x, implausible=_spills)
    assert 64 in launched
    assert 256 not in launched


def test_a_compiler_that_fails_in_its_own_way_costs_one_candidate(x):
    def fails(launches):
        if launches[0].kwargs["BLOCK"] == 64:
            raise RuntimeError("PassManager::run failed\n")  # MLIR's, no TritonError
        return ""

    trials = {trial.values["BLOCK"]: trial for trial in _trials(x, implausible=fails)}
    assert (trials[64].us, trials[64].note) == (None, "RuntimeError: PassManager::run failed")
    assert trials[16].us == 10.0


def test_a_difference_within_noise_keeps_the_heuristic():
    trials = [tune.Trial({"BLOCK": 32}, 10.0), tune.Trial({"BLOCK": 64}, 9.9), tune.Trial({"BLOCK": 16}, 12.0)]
    assert tune.best(trials).values == {"BLOCK": 32}
    assert tune.best([*trials, tune.Trial({"BLOCK": 8}, 9.0)]).values == {"BLOCK": 8}
    assert tune.best([trials[0]._replace(us=None), *trials[1:]]).values == {"BLOCK": 64}
    assert tune.best([trials[0]._replace(us=None)]) is None


def test_disagreement():
    x = torch.randn(1000, dtype=torch.float64)
    rounded = x.bfloat16()
    assert tune.disagreement(rounded, rounded.clone()) == 0
    assert 0 < tune.disagreement((x.float(),), (x.float() * (1 + 1e-6),)) < 1
    assert tune.disagreement(rounded * 1.1, rounded) > 1
    assert tune.disagreement(torch.full_like(rounded, torch.nan), rounded) == float("inf")
    assert tune.disagreement(rounded[:5], rounded) == float("inf")
    assert tune.disagreement(torch.arange(3), torch.tensor([0, 1, 3])) == float("inf")


def test_rows_are_searched_once_each_and_in_time(x):
    first = lambda: scale(x)
    rows = observe.rows_of([first, lambda: shift(scale(x)), lambda: scale(x[:100])])
    assert [str(row) for row, _ in rows] == [
        "toy_scale[dtype=fp32] at 200",
        "toy_shift[dtype=fp32] at 200",
        "toy_scale[dtype=fp32] at 100",
    ]
    assert rows[0][1] is first
    seen = []
    each = lambda row, trials: seen.append((row, tune.best(trials).values["BLOCK"]))
    assert tune.tune(rows, each, timer=_timer) == []
    assert seen == [(rows[0][0], 256), (rows[1][0], 64), (rows[2][0], 256)]
    seen.clear()
    assert tune.tune(rows, each, timer=_timer, seconds=-1) == [row for row, _ in rows]
    assert seen == []
    assert [row.kernel for row, _ in observe.rows_of([first], wanted=lambda kernel: kernel == "toy_shift")] == []


def test_the_deadline_ends_a_row_after_the_heuristic(x):
    assert [trial.values["BLOCK"] for trial in _trials(x, deadline=time.monotonic() - 1)] == [32]


def test_a_written_table_is_what_a_launch_then_uses(x, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Fake GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    chosen = lambda: select("toy_scale", size=190, device=torch.device("cuda", 0), dtype=torch.float32)
    assert chosen().BLOCK == 32
    path = config.USER / "Fake_GPU.json"
    write = lambda row, trials: tune.write_table(path, tune.entry(row, tune.best(trials)), gpu="Fake_GPU")
    tune.tune(observe.rows_of([lambda: scale(x)]), write, timer=_timer, implausible=_spills)
    assert (chosen().BLOCK, chosen().source) == (64, str(path))
    written = json.loads(path.read_text())
    assert (written["gpu"], written["triton"], written["torch"]) == ("Fake_GPU", triton.__version__, torch.__version__)
    assert [file.name for file in path.parent.iterdir()] == ["Fake_GPU.json"]


def _table(block: int, size: str = "200") -> tune.Table:
    return {"toy_scale": {"dtype=fp32": {size: {"BLOCK": block, "num_warps": 4, "num_stages": 1}}}}


def test_writing_merges_rows_of_the_same_triton_minor(tmp_path):
    path = tmp_path / "new" / "gpu.json"
    tune.write_table(path, _table(16), gpu="gpu")
    tune.write_table(path, _table(32, "400"), gpu="gpu")
    tune.write_table(path, _table(64), gpu="gpu")
    sizes = json.loads(path.read_text())["configs"]["toy_scale"]["dtype=fp32"]
    assert {size: values["BLOCK"] for size, values in sizes.items()} == {"200": 64, "400": 32}


@pytest.mark.parametrize("before", ['{"triton": "2.1.0", "configs": {"old": {}}}', "{", '{"triton": "2"}', "[]"])
def test_writing_replaces_what_cannot_be_merged(tmp_path, before):
    path = tmp_path / "gpu.json"
    path.write_text(before)
    tune.write_table(path, _table(16), gpu="gpu")
    assert json.loads(path.read_text())["configs"] == _table(16)


def test_a_failed_write_leaves_the_old_table(tmp_path):
    path = tmp_path / "gpu.json"
    tune.write_table(path, _table(16), gpu="gpu")
    before = path.read_text()
    with pytest.raises(TypeError):
        tune.write_table(path, {"toy_scale": {"dtype=fp32": {"200": {"BLOCK": object()}}}}, gpu="gpu")
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["gpu.json"]


def test_op_calls_finds_each_distinct_call_of_a_registered_op():
    library = torch.library.Library("fastseg_toy", "DEF")
    library.define("twice(Tensor x, int times) -> Tensor")
    calls = []
    library.impl("twice", lambda x, times: (calls.append(times), x * times)[1], "CPU")
    op = torch.ops.fastseg_toy.twice
    a, b = torch.ones(3), torch.ones(4)
    found = observe.op_calls(lambda: (op(a, 2), op(a + 1, 2), op(b, 2), op(a, 3) + a), namespace="fastseg_toy")
    assert calls == [2, 2, 2, 3]
    assert [call().tolist() for call in found] == [[2.0] * 3, [2.0] * 4, [3.0] * 3]


@pytest.fixture
def toy_op():
    """scale as a registered op of fastseg, for the length of a test."""
    library = torch.library.Library("fastseg", "FRAGMENT")
    library.define("toy_scale(Tensor x) -> Tensor")
    library.impl("toy_scale", scale, "CPU")
    yield torch.ops.fastseg.toy_scale
    library._destroy()


def test_the_command_tunes_what_a_step_launches(toy_op, x, tmp_path, capsys):
    path = tmp_path / "new" / "Fake_GPU.json"
    steps = [lambda: toy_op(x) + 1, lambda: toy_op(x[:100])]
    options = {"timer": _timer, "implausible": _spills}
    assert command.tune_steps(steps, path, [], 60, **options) == 0
    written = json.loads(path.read_text())
    assert written["gpu"] == "Fake_GPU"
    assert {size: row["BLOCK"] for size, row in written["configs"]["toy_scale"]["dtype=fp32"].items()} == {
        "200": 64,
        "100": 64,
    }
    assert str(path) in capsys.readouterr().out

    path.unlink()
    assert command.tune_steps(steps, path, ["other"], 60, **options) == 1
    assert command.tune_steps(steps, path, ["toy"], -1, **options) == 1
    assert "no time was left for 2 of 2" in capsys.readouterr().out
    assert not path.exists()


def test_the_command_on_an_unwritable_folder(toy_op, x, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        command.tune_steps([lambda: toy_op(x)], tmp_path / "file" / "Fake_GPU.json", [], 60, timer=_timer)


def test_the_command_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(ValueError, match="CUDA device"):
        command.run(parser.parse_args([]))
