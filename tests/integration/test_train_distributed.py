"""Two processes train, resume and score as one does: shared batches and statistics, one reduced confusion matrix."""

import json

import pytest
from folders import make_folders
from processes import run_two

import fastseg
from fastseg.cli import main
from fastseg.ops.core.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="no kernel runs here: once, in the plain process")

WORKER = """
import json, sys
from datetime import timedelta
import torch
import torch.distributed as dist
import fastseg
from fastseg.cli import main

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
with fastseg.reference():
    for command in json.load(open(f"{out}/commands.json")):
        assert main(command) == 0
dist.destroy_process_group()
"""


def _commands(data, out):
    train = ["train", "--data", data, "--model", "segnet_basic", "--option", "channels=8", "--batch", "4", "--epochs",
             "2", "--lr", "0.05", "--class-weights", "median-frequency", "--device", "cpu", "-o", out]  # fmt: skip
    score = ["evaluate", "--data", data, "--weights", f"{out}/last.pt", "--device", "cpu", "-o", f"{out}/scores"]
    return train, score


def test_two_processes_equal_one(tmp_path):
    data = str(make_folders(tmp_path / "data"))
    train, score = _commands(data, str(tmp_path / "two"))
    commands = [[*train, "--max-seconds", "1e-9"], [*train, "--resume"], score]  # stopped after the first step
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    run_two(WORKER, tmp_path)
    with fastseg.reference():
        for command in _commands(data, str(tmp_path / "one")):
            assert main(command) == 0
    one, two = (json.loads((tmp_path / name / "curves.json").read_text()) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["mean_iou"] == pytest.approx(b["mean_iou"], abs=0.01)  # a pixel may be a tie
    one, two = (json.loads((tmp_path / name / "scores" / "scores.json").read_text()) for name in ("one", "two"))
    assert one["mean_iou"] == pytest.approx(two["mean_iou"], abs=0.01)
    assert [c["pixels"] for c in one["classes"]] == [c["pixels"] for c in two["classes"]]
    assert len(one["worst"]) == len(two["worst"]) == 4
    assert (tmp_path / "two" / "scores" / "worst.png").is_file()
