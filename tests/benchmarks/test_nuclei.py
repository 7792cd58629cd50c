"""The nuclei study on generated discs: it runs from end to end, and its levels are the whole net's heads."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import fastseg
from benchmarks.studies import nuclei
from fastseg.training.dataset import FolderDataset, read_spec
from fastseg.training.evaluation import evaluate

WIDTHS = (4, 6, 8, 10, 12)
LEVELS = ["L1", "L2", "L3", "L4"]


@pytest.fixture(autouse=True)
def _reference():
    with fastseg.reference():  # the interpreter would take minutes
        yield


@pytest.fixture
def folder(tmp_path):
    """Bright discs on a dark ground; test pictures of two sizes."""
    rng, data = np.random.default_rng(0), tmp_path / "data"
    for split, count in (("train", 16), ("val", 2), ("test", 3)):
        for kind in ("images", "labels"):
            (data / split / kind).mkdir(parents=True)
        for number in range(count):
            rows, columns = np.mgrid[:48, : 48 + 5 * (number % 2)]
            label = np.zeros(rows.shape, np.uint8)
            for y, x, r in rng.uniform((0, 0, 4), (48, 48, 9), (3, 3)):
                label[(rows - y) ** 2 + (columns - x) ** 2 < r * r] = 1
            image = (40 + 140 * label[..., None] + rng.normal(0, 8, (*label.shape, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(data / split / "images" / f"p{number}.png")
            Image.fromarray(label).save(data / split / "labels" / f"p{number}.png")
    return data


def _net():
    """With heads that differ, and statistics that are not those of a new norm."""
    model = nuclei.create("unetplusplus", 2, norm=True, widths=WIDTHS, deep_supervision=True)
    with torch.no_grad():
        model.train()(torch.rand(2, 3, 32, 32))
    return model.eval()


def test_the_study_runs_and_goes_on(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nuclei, "REPETITIONS", 2)
    monkeypatch.setattr(nuclei, "SIDE", 32)
    output, run = tmp_path / "out", tmp_path / "run"
    arguments = [folder, "-o", output, "--run", run, "--widths", *WIDTHS, "--batch", 2, "--crop", 32]
    main = lambda *more: nuclei.main([str(part) for part in (*arguments, *more)])
    assert main("--seconds", 1e-3) == 0
    result, table = json.loads((output / "study.json").read_text()), capsys.readouterr().out
    assert list(result["nets"]) == [*LEVELS, nuclei.MEAN]
    rows = [result["nets"][name] for name in LEVELS]
    for key in ("parameters", "macs"):
        assert sorted({row[key] for row in rows}) == [row[key] for row in rows], key
    for row in result["nets"].values():
        assert 0 <= row["iou"] <= 1 and 0 <= row["iou_of_pictures"] <= 1
        assert 0 < row["ms_quartiles"][0] <= row["ms"] <= row["ms_quartiles"][1]
    assert (result["training"]["epochs"], result["training"]["steps"], result["test_pictures"]) == (1, 8, 3)
    assert nuclei.markdown(result) in table
    for name in ("levels.png", "curves.json"):
        assert (output / name).stat().st_size > 0
    # The run is finished: what it left is scored again, to the same numbers.
    assert main() == 0
    again = json.loads((output / "study.json").read_text())
    assert [row["iou"] for row in again["nets"].values()] == [row["iou"] for row in result["nets"].values()]
    assert again["training"] == result["training"]
    assert main("--seed", 1) == 2
    assert "its run had seed = 0, this one 1" in capsys.readouterr().err


def test_a_level_is_the_whole_nets_head():
    model, x = _net(), torch.randn(1, 3, 48, 53)
    nets = nuclei.levels_of(model)
    with torch.no_grad():
        heads = model._branches(x, model._heads())
        for name, head in zip(LEVELS, heads, strict=True):
            assert torch.equal(nets[name](x), head)
        torch.testing.assert_close(nets[nuclei.MEAN](x).sigmoid(), torch.stack(heads).sigmoid().mean(0))
        assert not torch.allclose(heads[0], heads[3])


def test_scores_are_those_of_evaluate(folder):
    model, spec = _net(), read_spec(nuclei.HERE / "nuclei.json")
    dataset = FolderDataset(folder, "test", spec)
    over_pixels, over_pictures = nuclei.scores(model, dataset, "net")
    batches = nuclei.scoring_batches(dataset, None, 1, nuclei.ALONE, 0, False)
    assert over_pixels == evaluate(model, batches, spec, nuclei.ALONE).scores.iou[1]
    each = [evaluate(model, [batch], spec, nuclei.ALONE).scores.iou[1] for batch in batches]
    assert over_pictures == pytest.approx(np.mean(each)) and len(each) == 3


def test_multiplications_by_hand(monkeypatch):
    monkeypatch.setattr(nuclei, "SIDE", 32)
    full, half = 32 * 32, 16 * 16
    a, b = WIDTHS[:2]
    want = full * 9 * (3 * a + a * a) + half * 9 * (a * b + b * b)  # the encoder's two nodes
    want += full * b * a + full * 9 * (2 * a * a + a * a) + full * 2 * a  # upsampling, X(0, 1) and its head
    assert nuclei.macs(nuclei.levels_of(_net())["L1"]) == want


def test_bad_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("none", "no such folder; benchmarks/studies/nuclei.md says"),
        ("empty", "test/images: no such folder"),
    ):
        assert nuclei.main([str(tmp_path / folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("nuclei: ") and message in line


def test_the_note_has_the_table_of_the_run():
    result = json.loads((nuclei.record.RESULTS / "nuclei" / "study.json").read_text())
    assert nuclei.markdown(result) in (nuclei.HERE / "nuclei.md").read_text()
