"""Exported files give torch's answers in the runtimes of others, and say what they hold."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor.config
from torch import nn
from torch.nn import functional as F

import fastseg
from fastseg.cli import main
from fastseg.exporting import FileModel, Preprocessing, export
from fastseg.inference.segment import segment
from fastseg.io.images import normalised

X = torch.randn(1, 3, 24, 32, generator=torch.Generator().manual_seed(1))
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 17, 22, 3), np.uint8)


class Net(nn.Module):
    """Logits of half size, resized bilinearly."""

    def __init__(self, classes: int = 5, stride: int = 2):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, classes, 3, stride, 1)
        self.drop = nn.Dropout2d(0.5)

    def forward(self, x):
        return F.interpolate(self.drop(self.conv(x)), x.shape[2:], mode="bilinear")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of each output, with pictures as input for "confidence"; the net was in training mode."""
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module)
    folder, net = tmp_path_factory.mktemp("exported"), Net()
    export(net, folder / "logits.onnx", example=X)
    export(net, folder / "classes.onnx", example=X, output="classes", classes=list("abcde"))
    seen = Preprocessing(size=(16, 24), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), apply=True)
    export(net, folder / "confidence.onnx", example=X, output="confidence", preprocessing=seen)
    assert net.training and net.drop.training
    return folder


def _session(path):
    return pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("shape", [(1, 3, 24, 32), (3, 3, 19, 26)])
def test_logits_and_classes_in_onnxruntime(folder, shape):
    x, net = torch.randn(shape), Net().eval()
    with torch.no_grad():
        want = net(x)
    (logits,) = _session(folder / "logits.onnx").run(["logits"], {"image": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), want)
    (classes,) = _session(folder / "classes.onnx").run(["classes"], {"image": x.numpy()})
    assert classes.dtype == np.uint8
    np.testing.assert_array_equal(classes, want.argmax(1).numpy())


def _confident(pixels):
    """What "confidence.onnx" is to give, in torch's own lines."""
    x = F.interpolate(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), (16, 24), mode="bilinear")
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        logits = F.interpolate(Net().eval()((x / 255 - mean) / std), pixels.shape[1:3], mode="bilinear")
    value, classes = logits.softmax(1).max(1)
    return classes.numpy(), value.numpy()


def test_pictures_in_onnxruntime(folder):
    classes, values = _confident(PIXELS)
    got, sure = _session(folder / "confidence.onnx").run(["classes", "confidence"], {"image": PIXELS})
    assert got.dtype == np.uint8 and (got != classes).mean() < 5e-3
    np.testing.assert_allclose(sure, values, atol=1e-4)


