"""``--model``: other libraries' names, folders, files and factories; each error is one line."""

import sys

import numpy as np
import pytest
import torch
from foreign import declare_operators, foreign
from PIL import Image
from torch import nn

from fastseg.cli import main
from fastseg.exporting import load_model
from fastseg.measure.paths import PATHS, Built

FACTORY = """
import torch

def net(classes=3, wrong=False):
    if wrong:
        raise KeyError("depth")
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, classes, 3, padding=1)

number = lambda: 3
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """``toy:net`` in the current folder."""
    (tmp_path / "toy.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("toy", None)


def test_a_factory(factory):
    model, classes = load_model("toy:net", classes=4)
    assert model.out_channels == 4 and classes == ["0", "1", "2", "3"] and not model.training
    torch.save(nn.Conv2d(3, 3, 3, padding=1).state_dict(), "w.pt")
    model, classes = load_model("toy:net", weights="w.pt")
    assert torch.equal(model.weight, torch.load("w.pt", weights_only=True)["weight"]) and len(classes) == 3


def test_names_of_ours():
    model, classes = load_model("fcn", classes=2, options={"backbone": "resnet18", "stride": 8})
    assert type(model).__name__ == "FCN" and classes == ["0", "1"] and not model.training


@pytest.mark.parametrize(
    ("source", "options", "kind", "words"),
    [
        ("nonsense", {}, ValueError, "no model 'nonsense'; give one of deconvnet, "),
        ("fcn", {"depth": 3}, ValueError, "fcn has no option depth"),
        ("toy:absent", {}, ValueError, "toy:absent: toy has no 'absent'"),
        ("toy:net", {"wrong": True}, ValueError, "toy:net: KeyError: 'depth'"),
        ("toy:number", {}, ValueError, "toy:number: gives a int, not a torch.nn.Module"),
        ("absent_package.module:net", {}, ImportError, "No module named 'absent_package'"),
        ("hf:nowhere", {}, ValueError, "hf:nowhere: nowhere: no folder with a config.json"),
        ("nowhere.onnx", {}, ValueError, "nowhere.onnx: no such file"),
        ("nowhere.pt2", {}, ValueError, "nowhere.pt2: no such file"),
        ("toy.onnx", {}, ValueError, "toy.onnx: onnxruntime cannot read it"),
        ("toy.pt2", {}, ValueError, "toy.pt2: no AOTInductor package"),
        ("toy.onnx", {"a": 1}, ValueError, "toy.onnx: has its own options"),
    ],
)
def test_errors(factory, source, options, kind, words):
    if source == "toy.onnx" and not options:
        pytest.importorskip("onnxruntime")
    if source == "hf:nowhere":
        foreign("transformers")
    for name in ("toy.onnx", "toy.pt2"):
        (factory / name).write_bytes(b"not a model")
    with pytest.raises(kind) as caught:
        load_model(source, options=options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["smp:Unet/resnet18", "torchvision:deeplabv3_resnet50", "hf:folder"])
def test_an_absent_library(monkeypatch, name):
    library = {"smp": "segmentation_models_pytorch", "torchvision": "torchvision", "hf": "transformers"}[
        name.split(":")[0]
    ]
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"{name}: {library}"):
        load_model(name)


def test_smp():
    foreign("segmentation_models_pytorch")
    model, classes = load_model("smp:fpn/resnet18", classes=4, options={"decoder_pyramid_channels": 16})
    assert type(model).__name__ == "FPN" and len(classes) == 4
    with pytest.raises(ValueError, match=r"no architecture 'Net'; there are .*Unet"):
        load_model("smp:Net/resnet18")


def test_torchvision():
    foreign("torchvision")
    model, classes = load_model("torchvision:lraspp_mobilenet_v3_large", classes=4)
    assert type(model).__name__ == "LRASPP" and len(classes) == 4
    with pytest.raises(ValueError, match=r"no segmentation model 'fcn'; there are .*fcn_resnet50"):
        load_model("torchvision:fcn")


def test_hugging_face(tmp_path):
    declare_operators()
    pytest.importorskip("transformers")
    from nets_of_libraries import hf_segformer

    model = hf_segformer().float()
    model.config.id2label = {0: "sky", 1: "road", 2: "car", 3: "tree", 4: "wall"}
    model.save_pretrained(tmp_path)
    got, classes = load_model(f"hf:{tmp_path}")
    assert classes == ["sky", "road", "car", "tree", "wall"] and not got.training
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(got(x).logits, model.eval()(x).logits)


def test_predict_with_a_factory(factory, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save("a.png")
    base = ["predict", "a.png", "-o", "out", "--device", "cpu", "--no-overlay"]
    assert main([*base, "--model", "toy:net"]) == 0
    with Image.open("out/a_classes.png") as image:
        assert image.size == (24, 20)
    assert main([*base, "--model", "fcn"]) == 1
    assert "fcn: give --weights FILE" in capsys.readouterr().err
    assert main([*base, "--model", "toy:net", "--option", "wrong=true"]) == 1
    assert capsys.readouterr().err == "fastseg predict: toy:net: KeyError: 'depth'\n"


def test_a_latency_study_goes_on(factory, capsys, monkeypatch):
    """A model that cannot be built, and a path that fails among its timed calls, are rows."""
    calls = iter(range(10**6))

    def late(model, x, dtype):
        return Built(lambda: 1 // 0 if next(calls) > 2 else None, counts=False)

    monkeypatch.setitem(PATHS, "late", late)
    monkeypatch.setattr("fastseg.cli.latency.roofs", lambda device, dtype: {"gflops": 1.0, "gbytes": 1.0})
    paths = ["--paths", "eager", "late", "--sizes", "8", "--repetitions", "3", "--device", "cpu"]
    assert main(["latency", "--models", "toy:absent", "toy:net", "--dtypes", "bf16", *paths]) == 0
    out = capsys.readouterr().out
    assert "toy:absent 1x8x8 bf16\n  eager           not measured: ValueError: toy:absent: toy has no 'absent'" in out
    rows = out[out.index("toy:net") :]
    assert "not measured: ZeroDivisionError" in rows and "images/s" in rows


def test_latency_takes_no_unknown_name(capsys):
    with pytest.raises(SystemExit):
        main(["latency", "--models", "nonsense"])
    assert "no model 'nonsense'; give one of" in capsys.readouterr().err
