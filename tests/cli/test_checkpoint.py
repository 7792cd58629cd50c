"""``fastseg checkpoint``: another code's file into ours, and back under its own names, bit for bit."""

import pytest
import torch

import fastseg
from fastseg.cli import main
from fastseg.io.checkpoint import load_checkpoint
from fastseg.models import create

OPTIONS = {"backbone": "resnet18", "width": 0.05, "channels": 8}


@pytest.fixture
def published(tmp_path):
    """A file of torchvision's names within Lightning's nesting, in half precision, with entries of its own."""
    model = create("deeplabv3", 4, aux=True, **OPTIONS).eval()
    half = lambda value: value.half() if value.is_floating_point() else value
    state = {f"model.{key}": half(value) for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "hyper_parameters": {"lr": 0.1}}, tmp_path / "w.ckpt")
    return tmp_path / "w.ckpt"


def checkpoint(*arguments) -> int:
    return main(["checkpoint", *map(str, arguments)])


def test_there_and_back(published, tmp_path, capsys):
    ours, back = tmp_path / "ours.pt", tmp_path / "back.ckpt"
    options = [part for name, value in OPTIONS.items() for part in ("--option", f"{name}={value}")]
    assert checkpoint("--weights", published, "--model", "deeplabv3", *options, "--option", "aux=true", "-o", ours) == 0
    assert capsys.readouterr().out.startswith(f"{ours}: deeplabv3 of 4 classes, ")
    model, classes = load_checkpoint(ours)
    assert classes == ["0", "1", "2", "3"] and model.aux_classifier is not None

    assert checkpoint("--weights", ours, "--like", published, "-o", back) == 0
    want, got = torch.load(published, weights_only=True), torch.load(back, weights_only=True)
    assert got.keys() == want.keys() and (got["epoch"], got["hyper_parameters"]) == (3, {"lr": 0.1})
    assert got["state_dict"].keys() == want["state_dict"].keys()
    for key, value in want["state_dict"].items():
        assert got["state_dict"][key].dtype == value.dtype and torch.equal(got["state_dict"][key], value), key


def test_a_folder_of_save_pretrained(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    options = {"decoder_channels": 8, "width": 0.05, "encoder_options": {"heads": [1, 1, 1, 1]}}
    model = create("segformer", 3, **options).eval()
    (tmp_path / "hf").mkdir()
    safetensors.save_file(model.state_dict(), tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text("{}")
    line = [
        "--option",
        "decoder_channels=8",
        "--option",
        "width=0.05",
        "--option",
        'encoder_options={"heads":[1,1,1,1]}',
    ]
    assert checkpoint("--weights", tmp_path / "hf", "--model", "segformer", *line, "-o", tmp_path / "ours.pt") == 0
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), fastseg.reference():
        assert torch.equal(load_checkpoint(tmp_path / "ours.pt")[0](x), model(x))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "x.pt"], "no weights to convert: give --weights FILE"),
        (["--weights", "absent.pt", "-o", "x.pt"], "absent.pt: no file with weights is there"),
        (["--weights", "w.ckpt", "-o", "x.pt"], "does not say which model it is of; name it with --model"),
        (["--weights", "w.ckpt", "--model", "unet", "-o", "x.pt"], "not weights of 'unet'"),
        (["--weights", "w.ckpt", "--model", "deeplabv3", "-o", "."], "is a directory; name the file to write"),
    ],
)
def test_one_line(arguments, words, published, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint(*arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("fastseg checkpoint: ") and words in err and err.count("\n") == 1
    assert not (tmp_path / "x.pt").exists()
