"""The command line on what people give it: numbers, options, names and files of every sort; one clear line each."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from folders import make_folders
from PIL import Image

import fastseg
from fastseg.cli import main
from fastseg.cli.options import options_of
from fastseg.io.checkpoint import save_checkpoint
from fastseg.io.images import read_label
from fastseg.models import create, names

ESCAPE = "\x1b]0;owned\x07\x1b[31m"
FIT = re.compile("[^\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]*")


@pytest.fixture(autouse=True)
def _reference():
    with fastseg.reference():
        yield


@pytest.fixture
def data(tmp_path):
    return make_folders(tmp_path / "data", {"train": 4, "val": 2, "test": 2})


@pytest.fixture
def weights(tmp_path):
    return _weights(tmp_path / "w.pt", ["ground", "sky"])


def _weights(path, classes, seed=0):
    torch.manual_seed(seed)
    model = create("segnet_basic", len(classes), channels=4).eval()
    save_checkpoint(path, model, "segnet_basic", {"channels": 4}, classes)
    return path


def _run(*arguments) -> int:
    try:
        return main([str(part) for part in arguments])
    except SystemExit as stop:
        return stop.code


def _train(data, *arguments):
    base = ("train", "--data", data, "--model", "segnet_basic", "--option", "channels=4", "--epochs", 1, "--batch", 2)
    return _run(*base, "--device", "cpu", "--lr", 0.01, "-o", data.with_name("run"), *arguments)


def _evaluate(data, weights, *arguments):
    return _run(
        "evaluate", "--data", data, "--weights", weights, "--device", "cpu", "-o", data.with_name("s"), *arguments
    )


def _lines(capsys, command="train"):
    said = capsys.readouterr().err
    return [line.strip() for line in re.split(r"[\r\n]+", said) if f"fastseg {command}: " in line]


# numbers


NUMBERS = {
    "train": {
        "--epochs": "integer", "--batch": "integer", "--workers": "count", "--seed": "count", "--save-every": "integer",
        "--lr": "number", "--momentum": "number", "--weight-decay": "number", "--max-seconds": "number",
        "--size": "integer", "--crop": "integer", "--scale": "number",
    },
    "evaluate": {"--batch": "integer", "--worst": "count", "--workers": "count", "--size": "integer"},
    "predict": {"--classes": "integer", "--tile": "integer", "--tile-batch": "integer", "--overlap": "any"},
    "latency": {"--batches": "integer", "--classes": "integer", "--repetitions": "integer", "--threads": "integer",
                "--sizes": "size"},
    "tune": {"--batch": "integer", "--classes": "integer", "--budget": "number", "--size": "integer"},
    "demo": {"--seed": "count", "--steps": "integer"},
}  # fmt: skip
BAD = ["nan", "inf", "-inf", "1e400", "x", "", "9" * 5000, "\x1b[31m"]
MORE = {"integer": ["-1", "0", "1.5", "9" * 19], "count": ["-1", "1.5", "9" * 19], "number": ["-1"], "any": ["1.5"],
        "size": ["-1", "0", "8x", "99999999999", "8x99999999999"]}  # fmt: skip


@pytest.mark.parametrize("command", NUMBERS)
def test_numbers_that_cannot_be_are_one_line_that_names_the_option(command, tmp_path, capsys):
    needed = {
        "train": ["--data", "d", "--model", "unet", "-o", tmp_path / "o"],
        "predict": ["a", "--weights", "w", "-o", "o"],
        "evaluate": ["--data", "d", "--weights", "w", "-o", tmp_path / "o"],
    }.get(command, [])
    for option, kind in NUMBERS[command].items():
        for value in (*BAD, *MORE[kind]):
            values = [f"{option}={value}"] if option not in ("--size", "--crop", "--scale") else [option, value, "8"]
            assert _run(command, *needed, *values) == 2, (option, value)
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"fastseg {command}: argument {option}: ") or "expected" in line, line
            assert FIT.fullmatch(line) and len(line) < 5200


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--momentum", 1), "--momentum: 1 is not below 1"),
        (("--scale", 65, 65), "--scale: 65 is not at most 64"),
        (("--scale", 2, 0.5), "--scale 2 0.5: give the lower factor first"),
        (("--scale", 1, 64, "--size", 2000, 2000), "--scale 64 makes 16384000000 pixels of the largest picture"),
        (("--crop", 10**9, 10**9), "--crop 1000000000 1000000000: 1000000000000000000 pixels, more than the limit"),
        (("--size", 10**9, 1), "--size 1000000000 1: 1000000000 pixels"),
        (("--workers", 257), "--workers: 257 is more than 256"),
        (("--device", "meta"), "no device 'meta' here"),
        (("--changed-data",), "--changed-data is of a resumed run; give --resume too"),
        (("--option", "num_classes=3"), "num_classes: cannot be chosen; it follows from the data set's classes"),
        (("--option", "in_channels=1"), "in_channels: cannot be chosen; pictures are RGB"),
        (("--option", "channels=8"), "--option channels is given twice"),
        (("--option", "width=" + "[" * 9999), "width: its value is nested too deeply"),
    ],
    ids=str,
)
def test_what_else_train_refuses_before_any_work(data, capsys, arguments, words):
    assert _train(data, *arguments) in (1, 2)
    (line,) = _lines(capsys)
    assert words in line
    assert not data.with_name("run").exists()


@pytest.mark.parametrize(
    "value", ["x", "null", "[8]", "true", "8.5", "NaN", "{}", '"8"', "0", "-1", "9999999", "1e400"]
)
def test_options_of_a_wrong_type_or_value(data, capsys, value):
    base = ("train", "--data", data, "--model", "segnet_basic", "--device", "cpu", "-o", data.with_name("run"))
    assert _run(*base, "--option", f"channels={value}") == 1
    (line,) = _lines(capsys)
    assert "channels=" in line and ("takes an integer" in line or "no model segnet_basic with" in line)
    assert not data.with_name("run").exists()


def test_train_help_names_every_option_and_says_what_labels_are(capsys):
    assert _run("train", "--help") == 0
    text = capsys.readouterr().out
    for name in names():
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {name}: ")]
        assert all(f"{option}=" in line for option in options_of(name)) and "num_classes" not in line
    assert "pixel values are class" in text and "ignore_index" in text


def test_encoder_weights_of_a_model_without_encoder(data, tmp_path, capsys):
    torch.save({"a": torch.zeros(1)}, tmp_path / "e.pt")
    assert _train(data, "--encoder-weights", tmp_path / "e.pt") == 1
    (line,) = _lines(capsys)
    assert "--encoder-weights: torchvision's weights fit no encoder of segnet_basic" in line


# where results go


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "latency", "demo"])
def test_outputs_are_looked_at_before_the_work(command, data, weights, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    photo = data / "test" / "images" / "p0.png"
    given = {
        "train": ["--data", data, "--model", "unet"], "evaluate": ["--data", data, "--weights", weights],
        "predict": [photo, "--weights", weights], "latency": ["--sizes", 8], "demo": [],
    }  # fmt: skip
    work = ("train._checked", "evaluate.evaluate", "predict.segment", "latency.roofs", "demo.training.train")
    for name in work:
        monkeypatch.setattr(f"fastseg.cli.{name}", lambda *args, **kwargs: pytest.fail("work was begun"))
    for output in ("file", "file/deeper", "circle", "x" * 256):
        assert _run(command, *given[command], "--device", "cpu", "-o", tmp_path / output) == 1
        (line,) = _lines(capsys, command)
        assert f"{tmp_path / output}: cannot be made or written to (" in line
    assert (tmp_path / "file").read_text() == "mine"
    taken = {"train": "best.pt", "evaluate": "scores.json", "latency": "latency.csv", "demo": "weights.pt"}
    if command in taken:
        (tmp_path / "o" / taken[command]).mkdir(parents=True)
        assert _run(command, *given[command], "--device", "cpu", "-o", tmp_path / "o") == 1
        assert f"{taken[command]}: is a folder" in _lines(capsys, command)[0]


# names that would steer the terminal, and those that are no text


def test_names_do_not_steer_the_terminal(data, weights, tmp_path, capsys):
    odd = f"p\udcff{ESCAPE}\u202e"
    for kind in ("images", "labels"):
        folder = data / "test" / kind
        os.rename(folder / "p0.png", folder / f"{odd}.png")
    (data / "test" / "images" / f"{ESCAPE}.txt").write_text("")
    classes = [f"ground{ESCAPE}\nfastseg: all is well", "sky\x9b2J"]
    (data / "dataset.json").write_text(json.dumps({"classes": classes, "ignore_index": 9}))
    _weights(weights, classes)
    assert _evaluate(data, weights) == 0
    out, err = capsys.readouterr()
    assert "ground\\x1b]0;owned\\x07" in out and "\\x9b2J" in out and "\\udcff" in out and FIT.fullmatch(out)
    assert "\nfastseg: all is well" not in out and ESCAPE not in err
    photo = data / "test" / "images" / f"{odd}.png"
    assert (
        _run(
            "predict",
            photo,
            tmp_path / f"no{ESCAPE}.png",
            "--weights",
            weights,
            "--device",
            "cpu",
            "-o",
            tmp_path / "o",
        )
        == 1
    )
    out, err = capsys.readouterr()
    assert FIT.fullmatch(out) and ESCAPE not in err and "no\\x1b]0;owned\\x07\\x1b[31m.png: no such file" in err
    assert sorted(os.listdir(tmp_path / "o")) == [f"{odd}_classes.png", f"{odd}_overlay.png"]
    commands = (
        ("evaluate", "--data", ESCAPE, "--weights", weights, "-o", tmp_path / "o"),
        (ESCAPE,),
        ("train", "--data", data, "--model", ESCAPE, "-o", "o"),
        ("latency", "--compare", ESCAPE, ESCAPE),
    )
    for command in commands:
        assert _run(*command) != 0
        out, err = capsys.readouterr()
        assert FIT.fullmatch(out) and FIT.fullmatch(err) and len(err.splitlines()) == 1


@pytest.mark.parametrize("length", [236, 251])
def test_the_longest_names_of_pictures(data, weights, tmp_path, capsys, length):
    photo = tmp_path / ("\N{GREEK SMALL LETTER ALPHA}" * 100 + "x" * (length - 200) + ".png")
    shutil.copy(data / "test" / "images" / "p0.png", photo)
    assert _run("predict", photo, "--weights", weights, "--device", "cpu", "-o", tmp_path / "o") == 0
    written = sorted(os.listdir(tmp_path / "o"))
    assert [name[-12:] for name in written] == ["_classes.png", "_overlay.png"]
    assert photo.stem.startswith(written[0][:-12]) and len(os.fsencode(written[0])) == min(length + 12, 255)
    assert ("too long for that of a result" in capsys.readouterr().err) == (length > 243)


# files


DEEP = "[" * 100_000
STRANGE = {
    "missing": "no such file", "folder": "a folder, not a file", "empty": "", "pipe": "not a regular file",
    "device": "not a regular file", "circle": "cannot be opened: Too many levels", "binary": "cannot be read as JSON",
    "deep": "nested too deeply", "twice": "'classes' is there twice", "digits": "cannot be read as JSON",
}  # fmt: skip


def _strange(kind, path):
    contents = {"empty": b"", "binary": b"\xff\xfe\x00", "deep": DEEP.encode(), "digits": b"[" + b"9" * 9999 + b"]",
                "twice": b'{"classes": ["a"], "classes": ["a", "b"]}'}  # fmt: skip
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "circle":
            path.symlink_to(path)
        case "missing":
            pass
        case _:
            path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_files(kind, data, weights, tmp_path, capsys):
    path = _strange(kind, tmp_path / "strange.json")
    assert _train(data, "--dataset", path) == 1
    (line,) = _lines(capsys)
    assert line.startswith(f"fastseg train: {path}: ") and STRANGE[kind] in line
    assert _run("latency", "--compare", path, path) == 1
    (line,) = _lines(capsys, "latency")
    assert f"{path}: " in line
    for picture in (path.with_name("p.png"), path.with_name("p.tif")):
        os.rename(path, picture) if os.path.lexists(path) else None
        path = picture
        assert _run("predict", picture, "--weights", weights, "--device", "cpu", "-o", tmp_path / "o") == 1
        (line,) = _lines(capsys, "predict")
        assert line.startswith(f"fastseg predict: {picture}: ")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"machine": 3}, "machine is int"),
        ({"machine": None}, "machine is NoneType"),
        ({"rows": None}, "no list of rows"),
        ({"rows": {"0": 1}}, "no list of rows"),
        ({"rows": [3]}, "row 0 is a int"),
        ({"path": 5}, "row 0 has path = 5"),
        ({"model": ["m"]}, r"row 0 has model = \['m'\]"),
        ({"height": "8"}, "row 0 has height = '8'"),
        ({"batch": True}, "row 0 has batch = True"),
        ({"median_ms": "fast"}, "row 0 has median_ms = 'fast'"),
        ({"median_ms": 0}, "row 0 has median_ms = 0"),
        ({"median_ms": None}, "row 0 has median_ms = None"),
        ({"median_ms": float("nan")}, "row 0 has median_ms = nan"),
        ({"spread": float("inf")}, "row 0 has spread = inf"),
        ({"spread": ...}, "row 0 has spread = None"),
        ({"dtype": ...}, "row 0 has no dtype"),
    ],
    ids=str,
)
def test_entries_of_a_comparison(entry, words, tmp_path, capsys):
    row = {
        "model": "m",
        "height": 8,
        "width": 8,
        "batch": 1,
        "dtype": "fp32",
        "path": "eager",
        "median_ms": 10.0,
        "spread": 0.1,
    }
    (tmp_path / "good.json").write_text(json.dumps({"rows": [row], "machine": {}}))
    row = {name: value for name, value in (row | entry).items() if value is not ...}
    study = {"rows": [row], "machine": {}} | {name: entry[name] for name in entry if name in ("rows", "machine")}
    (tmp_path / "bad.json").write_text(json.dumps(study))
    for order in (("good", "bad"), ("bad", "good")):
        assert _run("latency", "--compare", *(tmp_path / f"{name}.json" for name in order)) == 1
        (line,) = _lines(capsys, "latency")
        assert re.search(f"bad.json: is not the JSON of a latency study: .*{words}", line)


# class names


def test_evaluate_matches_classes_by_name(data, weights, tmp_path, capsys):
    assert _evaluate(data, weights) == 0
    want = json.loads((tmp_path / "s" / "scores.json").read_text())
    capsys.readouterr()
    payload = torch.load(weights, weights_only=True)
    for name in ("classifier.weight", "classifier.bias"):
        payload["state_dict"][name] = payload["state_dict"][name].flip(0)
    torch.save(payload | {"classes": ["sky", "ground"]}, weights)
    assert _evaluate(data, weights) == 0
    got = json.loads((tmp_path / "s" / "scores.json").read_text())
    assert got == want and len({row["iou"] for row in got["classes"]}) == 2
    assert "another order; they are matched by name" in _lines(capsys, "evaluate")[0]
    torch.save(payload | {"classes": ["ground", "snow"]}, weights)
    assert _evaluate(data, weights) == 1
    (line,) = _lines(capsys, "evaluate")
    assert "only the weights have 'snow', only the data set has 'sky'" in line
    torch.save({key: value for key, value in payload.items() if key != "classes"}, weights)
    assert _evaluate(data, weights) == 0
    assert "names no classes; taken in the order of the data set" in _lines(capsys, "evaluate")[0]


def test_a_picture_of_several_pages_is_said_to_be_one(data, weights, tmp_path, capsys):
    with Image.open(data / "test" / "images" / "p0.png") as image:
        image.save(tmp_path / "pages.tif", save_all=True, append_images=[image.rotate(90)])
        image.save(tmp_path / "one.png")
    for name in ("pages.tif", "one.png"):
        assert _run("predict", tmp_path / name, "--weights", weights, "--device", "cpu", "-o", tmp_path / "o") == 0
        assert ("has several pages; the first is taken" in capsys.readouterr().err) == (name == "pages.tif")
    maps = [read_label(tmp_path / "o" / f"{stem}_classes.png") for stem in ("pages", "one")]
    np.testing.assert_array_equal(*maps)
