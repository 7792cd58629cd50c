"""The command line: results, exit codes, and one clear line for whatever a user can get wrong."""

import importlib.metadata
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastseg
from fastseg.cli import demo, doctor, main, predict
from fastseg.demo import latency as demo_latency
from fastseg.demo import training
from fastseg.inference.segment import segment
from fastseg.io import progress
from fastseg.io.checkpoint import load_checkpoint, save_checkpoint
from fastseg.io.images import palette, read_image
from fastseg.measure import comparison
from fastseg.models import create

OPTIONS = {"width": 0.1, "decoder_channels": 16}


@pytest.fixture(autouse=True)
def _reference():
    with fastseg.reference():  # the interpreter would take minutes
        yield


@pytest.fixture
def weights(tmp_path) -> Path:
    model = create("deeplabv3plus", 4, **OPTIONS)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(8, 3, 48, 48))  # with statistics of real maps, pixels differ in class
        model.cls_conv.bias.zero_()
    save_checkpoint(tmp_path / "weights.pt", model, "deeplabv3plus", OPTIONS, list("abcd"))
    return tmp_path / "weights.pt"


def _photo(path: Path, seed: int = 0, side: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side + 9, 3), np.uint8)).save(path)
    return path


def _complaints(capsys, command: str = "predict") -> list[str]:
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    return [line.strip() for line in lines if line.strip().startswith(f"fastseg {command}: ")]


def _predict(*arguments) -> int:
    return main(["predict", "--device", "cpu", *map(str, arguments)])


# predict


def test_predict_writes_class_map_and_overlay(tmp_path, weights, capsys):
    photo = _photo(tmp_path / "in" / "photo.png")
    assert _predict(photo, "--weights", weights, "--model", "deeplabv3plus", "-o", tmp_path / "out") == 0
    image = read_image(photo)
    want = segment(load_checkpoint(weights)[0], image[None])[0]
    assert len(np.unique(want)) > 1
    with Image.open(tmp_path / "out" / "photo_classes.png") as class_map:
        assert class_map.mode == "P"
        np.testing.assert_array_equal(np.asarray(class_map), want)
    overlay = read_image(tmp_path / "out" / "photo_overlay.png").astype(float)
    assert np.abs(overlay - (0.55 * image + 0.45 * palette(4)[want])).max() <= 1
    assert "1 of 1 images" in capsys.readouterr().out


def test_predict_without_overlay(tmp_path, weights):
    assert _predict(_photo(tmp_path / "a.png"), "--weights", weights, "--no-overlay", "-o", tmp_path / "out") == 0
    assert os.listdir(tmp_path / "out") == ["a_classes.png"]


def test_predict_does_the_good_images_of_a_bad_batch(tmp_path, weights, capsys):
    good = [_photo(tmp_path / "first.png"), _photo(tmp_path / "last.jpg")]
    truncated, text, bomb = tmp_path / "cut.png", tmp_path / "text.jpg", tmp_path / "bomb.png"
    truncated.write_bytes(good[0].read_bytes()[:900])
    text.write_text("no picture")
    Image.new("1", (12_000, 12_000)).save(bomb)
    assert 10_000 < bomb.stat().st_size < 50_000
    bad = [tmp_path / "missing.png", truncated, text, bomb]
    assert _predict(good[0], *bad, good[1], "--weights", weights, "-o", tmp_path / "out") == 1
    complaints = _complaints(capsys)
    assert len(complaints) == len(bad)
    for path, line in zip(bad, complaints, strict=True):
        assert line.startswith(f"fastseg predict: {path}: ")
    assert sorted(os.listdir(tmp_path / "out")) == [
        f"{stem}_{kind}.png" for stem in ("first", "last") for kind in ("classes", "overlay")
    ]


