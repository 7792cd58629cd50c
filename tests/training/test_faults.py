"""`fastseg train` on data sets, folders and signals as they come: nothing silent, nothing lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from folders import make_folders
from PIL import Image
from processes import end_of, start_fastseg, wait_for

import fastseg
from fastseg.cli import main
from fastseg.models.weights import read_payload
from fastseg.training import run
from fastseg.training.checkpoints import write_checkpoint
from fastseg.training.lock import lock


@pytest.fixture(autouse=True)
def _reference():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fastseg.reference():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def data(tmp_path):
    return make_folders(tmp_path / "data", {"train": 4, "val": 2, "test": 2})


def _command(data, *arguments, epochs=2):
    base = (
        "train",
        "--data",
        data,
        "--model",
        "segnet_basic",
        "--option",
        "channels=4",
        "--epochs",
        epochs,
        "--batch",
        2,
    )
    return [str(part) for part in (*base, "--device", "cpu", "--lr", 0.01, "-o", data.with_name("run"), *arguments)]


def _train(data, *arguments, **options):
    return main(_command(data, *arguments, **options))


def _lines(capsys):
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    return [line.strip() for line in lines if "fastseg train: " in line]


def _labels(data, split, change):
    for path in (data / split / "labels").iterdir():
        with Image.open(path) as image:
            values = change(np.array(image))
        Image.fromarray(values.astype(np.uint8)).save(path)


# what the labels hold


def test_one_class_that_occurs_is_an_error(data, capsys):
    """Masks of 0 and 255 with 255 ignored: mIoU 1.0000, once."""
    (data / "dataset.json").write_text('{"classes": ["sky", "road"], "ignore_index": 255}')
    for split in ("train", "val"):
        _labels(data, split, lambda label: np.where(label == 1, 255, 0))
    assert _train(data) == 1
    (line,) = _lines(capsys)
    assert "the labels of train hold one class only, 'sky': there is nothing to learn; " in line
    assert re.search(r"\d+% of the pixels have ignore_index 255, which is no class$", line)
    assert not data.with_name("run").exists()
    for split in ("train", "val"):
        _labels(data, split, lambda label: np.full_like(label, 255))
    assert _train(data) == 1
    assert "the labels of train hold no class at all; 100% of the pixels have ignore_index 255" in _lines(capsys)[0]


def test_classes_that_no_label_holds_are_named_before_training(data, capsys):
    (data / "dataset.json").write_text('{"classes": ["ground", "sky", "sea", "snow"], "ignore_index": 9}')
    _labels(data, "val", lambda label: np.where(label == 1, 2, label))
    assert _train(data, epochs=1) == 0
    lines = _lines(capsys)
    assert len(lines) == 2
    assert "no label of train holds 'sea', 'snow': what no label holds cannot be learned" in lines[0]
    assert "no label of val holds 'sky', 'snow': what no label holds has no IoU of its own" in lines[1]


def test_all_label_values_are_classes(data, capsys):
    """256 classes leave no value for what padding adds: it would be class 255."""
    (data / "dataset.json").write_text(json.dumps({"classes": [f"c{index}" for index in range(256)]}))
    assert _train(data) == 1
    assert "256 classes leave no label value for padding; give an ignore_index, or fewer" in _lines(capsys)[0]


@pytest.mark.parametrize(("value", "mode"), [(7, "I;16"), (300, "I;16"), (-3, "I"), (70_000, "I"), (2, "L")])
def test_a_value_that_is_no_class_is_named_with_its_file(data, capsys, value, mode):
    path = data / "val" / "labels" / "p1.png"
    dtype = {"I;16": np.uint16, "I": np.int32, "L": np.uint8}[mode]
    label = np.zeros((16, 20), dtype)
    label[3, 3] = value
    path.unlink()
    Image.fromarray(label).save(path.with_suffix(".tif"))
    assert _train(data) == 1
    (line,) = _lines(capsys)
    want = f"has the label {value}; classes are 0 to 1, ignore_index is 9"
    assert line == f"fastseg train: {path.with_suffix('.tif')}: {want}"


def test_labels_of_16_bits_and_pictures_of_other_formats_train_alike(data, capsys):
    assert _train(data) == 0
    want = read_payload(data.with_name("run") / "last.pt")["state_dict"]
    for split in ("train", "val"):
        for kind, suffix in (("images", ".bmp"), ("labels", ".tif")):
            for path in list((data / split / kind).iterdir()):
                with Image.open(path) as image:
                    image = image if kind == "images" else Image.fromarray(np.array(image).astype(np.uint16))
                    image.save(path.with_suffix(suffix))
                path.unlink()
    os.rename(data.with_name("run"), data.with_name("before"))
    assert _train(data) == 0 and not _lines(capsys)
    got = read_payload(data.with_name("run") / "last.pt")["state_dict"]
    assert all(torch.equal(got[key], value) for key, value in want.items())


def test_what_is_left_out_is_counted(data, capsys):
    images, labels = data / "train" / "images", data / "train" / "labels"
    (images / "more").mkdir()
    for name in ("a.txt", "b.txt", "c.xcf", ".hidden", "README"):
        (images / name).write_text("")
    for name in ("x1.png", "x2.png"):
        Image.new("L", (4, 4)).save(labels / name)
    assert _train(data, epochs=1) == 0
    first, second = _lines(capsys)
    assert first == (
        f"fastseg train: {images}: left out: 1 nameless file(s), 2 .txt file(s), 1 .xcf file(s), 1 folder(s)"
    )
    assert second == f"fastseg train: {labels}: left out: 2 label(s) without a picture, as x1.png"


@pytest.mark.parametrize("kind", ["images", "labels"])
@pytest.mark.parametrize("what", ["pipe", "circle", "nowhere", "device"])
def test_what_is_named_as_a_picture_and_is_no_file(data, capsys, kind, what):
    path = data / "train" / kind / "p1.png"
    path.unlink()
    match what:
        case "pipe":
            os.mkfifo(path)
        case "circle":
            path.symlink_to(path)
        case "nowhere":
            path.symlink_to("nowhere")
        case "device":
            path.symlink_to("/dev/zero")
    assert _train(data) == 1
    (line,) = _lines(capsys)
    words = "not a regular file" if what in ("pipe", "device") else "a link to nowhere, or in a circle"
    assert line == f"fastseg train: {path}: {words}"


# a resumed run


def test_a_resumed_run_wants_its_data_set(data, capsys):
    output = data.with_name("run")
    assert _train(data, "--max-seconds", 1e-9) == 0
    before = (output / "last.pt").read_bytes()
    picture, label = (data / "train" / kind / "p1.png" for kind in ("images", "labels"))
    changes = {"images": picture.read_bytes(), "labels": label.read_bytes()}
    capsys.readouterr()
    with Image.open(picture) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(picture)
    assert _train(data, "--resume") == 1
    assert "the data set is not that of its run: train has other contents; put it back" in _lines(capsys)[0]
    picture.write_bytes(changes["images"])
    _labels(data, "val", lambda value: np.where(value == 1, 0, 1 - value % 2))
    assert _train(data, "--resume") == 1
    assert "val has other contents" in _lines(capsys)[0]
    for name in ("images", "labels"):
        (data / "train" / name / "p3.png").unlink()
    assert _train(data, "--resume") == 1
    assert "train has 3 pictures, and had 4; val has other contents" in _lines(capsys)[0]
    (data / "dataset.json").write_text('{"classes": ["ground", "sky"], "ignore_index": 8}')
    assert (output / "last.pt").read_bytes() == before


@pytest.mark.parametrize("schedule", ["poly", "onecycle", "constant"])
def test_with_changed_data_the_epoch_begins_anew(data, capsys, schedule):
    """The rate is that of the new number of steps, however many there were."""
    options = ("--schedule", schedule)
    assert _train(data, *options, "--max-seconds", 1e-9) == 0  # one of two steps
    for name in ("images", "labels"):
        for number in (2, 3):
            (data / "train" / name / f"p{number}.png").unlink()
    assert _train(data, *options, "--resume", "--changed-data") == 0
    training = read_payload(data.with_name("run") / "last.pt")["training"]
    assert [row["step"] for row in training["history"]] == [1, 2]
    reference = [row["lr"] for row in training["history"]]
    os.rename(data.with_name("run"), data.with_name("before"))
    assert _train(data, *options) == 0
    training = read_payload(data.with_name("run") / "last.pt")["training"]
    assert [row["lr"] for row in training["history"]] == pytest.approx(reference)


def test_a_checkpoint_that_is_none_of_a_run(data, capsys):
    output = data.with_name("run")
    assert _train(data, "--max-seconds", 1e-9) == 0
    whole = read_payload(output / "last.pt")
    capsys.readouterr()
    training = whole["training"]
    for change in (
        {"training": {key: value for key, value in training.items() if key != "history"}},
        {"training": training | {"optimizer": 3}},
        {"training": training | {"settings": None}},
        {"training": training | {"epoch": "x"}},
        {"training": training | {"best": [1]}},
        {"training": training | {"loss": float("nan")}},
        {"training": training | {"history": [3]}},
        {"training": training | {"schedule": training["schedule"] | {"last_epoch": None}}},
        {"training": []},
        {"state_dict": {}},
        {"state_dict": None},
    ):
        write_checkpoint(output / "last.pt", whole | change)
        assert _train(data, "--resume") == 1
        (line,) = _lines(capsys)
        assert line.startswith(f"fastseg train: {output / 'last.pt'}: is no checkpoint of ")


# stopping


def test_ctrl_c_saves_after_the_step(data, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGINT)  # ignored where a shell started the tests in the background
    assert _train(data) == 0
    want = read_payload(data.with_name("run") / "last.pt")
    os.rename(data.with_name("run"), data.with_name("before"))
    count, window = 0, run.window

    def interrupted(*arguments):
        nonlocal count
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return window(*arguments)

    monkeypatch.setattr(run, "window", interrupted)
    capsys.readouterr()
    assert _train(data) == 130 and count == 3
    assert signal.getsignal(signal.SIGINT) is before
    assert _lines(capsys) == ["fastseg train: SIGINT: stopped after 1 of 2 epochs; go on with --resume"]
    training = read_payload(data.with_name("run") / "last.pt")["training"]
    assert (training["epoch"], training["done"]) == (1, 1)
    assert _train(data, "--resume") == 0
    got = read_payload(data.with_name("run") / "last.pt")
    assert all(torch.equal(got["state_dict"][key], value) for key, value in want["state_dict"].items())


def test_a_second_ctrl_c_ends_at_once(data, capsys, monkeypatch):
    def twice(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    monkeypatch.setattr(run, "window", twice)
    assert _train(data) == 1
    assert _lines(capsys) == ["fastseg train: interrupted"]


def test_ctrl_c_to_a_process_group_with_readers(data):
    """As terminals send it: to the DataLoader's workers too."""
    output = data.with_name("run")
    process = start_fastseg(*_command(data, "--workers", 1, "--save-every", 1, epochs=500), cwd=data)
    wait_for(output / "last.pt", process)
    os.killpg(process.pid, signal.SIGINT)
    status, _, errors = end_of(process)
    assert status == 130, errors
    assert errors.count("fastseg train: SIGINT: stopped after ") == 1 and "Traceback" not in errors


