"""``fastseg predict --tile``: the class map of the library's tiles, and one clear line for what cannot be."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastseg
from fastseg.cli import main
from fastseg.inference import overlap_tile
from fastseg.io.checkpoint import load_checkpoint, save_checkpoint
from fastseg.io.images import read_image, to_tensor
from fastseg.models import create

OPTIONS = {"width": 0.1, "decoder_channels": 16}


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    """Weights and a photograph of 90 x 70 pixels."""
    with fastseg.reference(), torch.no_grad():
        model = create("deeplabv3plus", 4, **OPTIONS)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        model(torch.randn(8, 3, 48, 48))  # with statistics of real maps, pixels differ in class
        model.cls_conv.bias.zero_()
        save_checkpoint(tmp_path / "weights.pt", model.eval(), "deeplabv3plus", OPTIONS, list("abcd"))
        pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photo.png")
        yield tmp_path / "weights.pt", tmp_path / "photo.png"


def _predict(files: tuple[Path, Path], *arguments) -> int:
    weights, photo = map(str, files)
    target = str(files[0].with_name("out"))
    return main(["predict", photo, "--weights", weights, "--device", "cpu", "-o", target, *map(str, arguments)])


@pytest.mark.parametrize("overlap", [(), ("--overlap", 10)])
def test_predict_in_tiles(files, tmp_path, capsys, overlap):
    assert _predict(files, "--tile", 48, "--tile-batch", 3, *overlap) == 0
    model, _ = load_checkpoint(files[0])
    image = to_tensor(read_image(files[1]))
    want = overlap_tile(model, image, tile=48, overlap=overlap[1] if overlap else None, argmax=True)
    with Image.open(tmp_path / "out" / "photo_classes.png") as written:
        got = np.asarray(written)
    assert (got != want[0].numpy()).mean() < 1e-3  # batches of three may round otherwise than tiles one by one
    assert len(np.unique(got)) > 1 and (got != model.predict(image)[0].numpy()).any()  # tiles differ from the whole
    assert sorted(os.listdir(tmp_path / "out")) == ["photo_classes.png", "photo_overlay.png"]
    assert "tiles: " in capsys.readouterr().err


def test_predict_with_the_valid_unet(files, tmp_path, capsys):
    """Whole, its map is smaller than the picture: one line names --tile; in tiles it is the picture's."""
    options = {"widths": [3, 4]}
    save_checkpoint(files[0], create("unet", 4, **options).eval(), "unet", options, list("abcd"))
    with Image.open(files[1]) as photo:
        photo.crop((0, 0, 68, 88)).save(files[1].with_name("even.png"))
    files = files[0], files[1].with_name("even.png")
    assert _predict(files) == 1
    assert "use --tile" in capsys.readouterr().err
    assert not os.listdir(tmp_path / "out")
    assert _predict(files, "--tile", 44) == 0
    with Image.open(tmp_path / "out" / "even_classes.png") as written:
        assert written.size == (68, 88)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--tile", 9), "the model cannot take tiles of 9 pixels (margin 0, phase 16); the nearest valid sizes: 16"),
        (("--tile", 48, "--overlap", 40), "tiles of 48 pixels with margin 0 and phase 16 overlap by at most 32"),
        (("--tile", 48, "--overlap", -1), "overlap is -1"),
        (("--overlap", 8), "--overlap is of tiles; give --tile too"),
    ],
)
def test_predict_refuses_tiles_before_anything_is_written(files, tmp_path, capsys, arguments, line):
    assert _predict(files, *arguments) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("fastseg predict: ") and line in error
    assert not (tmp_path / "out").exists()


def test_predict_leaves_nothing_when_a_tile_fails(files, tmp_path, capsys, monkeypatch):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried ...")

    monkeypatch.setattr("fastseg.inference.stitching.Stitcher.add", fails)
    assert _predict(files, "--tile", 48) == 1
    assert f"fastseg predict: {files[1]}: CUDA out of memory." in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == []
