"""Latency studies: what is measured and counted, the files, and verdicts that respect the spread."""

import csv
import json

import pytest
import torch
from torch import nn

import fastseg
from fastseg.cli import main
from fastseg.measure import paths, study
from fastseg.measure.paths import PATHS, Built, Unavailable
from fastseg.measure.report import compare, ratios, read_results, table, write_results
from fastseg.measure.study import Case, measure, statistics_of
from fastseg.models import create
from fastseg.nn.fuse import conv_norm_act

CPU = torch.device("cpu")


class Tiny(nn.Module):
    def __init__(self, num_classes: int, width: int = 8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, num_classes, 1, bias=False)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu())


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(study, "create", lambda name, classes, **options: Tiny(classes, **options))


def row(**changes) -> dict:
    base = {"model": "m", "height": 8, "width": 8, "batch": 1, "dtype": "fp32", "path": "eager", "median_ms": 10.0,
            "p95_ms": 11.0, "p99_ms": 12.0, "spread": 0.01, "samples": 5, "images_per_s": 100.0, "peak_mib": None,
            "launches": 3, "gflop": 1.0, "mbytes": 2.0}  # fmt: skip
    return base | changes


def test_rows(tiny):
    case = Case("tiny", 12, 16, 2, "fp32")
    rows = measure(case, ["eager", "runner-exact", "eager-cl-graph"], CPU, classes=5, repetitions=4)
    assert [r["path"] for r in rows] == ["eager", "runner-exact", "eager-cl-graph"]
    assert rows[2]["unavailable"] == "graphs are of CUDA"
    eager, runner = rows[:2]
    pixels = 2 * 12 * 16
    assert eager["gflop"] == pytest.approx(2 * pixels * 8 * (27 + 5) * 1e-9)
    assert eager["mbytes"] == pytest.approx(4 * (pixels * (3 + 8 + 8 + 5) + 8 * 27 + 8 * 5) * 1e-6)
    assert eager["launches"] >= 4 and runner["launches"] >= 2  # convolution, norm, ReLU, convolution
    assert eager["peak_mib"] >= 4 * pixels * 16 / 2**20  # a map and the next
    for r in (eager, runner):
        assert r["samples"] == 4 and 0 < r["median_ms"] <= r["p95_ms"] <= r["p99_ms"]
        assert r["images_per_s"] == pytest.approx(2e3 / r["median_ms"])


def test_every_path_computes_the_model(tiny):
    """Or says why it cannot: nothing is timed that is not the model."""
    model, x = Tiny(5).eval(), torch.randn(1, 3, 16, 16)
    want = model(x).detach()
    ran = []
    for name in set(PATHS) - {"compile-max", "compile-freeze", "compile"}:  # minutes of a compiler's time
        try:
            got = PATHS[name](model, x, torch.float32).call()
        except Unavailable as error:
            assert str(error)
            continue
        got = got[0] if isinstance(got, list) else got
        torch.testing.assert_close(torch.as_tensor(got), want, rtol=1e-4, atol=1e-5)
        ran.append(name)
    assert {"eager", "eager-cl", "fastseg", "runner", "runner-exact"} <= set(ran)


def test_autocast_is_on_below_fp32():
    got = PATHS["eager"](Tiny(5).eval(), torch.randn(1, 3, 8, 8), torch.bfloat16).call()
    assert got.dtype == torch.bfloat16 and not torch.is_autocast_enabled("cpu")


def test_statistics():
    s = statistics_of([i / 1000 for i in range(1, 101)], batch=4)
    assert s["median_ms"] == pytest.approx(50.5) and s["p95_ms"] == pytest.approx(95.05)
    assert s["p99_ms"] == pytest.approx(99.01) and s["spread"] == pytest.approx(49.5 / 50.5)
    assert s["images_per_s"] == pytest.approx(4000 / 50.5)