# what is written


def test_weights_that_are_no_numbers_are_not_written(data, capsys, monkeypatch):
    """A loss of 0 is finite: of pixels that count nothing, say; the weights are looked at themselves."""
    step = torch.optim.SGD.step
    steps = 0

    def spoilt(self, *args, **kwargs):
        nonlocal steps
        steps += 1
        step(self, *args, **kwargs)
        if steps == 4:  # the last of the second epoch
            self.param_groups[0]["params"][0].data[0] = float("nan")

    monkeypatch.setattr(torch.optim.SGD, "step", spoilt)
    assert _train(data) == 1
    (line,) = _lines(capsys)
    assert re.search(r"training diverged: 1 of \d+ tensors, as encoder.0.0.weight, are not finite after step 4", line)
    for name in ("last.pt", "best.pt"):
        payload = read_payload(data.with_name("run") / name)
        assert all(value.isfinite().all() for value in payload["state_dict"].values())
    assert payload.get("training") is None


def test_the_best_is_written_before_the_last_says_so(data, capsys, monkeypatch):
    written = []

    def watched(path, payload):
        written.append((path.name, payload.get("training", {}).get("epoch")))
        write_checkpoint(path, payload)

    monkeypatch.setattr(run, "write_checkpoint", watched)
    assert _train(data, epochs=1) == 0
    assert written == [("best.pt", None), ("last.pt", 1)]


