"""``torchrun -m fastseg``, as on a cluster: what two processes train, resume and score is what one does.

The first launch is ended as a cluster ends it, by SIGTERM.
"""

import json
import signal

import pytest
import torch
from folders import make_folders
from processes import end_of, start_fastseg, wait_for

import fastseg
from fastseg.cli import main
from fastseg.models.weights import read_payload
from fastseg.ops.core.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="no kernel runs here: once, in the plain process")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun gives its processes: sums of more differ in the last bit
    yield
    torch.set_num_threads(threads)


def _one(*arguments):
    with fastseg.reference():
        assert main([str(part) for part in arguments]) == 0


def _two(*arguments, cwd):
    status, out, errors = end_of(start_fastseg(*arguments, cwd=cwd, torchrun=True))
    assert status == 0, errors
    return out


def _json(path):
    return json.loads(path.read_text())


def test_two_processes_train_resume_and_score_as_one(tmp_path):
    data, two = make_folders(tmp_path / "data", {"train": 8, "val": 3, "test": 5}), tmp_path / "two"

    def train(out):
        return ("train", "--data", data, "--model", "segnet_basic", "--option", "channels=8", "--batch", 2, "--epochs",
                6, "--lr", 0.01, "--device", "cpu", "-o", out)  # fmt: skip

    def score(out):
        return ("evaluate", "--data", data, "--weights", two / "best.pt", "--device", "cpu", "-o", out)

    launcher = start_fastseg(*train(two), "--save-every", 1, cwd=tmp_path, torchrun=True)
    wait_for(two / "last.pt", launcher)
    launcher.send_signal(signal.SIGTERM)
    status, _, errors = end_of(launcher)
    assert status != 0 and errors.count("fastseg train: SIGTERM: stopped after ") == 1
    assert read_payload(two / "last.pt")["training"]["epoch"] < 6
    assert _two(*train(two), "--resume", cwd=tmp_path).count("best mIoU on val") == 1
    _one(*train(tmp_path / "one"))
    for a, b in zip(_json(tmp_path / "one" / "curves.json"), _json(two / "curves.json"), strict=True):
        assert {key: a[key] for key in ("epoch", "step", "lr")} == {key: b[key] for key in ("epoch", "step", "lr")}
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["mean_iou"] == pytest.approx(b["mean_iou"], abs=0.02)  # a pixel may be a tie
    assert "IoU" in _two(*score(two / "scores"), cwd=tmp_path)
    _one(*score(tmp_path / "scores"))
    assert _json(two / "scores" / "scores.json") == _json(tmp_path / "scores" / "scores.json")