@pytest.mark.parametrize(
    "after, spread, word",
    [
        (10.1, 0.001, "same"),  # below 2 %
        (10.5, 0.001, "slower"),
        (10.5, 0.1, "same"),  # within the spread
        (8.0, 0.05, "faster"),
        (8.0, 0.4, "same"),
    ],
)
def test_verdicts(after, spread, word):
    (verdict,) = compare({"rows": [row()]}, {"rows": [row(median_ms=after, spread=spread)]})
    assert verdict.word == word and verdict.ratio == pytest.approx(after / 10)


def test_only_what_both_have_is_compared():
    assert compare({"rows": [row()]}, {"rows": [row(batch=2), {**row(), "path": "x", "unavailable": "why"}]}) == []


def test_ratios():
    rows = [row(), row(path="runner", median_ms=5.0), row(batch=2), row(batch=2, path="runner", median_ms=20.0)]
    assert ratios(rows) == pytest.approx({"eager": 1.0, "runner": 1.0})


def test_files(tmp_path):
    rows = [row(path=p, batch=b, height=h, median_ms=b * h, peak_mib=1.0) for p in ("eager", "runner") for b in (1, 2)
            for h in (8, 16)]  # fmt: skip
    rows.append({"model": "m", "height": 8, "width": 8, "batch": 1, "dtype": "fp32", "path": "openvino",
                 "unavailable": "openvino is not installed"})  # fmt: skip
    results = {"machine": {"chip": "x"}, "rows": rows, "roofs": {"fp32": {"gflops": 100.0, "gbytes": 10.0}}}
    written = write_results(tmp_path, results)
    assert {path.name for path in written} == {
        "latency.json", "latency.csv", "latency_batch.png", "latency_size.png", "roofline.png",
    }  # fmt: skip
    assert all(path.stat().st_size > 0 for path in written)
    assert read_results(tmp_path / "latency.json") == results
    with (tmp_path / "latency.csv").open() as file:
        assert [float(r["median_ms"]) for r in csv.DictReader(file) if r["median_ms"]] == [8, 16, 16, 32] * 2
    assert "openvino is not installed" in table(rows)


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{"model": "m"}]}', '{"rows": 3}'])
def test_no_result_is_said_to_be_none(tmp_path, text):
    path = tmp_path / "latency.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not the JSON of a latency study"):
        read_results(path)


