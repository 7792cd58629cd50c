"""`fastseg train --amp` on a CPU: autocast is on, and a run in fp16 goes on with the scale it had."""

import json

import pytest
from folders import make_folders

import fastseg
from fastseg.cli import main
from fastseg.models.weights import read_payload


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_and_the_scale_of_a_resumed_run(dtype, tmp_path):
    data = make_folders(tmp_path / "data")
    base = ["train", "--data", data, "--model", "segnet_basic", "--option", "channels=8", "--batch", 4, "--epochs", 1]

    def run(output, *arguments):
        with fastseg.reference():
            assert main([str(part) for part in (*base, "--device", "cpu", "-o", tmp_path / output, *arguments)]) == 0
        return read_payload(tmp_path / output / "last.pt")["training"]

    whole = run("whole", "--amp", dtype)
    run("parts", "--amp", dtype, "--max-seconds", 1e-9)
    assert run("parts", "--amp", dtype, "--resume")["scaler"] == whole["scaler"]
    assert ("scale" in whole["scaler"]) == (dtype == "float16")
    curves = [json.loads((tmp_path / name / "curves.json").read_text())[0]["loss"] for name in ("whole", "parts")]
    run("none", "--amp", "none")
    plain = json.loads((tmp_path / "none" / "curves.json").read_text())[0]["loss"]
    assert curves[0] == curves[1] != plain and curves[0] == pytest.approx(plain, rel=0.1)