@pytest.mark.parametrize("name", ["classes", "confidence"])
def test_in_openvino(folder, name):
    openvino = pytest.importorskip("openvino")
    given = PIXELS if name == "confidence" else normalised(torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float()).numpy()
    network = openvino.Core().compile_model(folder / f"{name}.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = network([given])
    if name == "confidence":
        want, values = _confident(PIXELS)
        np.testing.assert_allclose(got["confidence"], values, atol=1e-4)
    else:
        with torch.no_grad():
            want = Net().eval()(torch.from_numpy(given)).argmax(1).numpy()
    assert got["classes"].dtype == np.uint8 and (got["classes"] != want).mean() < 5e-3


def test_the_file_says_what_it_holds(folder):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(folder / "confidence.onnx")
    assert {one.domain for one in model.opset_import if one.domain} <= {"pkg.onnxscript.torch_lib.common"}
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    facts = {one.key: json.loads(one.value) for one in model.metadata_props}
    assert facts == {
        "producer": "fastseg", "output": "confidence", "classes": ["0", "1", "2", "3", "4"],
        "free": ["batch", "height", "width"],
        "preprocessing": {"size": [16, 24], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "apply": True},
    }  # fmt: skip
    shape = [one.dim_param or one.dim_value for one in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", "height", "width", 3]
    facts = {one.key: json.loads(one.value) for one in onnx.load(folder / "classes.onnx").metadata_props}
    assert facts["classes"] == list("abcde") and facts["preprocessing"] is None


def test_a_file_as_a_model(folder):
    """Behind fastseg's normalisation: with none recorded, and with the file's own in its place."""
    pytest.importorskip("onnxruntime")
    net = Net().eval()
    for name in ("logits", "classes"):
        model = FileModel(folder / f"{name}.onnx")
        np.testing.assert_array_equal(segment(model, PIXELS), segment(net, PIXELS))
    assert model.classes == list("abcde")
    with pytest.raises(ValueError, match=r"classes.onnx: gives classes alone; export it with output='confidence'"):
        segment(model, PIXELS, confidence=True)
    with pytest.raises(ValueError, match=r"classes.onnx: gives classes, no logits"):
        model(X)
    classes, values = _confident(PIXELS)
    got, sure = segment(FileModel(folder / "confidence.onnx"), PIXELS, confidence=True)
    assert (got != classes).mean() < 5e-3
    np.testing.assert_allclose(sure, values, atol=1e-4)


def test_a_package(tmp_path, monkeypatch):
    """One compilation: the command writes it, a process without Python's model runs it.

    Without vectors, whose choice takes Inductor most of the time.
    """
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", False)
    (tmp_path / "toy.py").write_text(f"import sys\nsys.path.insert(0, {str(__file__.rpartition('/')[0])!r})\n")
    x = torch.randn(3, 3, 19, 26)
    net = Net(classes=300)
    done = export(net, tmp_path / "m.pt2", example=X, output="classes", preprocessing=Preprocessing())
    assert done.free == ("batch", "height", "width") and "AOTInductor's answers lie within" in done.checked
    package = torch._inductor.aoti_load_package(str(tmp_path / "m.pt2"))
    got = package(x)
    with torch.no_grad():
        want = net.eval()(x).argmax(1)
    assert got.dtype == torch.int32 and (got != want).double().mean() < 5e-3
    facts = package.loader.get_metadata()
    assert json.loads(facts["output"]) == "classes" and len(json.loads(facts["classes"])) == 300
    np.testing.assert_array_equal(segment(FileModel(tmp_path / "m.pt2"), PIXELS), segment(net, PIXELS))


class Fixed(nn.Module):
    """Takes one size alone."""

    def forward(self, x):
        return x.reshape(x.shape[0], 3, 24, 32) * 2


class Foreign(nn.Module):
    """Holds an operator that ONNX has not."""

    def forward(self, x):
        return torch.special.bessel_j0(x)


class Labels(nn.Module):
    def forward(self, x):
        return x.argmax(1)


def test_a_model_of_one_size(tmp_path):
    pytest.importorskip("onnxscript")
    done = export(Fixed(), tmp_path / "m.onnx", example=X)
    assert done.free == ("batch",) and done.why.startswith("at another height the model fails: shape")
    assert "free sizes: batch (at another height the model fails: " in str(done)


@pytest.mark.parametrize(
    ("model", "name", "options", "kind", "words"),
    [
        (Net(), "m.engine", {}, ValueError, "m.engine ends in '.engine'; use .onnx or .pt2"),
        (Net(), "m", {}, ValueError, "ends in 'no suffix'"),
        (Net(), "m.onnx", {"output": "masks"}, ValueError, "output is 'masks'; use one of logits, classes, confidence"),
        (Net(), "m.onnx", {"example": None}, TypeError, "example is a NoneType; give a tensor"),
        (
            Net(),
            "m.onnx",
            {"example": X[0]},
            ValueError,
            r"example is \(3, 24, 32\) torch.float32; give \(N, C, H, W\)",
        ),
        (Net(), "m.onnx", {"classes": ["a"]}, ValueError, "1 names of classes, the model has 5"),
        (Net(), "m.onnx", {"preprocessing": Preprocessing(mean=(0,), std=(1,))}, ValueError, "example has 3 channels"),
        (Labels(), "m.onnx", {}, TypeError, r"Labels returns no logits \(N, classes, H, W\)"),
        (Foreign(), "m.onnx", {}, ValueError, "ONNX has no operator for prims.bessel_j0"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, model, name, options, kind, words):
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module)
    (tmp_path / name).write_text("old")
    with pytest.raises(kind, match=words) as caught:
        fastseg.export(model, tmp_path / name, **{"example": X} | options)
    assert str(caught.value).startswith("export: ") and "\n" not in str(caught.value)
    assert (tmp_path / name).read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "m.onnx").mkdir()
    unwritable = [Path("/proc/m.onnx")] if Path("/proc").is_dir() else []  # whatever its permissions say
    for path in (tmp_path / "file" / "m.onnx", tmp_path / "m.onnx", *unwritable):
        with pytest.raises(OSError, match=r"cannot be made or written to|is a folder"):
            export(Net(), path, example=X)


def test_an_absent_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnx and onnxscript not installed: pip install fastseg-kernels\[onnx\]"):
        export(Net(), tmp_path / "m.onnx", example=X)


def test_wrong_answers_are_not_written(tmp_path, monkeypatch):
    """The file is compared with torch: weights that change after the trace must show."""
    pytest.importorskip("onnxruntime")
    module, net = sys.modules["fastseg.exporting.export"], Net()
    made = module.onnx_bytes

    def stale(*args):
        found = made(*args)
        net.conv.weight.data.neg_()
        return found

    monkeypatch.setattr(module, "onnx_bytes", stale)
    with pytest.raises(ValueError, match=r"the file's logits differ from torch's by .* nothing was written"):
        export(net, tmp_path / "m.onnx", example=X)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    (tmp_path / "toy.py").write_text("import torch\nnet = lambda: torch.nn.Conv2d(3, 2, 3, padding=1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    base = ["export", "--model", "toy:net", "--size", "24", "32", "--device", "cpu"]
    try:
        assert main([*base, "a/m.onnx", "--apply", "--mean", "0.5", "0.5", "0.5", "--std", "1", "1", "1"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("a/m.onnx: classes; free sizes: batch, height, width; onnxruntime's answers lie within ")
        assert main([*base, "m.bin"]) == 1
        assert capsys.readouterr().err == "fastseg export: export: m.bin ends in '.bin'; use .onnx or .pt2\n"
        assert main([*base, "m.onnx", "--mean", "0.5", "--std", "1"]) == 1
        assert capsys.readouterr().err.startswith(
            "fastseg export: export: Conv2d fails on the example (1, 1, 24, 32): "
        )
    finally:
        sys.modules.pop("toy", None)
    model = FileModel("a/m.onnx")
    assert model.preprocessing == Preprocessing(None, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0), True)
