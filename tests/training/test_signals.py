"""SIGTERM during `fastseg train`: one line, a status of its own, and a resumed run that is the uninterrupted one."""

import json
import os
import signal
import time

import pytest
import torch
from folders import make_folders
from processes import end_of, start_fastseg, wait_for

import fastseg
from fastseg.cli import main
from fastseg.models.weights import read_payload
from fastseg.training import evaluation, run

EPOCHS, STEPS, SCORINGS = 3, 4, 3  # of every run here: steps and scored pictures of an epoch


@pytest.fixture(autouse=True)
def _reference():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fastseg.reference():
        yield
    torch.set_num_threads(threads)


def _command(data, output, *arguments, epochs=EPOCHS):
    base = ("train", "--data", data, "--model", "segnet_basic", "--option", "channels=8", "--batch", 2, "--device",
            "cpu", "--epochs", epochs, "--lr", 0.05, "-o", output)  # fmt: skip
    return [str(part) for part in (*base, *arguments)]


def _result(output):
    curve = [{**row, "seconds": 0} for row in json.loads((output / "curves.json").read_text())]
    return curve, read_payload(output / "last.pt")["state_dict"]


def _equal(one, other):
    assert one[0] == other[0]
    for key, value in one[1].items():
        assert torch.equal(value, other[1][key]), key


@pytest.fixture
def data(tmp_path):
    return make_folders(tmp_path / "data", {"train": STEPS * 2, "val": SCORINGS})


@pytest.fixture
def sigterm_at(monkeypatch):
    """Sends this process SIGTERM at the n-th step, or the n-th scored picture, counted from 1."""

    def plan(module, number):
        count, window = 0, module.window

        def counted(*arguments):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return window(*arguments)

        monkeypatch.setattr(module, "window", counted)
        return lambda: count

    return plan


@pytest.mark.parametrize(
    ("where", "number", "epoch", "done"),
    [
        (run, 1, 0, 1),
        (run, STEPS + 2, 1, 2),
        (run, 2 * STEPS, 1, STEPS),  # at an epoch's last step: before it is scored
        (evaluation, SCORINGS + 2, 1, STEPS),  # in the midst of the scoring
        (evaluation, EPOCHS * SCORINGS, 2, STEPS),
    ],
    ids=["first step", "step", "last step", "scoring", "last picture"],
)
def test_sigterm_ends_after_the_step_and_resumes_exactly(
    data, tmp_path, capsys, sigterm_at, where, number, epoch, done
):
    assert main(_command(data, tmp_path / "whole")) == 0
    output, before = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    capsys.readouterr()
    counted = sigterm_at(where, number)
    assert main(_command(data, output)) == 143
    assert counted() == number  # nothing was begun after it
    assert signal.getsignal(signal.SIGTERM) is before
    out, errors = capsys.readouterr()
    line = f"fastseg train: SIGTERM: stopped after {epoch} of {EPOCHS} epochs; go on with --resume"
    assert errors.replace("\r", "\n").splitlines().count(line) == 1 and "stopped" not in out
    training = read_payload(output / "last.pt")["training"]
    assert (training["epoch"], training["done"]) == (epoch, done)
    assert main(_command(data, output, "--resume")) == 0
    _equal(_result(output), _result(tmp_path / "whole"))


def test_sigterm_to_a_process_group_with_readers(data, tmp_path):
    """As launchers send it, to the DataLoader's workers too, and twice."""
    output, whole, many = tmp_path / "run", tmp_path / "whole", 8
    start = lambda *arguments: start_fastseg(*_command(data, *arguments, epochs=many), cwd=tmp_path)
    process, other = start(output, "--workers", 1, "--save-every", 1), start(whole)
    try:
        wait_for(output / "last.pt", process)
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.02)  # two that wait together are one
        os.killpg(process.pid, signal.SIGTERM)
        status, _, errors = end_of(process)
        assert status == 143, errors
        assert errors.count("fastseg train: SIGTERM: stopped after ") == 1 and "Traceback" not in errors
        assert not list(output.glob(".*"))
        assert end_of(start(output, "--resume"))[0] == end_of(other)[0] == 0
    finally:
        other.kill()
    _equal(_result(output), _result(whole))
