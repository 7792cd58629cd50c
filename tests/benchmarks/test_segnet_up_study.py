"""The study of SegNet's ways up, on a few generated pictures: it runs from end to end and says what it measured."""

import json
import subprocess
from types import SimpleNamespace

import numpy as np
from PIL import Image

import fastseg
from benchmarks.studies import segnet_up


def test_the_study_runs(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for kind in ("images", "labels"):
            (tmp_path / split / kind).mkdir(parents=True)
        for name in ("a", "b"):
            label = np.kron(rng.integers(0, 12, (3, 4)), np.ones((8, 8))).astype(np.uint8)
            Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(
                tmp_path / split / "images" / f"{name}.png"
            )
            Image.fromarray(label).save(tmp_path / split / "labels" / f"{name}.png")
    kept = {"segnet_basic": {"unpool": 3_000_000, "bilinear": 4_000_000, "transpose": 5_000_000}}
    monkeypatch.setattr(subprocess, "run", lambda *args, **more: SimpleNamespace(stdout=json.dumps(kept)))
    for name, value in {"NETS": {"segnet_basic": {"channels": 4}}, "HALF": (16, 20), "WINDOW": 16, "REPETITIONS": 2,
                        "LOOKS": 2}.items():  # fmt: skip
        monkeypatch.setattr(segnet_up, name, value)
    arguments = [tmp_path, "-o", tmp_path / "out", "--steps", 4, "--seeds", 1, "--thin", 1]
    with fastseg.reference():
        assert segnet_up.main([str(part) for part in arguments]) == 0
    result = json.loads((tmp_path / "out/segnet_up.json").read_text())
    rows = result["nets"]["segnet_basic"]
    assert list(rows) == ["unpool", "bilinear", "transpose"]
    assert rows["transpose"]["parameters"] - rows["unpool"]["parameters"] == 4 * (4 * 4 * 4 + 4)
    assert [step for step, _ in result["curves"]["segnet_basic/bilinear/0"]["mean_iou"]] == [2, 4]
    assert all(len(run["loss"]) == 4 for run in result["curves"].values())
    assert "| segnet_basic | bilinear |" in capsys.readouterr().out and (tmp_path / "out/segnet_up.png").stat().st_size
    assert segnet_up.main([str(tmp_path / "nothing")]) == 1
    assert "no such folder" in capsys.readouterr().err