class _Exploit:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def _bad_weights(kind: str, weights: Path) -> Path:
    path = weights.with_name("bad.pt")
    match kind:
        case "text":
            path.write_text("not weights")
        case "truncated":
            path.write_bytes(weights.read_bytes()[:5000])
        case "pickle":
            path.write_bytes(pickle.dumps(_Exploit(weights.with_name("executed"))))
        case "other model":
            torch.save({"fc.weight": torch.zeros(10, 10)}, path)
        case "not finite":
            payload = torch.load(weights, weights_only=True)
            payload["state_dict"]["cls_conv.bias"][0] = float("nan")
            torch.save(payload, path)
    return path


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "pickle", "other model", "not finite"])
def test_predict_refuses_bad_weights(tmp_path, weights, capsys, kind):
    path = _bad_weights(kind, weights)
    photo = _photo(tmp_path / "a.png")
    assert _predict(photo, "--weights", path, "--model", "deeplabv3plus", "-o", tmp_path / "out") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastseg predict: ")
    assert str(path) in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "executed").exists()


def test_predict_into_a_folder_that_cannot_be(tmp_path, weights, capsys, monkeypatch):
    photo = _photo(tmp_path / "a.png")
    line = "fastseg predict: {}: cannot be made or written to ({}); choose another folder with -o\n"
    for folder, why in ((photo / "out", "Not a directory"), (photo, "File exists")):
        assert _predict(photo, "--weights", weights, "-o", folder) == 1
        assert capsys.readouterr().err == line.format(folder, why)
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert _predict(photo, "--weights", weights, "-o", tmp_path / "out") == 1
    assert capsys.readouterr().err == line.format(tmp_path / "out", "Permission denied")


def test_predict_says_that_the_weights_are_a_directory(tmp_path, capsys):
    assert _predict("a.png", "--weights", tmp_path, "-o", tmp_path / "out") == 1
    assert capsys.readouterr().err == f"fastseg predict: {tmp_path}: is a directory; name a file with weights\n"


def test_predict_leaves_nothing_half_written(tmp_path, weights, capsys, monkeypatch):
    def full(self, file, format):
        file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    photo = _photo(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "save", full)
    assert _predict(photo, "--weights", weights, "-o", tmp_path / "out") == 1
    assert "No space left" in _complaints(capsys)[0]
    assert os.listdir(tmp_path / "out") == []


def test_predict_survives_an_image_that_does_not_fit_in_memory(tmp_path, weights, capsys, monkeypatch):
    def small_memory(model, images, *plan, **options):
        if images.shape[1] > 50:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate ...")
        return segment(model, images)

    monkeypatch.setattr(predict, "segment", small_memory)
    large, small = _photo(tmp_path / "large.png", side=60), _photo(tmp_path / "small.png")
    assert _predict(large, small, "--weights", weights, "--no-overlay", "-o", tmp_path / "out") == 1
    assert _complaints(capsys) == [f"fastseg predict: {large}: CUDA out of memory."]
    assert os.listdir(tmp_path / "out") == ["small_classes.png"]


def test_predict_keeps_results_of_equal_names_apart(tmp_path, weights):
    photos = [
        _photo(tmp_path / name, seed, 20) for seed, name in enumerate(["x/p.png", "y/p.png", "y/p-2.png", "z/p.jpg"])
    ]
    assert _predict(*photos, "--weights", weights, "--no-overlay", "-o", tmp_path / "out") == 0
    assert sorted(os.listdir(tmp_path / "out")) == [f"p{end}_classes.png" for end in ("-2", "-3", "-4", "")]
    model, _ = load_checkpoint(weights)
    for photo, stem in zip(photos, ("p", "p-3", "p-2", "p-4"), strict=True):
        with Image.open(tmp_path / "out" / f"{stem}_classes.png") as image:
            np.testing.assert_array_equal(np.asarray(image), segment(model, read_image(photo)[None])[0])


def test_predict_does_not_overwrite_its_inputs(tmp_path, weights, capsys):
    photo, other = _photo(tmp_path / "a.png"), _photo(tmp_path / "a_classes.png", 1)
    before = other.read_bytes()
    assert _predict(photo, other, "--weights", weights, "--no-overlay", "-o", tmp_path) == 1
    assert "overwrite" in _complaints(capsys)[0]
    assert other.read_bytes() == before


