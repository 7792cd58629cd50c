"""`fastseg train` and `evaluate`: a resumed run has the same curve, and nothing that goes wrong loses work."""

import json
import os

import pytest
import torch
from folders import make_folders
from PIL import Image

import fastseg
from fastseg.cli import main
from fastseg.io.checkpoint import load_checkpoint
from fastseg.models.weights import read_payload


@pytest.fixture(autouse=True)
def _reference():
    with fastseg.reference():  # the interpreter would take minutes
        yield


@pytest.fixture
def folder(tmp_path):
    return make_folders(tmp_path / "data")


def _train(folder, output, *arguments, epochs=3):
    base = ["train", "--data", folder, "--model", "segnet_basic", "--option", "channels=8", "--batch", 4, "--device"]
    return main([str(part) for part in (*base, "cpu", "--epochs", epochs, "--lr", 0.05, "-o", output, *arguments)])


def _curve(output):
    return [{**row, "seconds": 0} for row in json.loads((output / "curves.json").read_text())]


def test_a_resumed_run_is_the_same_run(folder, tmp_path, capsys):
    options = ("--class-weights", "median-frequency", "--schedule", "onecycle", "--scale", 0.9, 1.2, "--crop", 16, 16)
    assert _train(folder, tmp_path / "whole", *options) == 0
    stopped = ("--max-seconds", 1e-9)  # after every step
    assert _train(folder, tmp_path / "parts", *options, *stopped) == 0
    for _ in range(5):
        assert _train(folder, tmp_path / "parts", *options, *stopped, "--resume") == 0
    assert _curve(tmp_path / "whole") == _curve(tmp_path / "parts") and len(_curve(tmp_path / "whole")) == 3
    out, err = capsys.readouterr()
    assert "stopped after 0 of 3" in out
    assert f"epoch 3/3: loss {_curve(tmp_path / 'whole')[2]['loss']:.4f}, val mIoU" in err
    payloads = [read_payload(tmp_path / name / "last.pt") for name in ("whole", "parts")]
    for key, value in payloads[0]["state_dict"].items():
        assert torch.equal(value, payloads[1]["state_dict"][key]), key
    assert load_checkpoint(tmp_path / "whole" / "best.pt")[1] == ["ground", "sky"]
    for name in ("curves.csv", "curves.png"):
        assert (tmp_path / "whole" / name).stat().st_size > 0


def test_a_loss_of_several(folder, tmp_path, capsys):
    """Resumed with the same loss alone; a checkpoint from before there was a choice has cross entropy."""
    assert _train(folder, tmp_path / "run", "--loss", "ce+0.5*dice", epochs=1) == 0
    mixed = _curve(tmp_path / "run")[0]["loss"]
    assert _train(folder, tmp_path / "plain", epochs=1) == 0
    assert mixed > _curve(tmp_path / "plain")[0]["loss"]  # half a Dice loss more
    capsys.readouterr()
    assert _train(folder, tmp_path / "run", "--resume", epochs=1) == 1
    assert "its run had loss = 'ce+0.5*dice', this one 'ce'" in _complaint(capsys)
    last = tmp_path / "plain" / "last.pt"
    payload = read_payload(last)
    del payload["training"]["settings"]["loss"]
    torch.save(payload, tmp_path / "old.pt")  # the payload is mapped from the file
    os.replace(tmp_path / "old.pt", last)
    assert _train(folder, tmp_path / "plain", "--resume", epochs=1) == 0
    with pytest.raises(SystemExit):
        _train(folder, tmp_path / "other", "--loss", "ce+mse")
    assert "'mse' is no loss" in capsys.readouterr().err


def test_evaluate_names_the_classes_and_draws_in_the_labels_colours(folder, tmp_path, capsys):
    assert _train(folder, tmp_path / "run", epochs=1) == 0
    colours = [[200, 10, 20], [30, 40, 220]]
    for path in (folder / "test" / "labels").iterdir():
        label = Image.open(path)
        label.putpalette([value for colour in colours for value in colour])
        label.save(path)
    capsys.readouterr()
    scores = ["--data", folder, "--weights", tmp_path / "run" / "best.pt", "-o", tmp_path / "scores"]
    assert main([str(part) for part in ("evaluate", *scores, "--device", "cpu")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[:4]] == ["class", "ground", "sky", "mean"] and len(rows[1]) == 5
    with Image.open(tmp_path / "scores" / "worst.png") as sheet:
        found = {colour for _, colour in sheet.getcolors(2**20)}
    assert {tuple(colour) for colour in colours} <= found


def _complaint(capsys):
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "fastseg train: " in line]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "killed"])
def test_a_checkpoint_that_cannot_be_written_loses_nothing(folder, tmp_path, capsys, monkeypatch, error):
    output = tmp_path / "run"
    assert _train(folder, output, "--max-seconds", 1e-9) == 0
    before = (output / "last.pt").read_bytes()

    def fails(descriptor):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        assert _train(folder, output, "--resume") == 1
    line = _complaint(capsys)
    assert ("No space left" in line and "unharmed" in line) if isinstance(error, OSError) else "interrupted" in line
    assert (output / "last.pt").read_bytes() == before
    (output / ".last.pt.1.tmp").write_bytes(b"half")  # what a SIGKILL leaves
    assert _train(folder, output, "--resume") == 0
    assert len(_curve(output)) == 3 and not list(output.glob(".*"))


def test_a_picture_that_breaks_during_training_loses_nothing(folder, tmp_path, capsys):
    output, picture = tmp_path / "run", folder / "train" / "images" / "p0.png"
    whole = picture.read_bytes()
    assert _train(folder, tmp_path / "whole", "--batch", 1) == 0
    picture.write_bytes(whole[:400])
    assert _train(folder, output, "--batch", 1) == 1
    assert str(picture) in _complaint(capsys)
    assert read_payload(output / "last.pt")["training"]["epoch"] == 0
    picture.write_bytes(whole)
    assert _train(folder, output, "--batch", 1, "--resume") == 0
    assert _curve(output) == _curve(tmp_path / "whole")


def test_runs_are_not_mixed(folder, tmp_path, capsys):
    output = tmp_path / "run"
    assert _train(folder, output, "--resume") == 1
    assert "no checkpoint is there to resume" in _complaint(capsys)
    assert _train(folder, output, epochs=1) == 0
    capsys.readouterr()
    assert _train(folder, output, epochs=1) == 1
    assert "a run is there" in _complaint(capsys)
    assert _train(folder, output, "--resume", epochs=2) == 1
    assert "its run had epochs = 1, this one 2" in _complaint(capsys)
    Image.new("L", (20, 16), 5).save(folder / "train" / "labels" / "p1.png")
    assert _train(folder, tmp_path / "other") == 1
    assert "has the label 5" in _complaint(capsys)


def test_divergence_is_one_line(folder, tmp_path, capsys):
    assert _train(folder, tmp_path / "run", "--optimizer", "sgd", "--lr", 1e30) == 1
    assert "diverged" in _complaint(capsys)
    assert not (tmp_path / "run" / "last.pt").exists()
