"""The articles' settings as files: each builds its net, what is given counts more, and they run in each layout."""

import argparse
import json

import numpy as np
import pytest
import torch
from folders import make_folders
from layout_folders import cityscapes, voc
from PIL import Image

import fastseg
from fastseg.cli import main, train
from fastseg.io.checkpoint import load_checkpoint
from fastseg.models import UNetPlusPlus, create
from fastseg.models.weights import read_payload
from fastseg.training.dataset import read_spec
from fastseg.training.layouts import CITYSCAPES_SPEC, VOC
from fastseg.training.recipe import read_recipe, recipes


@pytest.fixture(autouse=True)
def _reference():
    with fastseg.reference():  # the interpreter would take minutes
        yield


def parsed(*arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args([str(part) for part in ("--data", "d", "-o", "o", *arguments)])


@pytest.mark.parametrize("name", recipes())
def test_each_is_a_training_that_can_begin(name):
    about, settings = read_recipe(name)
    assert all(about.values()) and ("iterations" in settings) != ("epochs" in settings)
    args = parsed("--recipe", name)
    for key, value in settings.items():
        if key != "options":
            assert getattr(args, key) == value
    classes = {"voc": VOC, "cityscapes": CITYSCAPES_SPEC}.get(args.layout)
    count = len((classes or read_spec(args.dataset)).classes) if classes or args.dataset else 2
    with torch.device("meta"):
        assert type(create(args.model, count, **dict(args.option))) is type(create(args.model, count))


def test_the_papers_numbers():
    """Chen et al.: crop 513, batch 16, 30,000 iterations of poly from 0.007; on Cityscapes 769 and 90,000."""
    args = parsed("--recipe", "voc-deeplabv3plus")
    assert (args.crop, args.batch, args.iterations, args.schedule, args.lr) == ([513, 513], 16, 30000, "poly", 0.007)
    assert (args.scale, args.momentum, args.train_split) == ([0.5, 2.0], 0.9, "trainaug")
    city = parsed("--recipe", "cityscapes-deeplabv3plus")
    assert (city.crop, city.iterations, city.layout) == ([769, 769], 90000, "cityscapes")
    segnet = parsed("--recipe", "camvid-segnet")
    assert (segnet.lr, segnet.batch, segnet.iterations, segnet.class_weights) == (0.001, 4, 40000, "median-frequency")
    assert read_spec(segnet.dataset).ignore_index == 11 and len(read_spec(segnet.dataset).classes) == 11


def test_what_is_given_counts_wherever_it_stands():
    """Even where it is the command's own default."""
    for arguments in (("--lr", 0.1, "--recipe", "voc-fcn8s"), ("--recipe=voc-fcn8s", "--lr", 0.1)):
        args = parsed(*arguments, "--option", "width=0.5", "--epochs", 3)
        assert args.lr == 0.1 and args.batch == 20 and args.iterations is None and args.epochs == 3
        assert dict(args.option) == {"backbone": "vgg16", "stride": 8, "at_once": True, "width": 0.5}
    assert parsed("--model", "unet").lr == 0.1  # nothing stays of an earlier call
    with pytest.raises(SystemExit):
        parsed("--recipe", "voc-nothing")


def run(*arguments) -> int:
    return main([str(part) for part in ("train", *arguments, "--device", "cpu")])


def test_runs_on_voc(tmp_path, capsys):
    data, small = voc(tmp_path / "voc"), ("--crop", 16, 16, "--batch", 3, "--iterations", 2)
    narrow = [part for option in ("width=0.05", "backbone=resnet18") for part in ("--option", option)]
    assert run("--data", data, "--recipe", "voc-fcn8s", *narrow, "--option", "at_once=false", *small,
               "-o", tmp_path / "run") == 0  # fmt: skip
    err = capsys.readouterr().err
    assert "voc-fcn8s: after Shelhamer" in err and "nobody has run it at full size" in err
    assert [row["step"] for row in json.loads((tmp_path / "run/curves.json").read_text())] == [1, 2]
    assert load_checkpoint(tmp_path / "run/best.pt")[1] == list(VOC.classes)
    scored = main([str(part) for part in ("evaluate", "--layout", "voc", "--data", data, "--split", "val", "--weights",
                   tmp_path / "run/best.pt", "-o", tmp_path / "scores", "--device", "cpu")])  # fmt: skip
    assert scored == 0 and "tvmonitor" in capsys.readouterr().out


def test_runs_on_cityscapes(tmp_path):
    data = cityscapes(tmp_path / "cityscapes", "labelIds")
    small = ("--option", "width=0.1", "--option", "backbone=mobilenet_v2", "--option", "decoder_channels=16",
             "--option", "preset=bubbliiiing", "--crop", 16, 16, "--batch", 2, "--epochs", 1)  # fmt: skip
    assert run("--data", data, "--recipe", "cityscapes-deeplabv3plus", *small, "-o", tmp_path / "run") == 0
    assert load_checkpoint(tmp_path / "run/last.pt")[1] == list(CITYSCAPES_SPEC.classes)


SMALL = ("--batch", 4, "--lr", 0.05)


def losses(output) -> list[float]:
    return [row["loss"] for row in json.loads((output / "curves.json").read_text())]


def test_deep_supervision_of_unetplusplus(tmp_path, monkeypatch):
    """Constant takes the mean; fading begins with equal weights and leaves the last head in the end."""
    data, seen = make_folders(tmp_path / "data"), []
    base = ("--data", data, "--model", "unetplusplus", "--option", "widths=[4,4,8]", "--option", "norm=true", *SMALL)
    original = UNetPlusPlus.loss

    def spy(self, x, target, weights=None, **more):
        seen.append(weights)
        return original(self, x, target, weights, **more)

    monkeypatch.setattr(UNetPlusPlus, "loss", spy)
    assert run(*base, "--epochs", 2, "--deep-supervision", "fading", "-o", tmp_path / "fading") == 0
    assert seen == [[1 - step / 4, 1.0] for step in range(4)]  # two steps an epoch
    assert run(*base, "--epochs", 2, "--deep-supervision", "constant", "-o", tmp_path / "constant") == 0
    assert seen[4:] == [None] * 4
    model, _ = load_checkpoint(tmp_path / "fading/best.pt")
    assert model.deep_supervision and losses(tmp_path / "fading") != losses(tmp_path / "constant")


def test_heads_of_another_net_are_trained_resumed_and_left_out(tmp_path, capsys):
    data = make_folders(tmp_path / "data")
    net = ("--model", "unet", "--option", "padding=same", "--option", "norm=true", "--option", "widths=[4,4,8]")
    base = ("--data", data, *net, *SMALL, "--epochs", 2, "--supervise", 1, "--supervise", 2)
    assert run(*base, "--deep-supervision", "fading", "-o", tmp_path / "whole") == 0
    assert run(*base, "--deep-supervision", "fading", "-o", tmp_path / "parts", "--max-seconds", 1e-9) == 0
    heads = read_payload(tmp_path / "parts/last.pt")["training"]["heads"]
    assert [tuple(value.shape) for value in heads.values()] == [(2, 4, 1, 1), (2,), (2, 8, 1, 1), (2,)]
    assert run(*base, "--deep-supervision", "fading", "-o", tmp_path / "parts", "--resume") == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    model, _ = load_checkpoint(tmp_path / "whole/last.pt")  # the net alone
    assert set(model.state_dict()) == set(load_checkpoint(tmp_path / "whole/best.pt")[0].state_dict())
    capsys.readouterr()
    assert run("--data", data, *net, *SMALL, "--deep-supervision", "fading", "-o", tmp_path / "none") == 1
    assert "unet has no auxiliary heads; give --supervise" in capsys.readouterr().err


def test_an_ignored_class(tmp_path):
    """``ignore_index`` may be a class: its pixels count for nothing, in loss, weights and scores."""
    data = make_folders(tmp_path / "data")
    (data / "dataset.json").write_text(json.dumps({"classes": ["ground", "sky", "void"], "ignore_index": 0}))
    for path in data.glob("*/labels/*.png"):  # the strip at the left becomes the third class
        Image.open(path).point(lambda value: min(value, 2)).save(path)
    net = ("--model", "segnet_basic", "--option", "channels=8", *SMALL, "--class-weights", "median-frequency")
    assert run("--data", data, *net, "--epochs", 2, "-o", tmp_path / "run") == 0
    first, second = losses(tmp_path / "run")
    assert second < first
    scored = main([str(part) for part in ("evaluate", "--data", data, "--weights", tmp_path / "run/best.pt",
                   "-o", tmp_path / "scores", "--device", "cpu")])  # fmt: skip
    scores = json.loads((tmp_path / "scores/scores.json").read_text())
    labels = [np.asarray(Image.open(path)) for path in (data / "test/labels").iterdir()]
    sky, void = (sum(int((label == value).sum()) for label in labels) for value in (1, 2))
    assert scored == 0 and [row["pixels"] for row in scores["classes"]] == [0, sky, void]
