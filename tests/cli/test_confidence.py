"""``fastseg predict --confidence``: a grey picture of how sure each pixel is."""

import numpy as np
import torch
from PIL import Image

import fastseg
from fastseg.cli import main
from fastseg.io.checkpoint import load_checkpoint, save_checkpoint
from fastseg.io.images import read_image, to_tensor
from fastseg.models import create


def test_predict_writes_how_sure_each_pixel_is(tmp_path, capsys):
    photo, weights = tmp_path / "photo.png", tmp_path / "weights.pt"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)).save(photo)
    options = {"padding": "same", "widths": (4, 8)}
    save_checkpoint(weights, create("unet", 3, **options), "unet", options, list("abc"))
    command = ["predict", photo, "--device", "cpu", "--weights", weights, "--no-overlay", "--confidence", "-o",
               tmp_path / "out"]  # fmt: skip
    with fastseg.reference():  # the interpreter would take minutes
        assert main([*map(str, command)]) == 0
        with torch.no_grad():
            sure = load_checkpoint(weights)[0](to_tensor(read_image(photo)[None])).softmax(1).amax(1)[0].numpy()
        assert main([*map(str, command), "--tile", "64"]) == 1
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["photo_classes.png", "photo_confidence.png"]
    with Image.open(tmp_path / "out" / "photo_confidence.png") as grey:
        assert grey.mode == "L"
        np.testing.assert_allclose(np.asarray(grey) / 255, sure, atol=0.003)
    assert "fastseg predict: --confidence is of whole pictures; leave --tile out" in capsys.readouterr().err