# doctor


def test_doctor_reports(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    version = importlib.metadata.version("torch")  # wheels of PyPI leave out the build, which `torch.__version__` names
    assert f"torch   {version} (supported: 2.11 to 2.15)" in out
    assert "inside fastseg.reference()" in out  # the reason is the real one
    not_ops = {"BatchNormArgs", "PoolIndices", "bilinear_kernel"}
    of_parts = {"aspp", "upsample_loss", "upsample_confusion"}  # these say what they are
    of_torchs_own = {"compose_pointwise", "upsample_threshold", "upsample_topk"}
    for name in {*fastseg.ops.__all__, "upsample_loss_sums"} - not_ops - of_parts - of_torchs_own:
        assert re.search(rf"^  {name} ", out, re.MULTILINE), name
    assert "0 problems found" in out


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("2.10.1", "2.10.1 OUTSIDE THE RANGE (supported"),
        ("2.11.0", "2.11.0 (supported"),
        ("2.15.3+cu130", "2.15.3+cu130 (supported"),
        ("2.16.0", "2.16.0 OUTSIDE THE RANGE (supported"),
    ],
)
def test_doctor_knows_the_supported_range(monkeypatch, capsys, version, words):
    known, outside = importlib.metadata.version, "OUTSIDE" in words
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "torch" else known(name))
    monkeypatch.setattr(doctor, "probes", lambda: [])
    assert main(["doctor"]) == int(outside)
    out = capsys.readouterr().out
    assert f"  torch   {words}" in out
    assert (f"PROBLEM: torch {words}" in out) == outside


@pytest.mark.parametrize(("triton", "numpy", "said"), [("3.6.0", "2.5.1", True), ("3.6.0", "2.4.6", False),
                                                    ("3.7.1", "2.5.1", False)])  # fmt: skip
def test_doctor_knows_which_numpy_the_interpreter_takes(monkeypatch, triton, numpy, said):
    monkeypatch.setattr(importlib.metadata, "version", {"triton": triton, "numpy": numpy}.get)
    assert ("numpy<2.5" in doctor.interpreter_line()) == said


def test_doctor_finds_the_other_fastseg(monkeypatch, capsys):
    owners = {"fastseg": ["fastseg", "fastseg_kernels", "fastseg-kernels"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    assert doctor.clashing_distributions() == ["fastseg"]
    assert main(["doctor"]) == 1
    assert "PROBLEM: fastseg also installs the package `fastseg`" in capsys.readouterr().out


def test_doctor_goes_on_when_an_op_fails(monkeypatch, capsys):
    def broken():
        raise RuntimeError("ptxas died\nof something")

    case = comparison.Case("some_op", "", broken, broken)
    monkeypatch.setattr(doctor, "op_cases", lambda *args: [case])
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "some_op on cpu, torch.float32: RuntimeError: ptxas died\n" in out


WITHOUT_TRITON = """
import importlib.metadata, importlib.util, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
find_spec, version = importlib.util.find_spec, importlib.metadata.version
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find_spec(name, package)
def hidden_version(name):
    if name == "triton":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = hidden_version
from fastseg.cli import main
sys.exit(main(["doctor"]))
"""


def test_doctor_works_without_triton(tmp_path):
    run = subprocess.run([sys.executable, "-P", "-c", WITHOUT_TRITON], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "triton  not installed" in run.stdout
    assert "none: Triton is not installed" in run.stdout
    assert re.search(r"separable_conv2d .* torch +Triton is not installed", run.stdout)


# demo


@pytest.fixture
def small_demo(monkeypatch):
    """The demo's steps on tiny mosaics, with a short latency table."""
    monkeypatch.setattr(training, "SIDE", 48)
    monkeypatch.setattr(training, "BATCH", 2)
    monkeypatch.setattr(demo, "TEST_MOSAICS", 8)
    monkeypatch.setitem(training.OPTIONS, "deeplabv3plus", OPTIONS)
    monkeypatch.setattr(demo_latency, "TRAINED_SIDE", 32)
    monkeypatch.setattr(demo_latency, "FULL_SIDE", 32)
    op_cases, compare = comparison.op_cases, comparison.compare
    monkeypatch.setattr(comparison, "op_cases", lambda device, dtype: op_cases(device, dtype, 32)[:1])
    monkeypatch.setattr(comparison, "compare", lambda case, seconds: compare(case, seconds=0))
    with fastseg.reference():  # interpreted kernels would take minutes
        yield


def test_demo_trains_scores_shows_and_times(tmp_path, small_demo, capsys):
    folder = tmp_path / "result"
    assert main(["demo", "--steps", "2", "--device", "cpu", "-o", str(folder)]) == 0
    captured = capsys.readouterr()
    for words in (
        "mIoU",
        "mPA",
        "precision",
        "recall",
        "CPU",
        "no kernel runs",
        "separable_conv2d",
        "full size, Runner",
    ):
        assert words in captured.out
    assert "epoch 1/1" in captured.err
    assert sorted(os.listdir(folder)) == ["mosaic.png", "mosaics.png", "weights.pt"]
    command = next(line for line in captured.out.splitlines() if "fastseg predict" in line).split()[1:]
    assert main([*command, "--device", "cpu"]) == 0
    assert (folder / "mosaic_classes.png").is_file()


@pytest.mark.parametrize("name", sorted(set(training.OPTIONS) - {"deeplabv3plus"}))
def test_demo_of_the_other_models(name, tmp_path, small_demo, monkeypatch, capsys):
    """Their options make models that train, and whose weights `predict` reads; the table is as above."""
    monkeypatch.setattr(demo, "latency", lambda *args: "")
    assert main(f"demo --model {name} --loss ce+dice --steps 2 --device cpu -o {tmp_path}".split()) == 0
    assert re.match(rf"{name}, loss ce\+dice, on (?s:.*)mIoU", capsys.readouterr().out)
    assert _predict(tmp_path / "mosaic.png", "--weights", tmp_path / "weights.pt", "-o", tmp_path / "out") == 0


def test_demo_says_when_training_diverges(tmp_path, small_demo, monkeypatch, capsys):
    monkeypatch.setattr(training, "LEARNING_RATE", 1e30)
    assert main(["demo", "--steps", "3", "--device", "cpu", "-o", str(tmp_path)]) == 1
    line = _complaints(capsys, "demo")[0]
    assert re.fullmatch(r"fastseg demo: training diverged: .* not finite after step 3; try another --seed", line) or (
        re.fullmatch(r"fastseg demo: training diverged: the loss is \w+ at step \d; try another --seed", line)
    )
    assert os.listdir(tmp_path) == []


# all commands


def test_progress_without_tqdm(monkeypatch, capsys):
    monkeypatch.setattr(progress, "tqdm", None)
    bar = progress.progress(range(20), "train")
    for item in bar:
        bar.set_postfix_str(f"loss {item}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "train: 20/20 loss 19"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["demo", "--steps", "0"], "--steps"),
        (["demo", "--steps", "many"], "invalid integer value: 'many'"),
        (["tune", "--classes", "0"], "--classes: 0 is less than 1"),
        (["tune", "--batch", "1", "0"], "--batch: 0 is less than 1"),
        (["tune", "--size", "512", "-1"], "--size: -1 is less than 1"),
        (["tune", "--budget", "0"], "--budget: 0 is not above 0"),
        (["tune", "--budget", "nan"], "--budget: nan is not above 0"),
        (["tune", "--budget", "long"], "invalid number value: 'long'"),
        (["demo", "--device", "cuda:99"], "no device 'cuda:99' here"),
        (["demo", "--device", "toaster"], "no device 'toaster' here"),
        (["predict", "a.png"], "-o/--output"),
        (["predict", "a.png", "--weights", "w", "-o", "o", "--model", "alexnet"], "alexnet"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastseg")
    assert words in line


def test_python_m_fastseg(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "fastseg", "predict", "a.png", "--weights", "no.pt", "-o", "out"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr == "fastseg predict: no.pt: no file with weights is there\n"
