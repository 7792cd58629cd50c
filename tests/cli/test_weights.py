"""``predict`` and ``evaluate`` on weights of others: --option, --weights-key, and one line for what was left out."""

import numpy as np
import pytest
import torch
from folders import make_folders
from PIL import Image

import fastseg
from fastseg.cli import main
from fastseg.inference.segment import segment
from fastseg.io.images import read_image
from fastseg.models import create

OPTIONS = {"backbone": "resnet18", "width": 0.05, "channels": 8}
ON_THE_LINE = [part for name, value in OPTIONS.items() for part in ("--option", f"{name}={value}")]


@pytest.fixture(autouse=True)
def _reference():
    with fastseg.reference():
        yield


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 41, 3), np.uint8)).save(path)
    return path


def _predict(photo, weights, *arguments) -> int:
    base = ["predict", photo, "--weights", weights, "-o", photo.parent / "out", "--device", "cpu", "--model"]
    return main([str(part) for part in (*base, "deeplabv3", *arguments)])


def _published(path, classes: int = 4, **wrapped):
    """A file with an auxiliary head, as torchvision publishes them, within wrappers."""
    model = create("deeplabv3", classes, aux=True, **OPTIONS).eval()
    torch.save({**wrapped, "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}}, path)
    return model


def test_predict(tmp_path, photo, capsys):
    model = _published(tmp_path / "w.ckpt", epoch=3)
    assert _predict(photo, tmp_path / "w.ckpt", *ON_THE_LINE) == 0
    with Image.open(tmp_path / "out" / "a_classes.png") as image:
        np.testing.assert_array_equal(np.asarray(image), segment(model, read_image(photo)[None])[0])
    out, err = capsys.readouterr()
    assert "1 of 1 images" in out
    said = [line for line in err.splitlines() if "left out" in line]
    assert len(said) == 1 and said[0].startswith("fastseg predict: ")
    assert said[0].endswith("w.ckpt: the auxiliary head is left out; a model built with aux=True takes it")
    assert "UserWarning" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "does not fit DeepLabV3"),
        (["--option", "backbone=resnet18"], "does not fit DeepLabV3"),
        ([*ON_THE_LINE, "--option", "backbone=vgg16"], "no backbone 'vgg16'"),
        ([*ON_THE_LINE, "--option", "depth=18"], "has no option depth"),
        ([*ON_THE_LINE, "--option", "width=wide"], "no model 'deeplabv3' with options"),
        ([*ON_THE_LINE, "--option", "channels=null"], "no model 'deeplabv3' with options"),
        ([*ON_THE_LINE, "--weights-key", "ema"], "none of what fits is under 'ema'; what fits: 'state_dict.model'"),
    ],
)
def test_predict_says_in_a_line_what_is_wrong(tmp_path, photo, capsys, arguments, words):
    _published(tmp_path / "w.ckpt")
    assert _predict(photo, tmp_path / "w.ckpt", *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastseg predict: ") and words in line
    assert not (tmp_path / "out").exists()


def test_an_option_without_a_value_is_wrong_usage(tmp_path, photo, capsys):
    with pytest.raises(SystemExit):
        _predict(photo, tmp_path / "w.ckpt", "--option", "backbone")
    assert "'backbone' is not NAME=VALUE" in capsys.readouterr().err


def test_ambiguous_weights_and_the_key_that_chooses(tmp_path, photo, capsys):
    ema = create("deeplabv3", 4, **OPTIONS)
    averaged = {"n_averaged": torch.tensor(2), **{f"module.{k}": v for k, v in ema.state_dict().items()}}
    _published(tmp_path / "w.ckpt", model_ema=averaged)
    assert _predict(photo, tmp_path / "w.ckpt", *ON_THE_LINE) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 sets of weights that fit: 'model_ema.module', 'state_dict.model'; choose one" in line
    assert _predict(photo, tmp_path / "w.ckpt", *ON_THE_LINE, "--weights-key", "model_ema") == 0
    with Image.open(tmp_path / "out" / "a_classes.png") as image:
        np.testing.assert_array_equal(np.asarray(image), segment(ema.eval(), read_image(photo)[None])[0])


def test_evaluate(tmp_path, capsys):
    folder = make_folders(tmp_path / "data")
    _published(tmp_path / "w.ckpt", classes=2)
    arguments = ["evaluate", "--data", folder, "--weights", tmp_path / "w.ckpt", "--model", "deeplabv3", *ON_THE_LINE,
                 "-o", tmp_path / "scores", "--device", "cpu", "--worst", 0]  # fmt: skip
    assert main([str(part) for part in arguments]) == 0
    assert (tmp_path / "scores" / "scores.json").stat().st_size > 0
    assert "fastseg evaluate: load_weights: " in capsys.readouterr().err


def test_what_is_left_out_cannot_steer_the_terminal(tmp_path, photo, capsys):
    model = create("deeplabv3", 4, **OPTIONS)
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": {**state, "loss.\x1b[31mred": torch.ones(2)}}, tmp_path / "w.ckpt")
    assert _predict(photo, tmp_path / "w.ckpt", *ON_THE_LINE) == 0
    err = capsys.readouterr().err
    assert "\x1b" not in err and r"loss.\x1b[31mred beside 'model.' left out" in err