def test_a_best_that_cannot_be_written_is_not_said_to_be(data, capsys, monkeypatch):
    def full(path, payload):
        if path.name == "best.pt":
            raise OSError(f"{path}: cannot be written (No space left on device)")
        write_checkpoint(path, payload)

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_checkpoint", full)
        assert _train(data, epochs=1) == 1
    assert "best.pt: cannot be written" in _lines(capsys)[0]
    training = read_payload(data.with_name("run") / "last.pt")["training"]
    assert training["best"] < 0 and (training["epoch"], training["done"]) == (0, 2)  # to be scored again
    assert _train(data, "--resume", epochs=1) == 0
    assert (data.with_name("run") / "best.pt").is_file()
    training = read_payload(data.with_name("run") / "last.pt")["training"]
    assert training["best"] == training["history"][0]["mean_iou"] >= 0


def test_two_trainings_do_not_share_a_folder(data, capsys):
    output = data.with_name("run")
    output.mkdir()
    with lock(output):
        assert _train(data) == 1
        assert _lines(capsys) == [
            f"fastseg train: {output}: another training writes there; wait for its end, or use another -o"
        ]
        assert not os.listdir(output)
    assert _train(data, epochs=1) == 0


def test_the_lock_of_a_killed_training_is_gone(tmp_path):
    """Even while a reader that it forked lives on."""
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom fastseg.training.lock import lock\n"
        "with lock(Path(sys.argv[1])):\n"
        "    reader = os.fork()\n"
        "    if reader: print(reader, flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-P", "-c", script, tmp_path], stdout=subprocess.PIPE, text=True)
    reader = int(process.stdout.readline())
    try:
        with pytest.raises(ValueError, match="another training"), lock(tmp_path):
            pass
        process.kill()
        process.wait()
        os.kill(reader, 0)  # lives
        for patience in range(50, -1, -1):  # a busy machine may not have let it run yet
            try:
                with lock(tmp_path):
                    break
            except ValueError:
                if not patience:
                    raise
                time.sleep(0.2)
    finally:
        os.kill(reader, signal.SIGKILL)
        process.stdout.close()
