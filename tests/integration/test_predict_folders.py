"""Folders of images: what is in them, and two processes that write the files of one, with one count and one status."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import run_two

import fastseg
from fastseg.cli import main, predict
from fastseg.io.checkpoint import save_checkpoint
from fastseg.models import create
from fastseg.ops.core.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="no kernel runs here: once, in the plain process")

WORKER = """
import contextlib, io, json, sys
from datetime import timedelta
import torch
import torch.distributed as dist
import fastseg
from fastseg.cli import main

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
said = []
with fastseg.reference():
    for command in json.load(open(f"{out}/commands.json")):
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(io.StringIO()) as errors:
            status = main(command)
        said.append({"status": status, "out": text.getvalue(), "errors": errors.getvalue()})
json.dump(said, open(f"{out}/said{rank}.json", "w"))
dist.destroy_process_group()
"""


@pytest.fixture
def weights(tmp_path):
    options = {"channels": 8}
    save_checkpoint(tmp_path / "w.pt", create("segnet_basic", 3, **options), "segnet_basic", options, list("abc"))
    return tmp_path / "w.pt"


def _photos(*paths):
    rng = np.random.default_rng(0)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 40, 3), np.uint8)).save(path)


def _command(weights, out, *images):
    return [str(part) for part in ("predict", "--device", "cpu", "--weights", weights, "-o", out, *images)]


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_is_its_images_by_name(tmp_path, weights, capsys):
    folder, empty, none = tmp_path / "in", tmp_path / "empty", tmp_path / "none"
    _photos(*(folder / name for name in ("b.JPG", "a.png", ".hidden.png", "deeper/c.png", "d.png/e.png")))
    (folder / "notes.txt").write_text("no picture")
    inside = [folder / "a.png", folder / "b.JPG"]
    assert predict.images_in([folder, Path("x.txt"), folder / "deeper"]) == [
        *inside,
        Path("x.txt"),
        folder / "deeper/c.png",
    ]
    with fastseg.reference():
        assert main(_command(weights, tmp_path / "out", folder, "--no-overlay")) == 0
    assert set(_files(tmp_path / "out")) == {"a_classes.png", "b_classes.png"}
    assert capsys.readouterr().out.startswith("2 of 2 images")
    empty.mkdir()
    assert main(_command(weights, none, folder, empty)) == 1
    assert capsys.readouterr().err == f"fastseg predict: {empty}: no PNG or JPEG image is in this folder\n"
    assert not none.exists()


def test_two_processes_write_the_files_of_one(tmp_path, weights, capsys):
    photos = tmp_path / "photos"
    _photos(*(photos / name for name in ("a/p.png", "a/q.jpg", "a/r.png", "b/p.png", "b/q.png", "c/p.png")))
    (tmp_path / "cut.png").write_bytes((photos / "a" / "p.png").read_bytes()[:900])
    good = [photos / "c" / "p.png", photos / "a", photos / "b"]
    bad = [photos / "a" / "p.png", tmp_path / "cut.png"]  # the second process gets the second
    (tmp_path / "empty").mkdir()
    runs = {"two": good, "bad": bad, "none": [tmp_path / "empty"]}
    commands = [_command(weights, tmp_path / out, *images) for out, images in runs.items()]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    run_two(WORKER, tmp_path)
    with fastseg.reference():
        assert main(_command(weights, tmp_path / "one", *good)) == 0
    one = _files(tmp_path / "one")
    assert set(one) == {
        f"{stem}_{kind}.png" for stem in ("p", "p-2", "p-3", "q", "q-2", "r") for kind in ("classes", "overlay")
    }
    assert len(set(one.values())) == len(one) and one == _files(tmp_path / "two")
    first, second = (json.loads((tmp_path / f"said{rank}.json").read_text()) for rank in range(2))
    assert first[0]["out"] == capsys.readouterr().out.replace(f"{tmp_path / 'one'}", f"{tmp_path / 'two'}")
    assert first[0]["out"].startswith("6 of 6 images segmented") and first[1]["out"].startswith("1 of 2 images")
    assert [said["out"] for said in second] == ["", "", ""]
    assert [[said["status"] for said in process] for process in (first, second)] == [[0, 1, 1], [0, 1, 1]]
    assert "cut.png: cannot be read" in second[1]["errors"] and "cut.png" not in first[1]["errors"]
    assert (first[2]["errors"].count("in this folder"), second[2]["errors"]) == (1, "")
