"""Tables and plots of what was measured."""

import json
import re

import pytest

from benchmarks import bench_pooling
from benchmarks.gpu import predicted
from benchmarks.report import plot, record, tables


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


def test_a_prediction_stands_beside_what_was_measured(tmp_path):
    case = next(iter(bench_pooling.cases("full")))
    (tmp_path / "H200.json").write_text(json.dumps({predicted.name_of(case): 80.0}))
    row = {"op": case.op, "shape": case.shape, "mode": case.mode, "median_us": 100.0, "provider": "fastseg"}
    told = predicted.beside(case, "H200", 100.0, tmp_path)
    assert told == {"predicted_us": 80.0, "of_predicted": 1.25}
    assert predicted.beside(case, "L4", 100.0, tmp_path) == predicted.beside(case, None, 100.0, tmp_path) == {}
    stages = {"ops": {"tests": "passed", "rows": [row | told]}}
    assert _cells(tables.op_table(bench_pooling)("NVIDIA_H200", stages), case.shape)[-2:] == ["80.0", "1.25"]
    stages = {"ops": {"tests": "passed", "rows": [row]}}
    assert "predicted" not in tables.op_table(bench_pooling)("NVIDIA_H200", stages)


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