def test_command(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastseg.cli.latency.roofs", lambda device, dtype: {"gflops": 1.0, "gbytes": 1.0})
    command = ["latency", "--sizes", "8", "8x12", "--paths", "eager", "runner-exact", "--repetitions", "3"]
    assert main([*command, "--threads", "1", "-o", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "deeplabv3plus 1x8x12 fp32" in out and "geometric means over eager: eager 1.00, runner-exact" in out
    path = tmp_path / "a" / "latency.json"
    results = json.loads(path.read_text())
    assert len(results["rows"]) == 4 and results["machine"]["threads"] == "1"
    for r in results["rows"]:
        r["median_ms"] *= 3
        r["spread"] = 0.0
    (tmp_path / "b.json").write_text(json.dumps(results))
    json_a = json.loads(path.read_text())
    for r in json_a["rows"]:
        r["spread"] = 0.0
    path.write_text(json.dumps(json_a))
    assert main(["latency", "--compare", str(path), str(tmp_path / "b.json")]) == 1
    assert capsys.readouterr().out.count("slower") == 4
    assert main(["latency", "--compare", str(tmp_path / "b.json"), str(path)]) == 0
    (tmp_path / "empty.json").write_text('{"rows": []}')
    assert main(["latency", "--compare", str(path), str(tmp_path / "empty.json")]) == 1
    assert "have no case and path in common" in capsys.readouterr().err


def test_an_interrupted_study_keeps_its_cases(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("fastseg.cli.latency.roofs", lambda device, dtype: {"gflops": 1.0, "gbytes": 1.0})
    calls = []

    def measured(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [row()]

    monkeypatch.setattr("fastseg.cli.latency.measure", measured)
    assert main(["latency", "--sizes", "8", "16", "-o", str(tmp_path)]) == 1
    assert len(read_results(tmp_path / "latency.json")["rows"]) == 1


@pytest.mark.parametrize("size", ["0", "8x", "axb", "8x0"])
def test_sizes(size, capsys):
    with pytest.raises(SystemExit):
        main(["latency", "--sizes", size])
    assert "no size" in capsys.readouterr().err


def test_what_fails_is_a_row_and_ends_nothing(tiny, tmp_path, capsys, monkeypatch):
    """In building, in the first call, in the model itself: the study goes on and says why."""

    def breaks(model, x, dtype):
        raise RuntimeError("no such kernel\nat all")

    def breaks_late(model, x, dtype):
        return Built(lambda: {}["key"], counts=False)

    monkeypatch.setitem(PATHS, "openvino", breaks)
    monkeypatch.setitem(PATHS, "onnxruntime", breaks_late)
    rows = measure(Case("tiny", 8, 8, 1, "fp32"), ["openvino", "eager", "onnxruntime", "eager"], CPU, repetitions=2)
    assert [r["path"] for r in rows] == ["openvino", "eager", "onnxruntime"]
    assert rows[0]["unavailable"] == "RuntimeError: no such kernel" and rows[2]["unavailable"] == "KeyError: 'key'"
    assert rows[1]["median_ms"] > 0
    monkeypatch.setattr("fastseg.cli.latency.roofs", lambda device, dtype: {"gflops": 1.0, "gbytes": 1.0})
    create = study.create

    def too_large(name, classes, **options):
        return create(name, classes, **options) if name == "segnet" else breaks(None, None, None)

    monkeypatch.setattr(study, "create", too_large)
    command = ["latency", "--sizes", "8", "--paths", "eager", "openvino", "--repetitions", "2", "--device", "cpu"]
    assert main([*command, "--models", "fcn", "segnet", "-o", str(tmp_path)]) == 0
    rows = read_results(tmp_path / "latency.json")["rows"]
    assert [("median_ms" in r, r["model"]) for r in rows] == [(False, "fcn")] * 2 + [
        (True, "segnet"),
        (False, "segnet"),
    ]
    assert "not measured: RuntimeError: no such kernel" in capsys.readouterr().out
    assert main([*command, "--models", "fcn"]) == 1
    assert "nothing could be measured; the rows say why" in capsys.readouterr().err


def test_a_peer_below_fp32_says_why_it_is_not_measured(tiny):
    """Whether or not it is installed: the row is not empty."""
    for path in ("onnxruntime", "openvino"):
        (row,) = measure(Case("tiny", 8, 8, 1, "bf16"), [path], CPU, repetitions=2)
        assert (
            "not installed" in row["unavailable"] or "fp32 on a CPU only, not in bfloat16 on cpu" in row["unavailable"]
        )


def test_segnet_basic_in_bfloat16_on_a_cpu():
    with fastseg.reference():
        paths = ["eager", "fastseg"]
        rows = measure(Case("segnet_basic", 16, 16, 1, "bf16"), paths, CPU, options={"channels": 4}, repetitions=2)
    assert [row.get("unavailable") for row in rows] == [None] * 2 and all(row["median_ms"] > 0 for row in rows)


def test_graphs_fold_norms_once(monkeypatch):
    """Once a model, not once a replay; the path holds what its graph reads."""
    folds, own = [], conv_norm_act.fold_norms
    monkeypatch.setattr(conv_norm_act, "fold_norms", lambda *args: folds.append(1) or own(*args))
    model, x = create("segnet_basic", 3, channels=8).eval(), torch.randn(1, 3, 32, 32)
    built = paths.frozen_call(model, x, torch.float32)
    results = [built.call() for _ in range(3)]
    assert 0 < len(folds) <= 8
    torch.testing.assert_close(results[2], model(x).detach(), rtol=1e-4, atol=1e-4)
