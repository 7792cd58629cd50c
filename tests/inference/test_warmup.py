"""``fastseg.warmup`` and its command: which calls are made, what stays as it is, what is named when it fails."""

import importlib

import pytest
import torch
from torch import nn

import fastseg
from fastseg.cli import main
from fastseg.inference import Runner

module = importlib.import_module("fastseg.inference.warmup")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.seen = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), []
        self.norm.eval()

    def forward(self, x):
        self.seen.append(
            (tuple(x.shape), x.dtype, self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
        )
        if x.shape[2] == 7:
            raise RuntimeError("PassManager::run failed\nin three lines")
        return self.norm(self.conv(x))


@pytest.fixture
def compiled(monkeypatch):
    """As if a CPU's kernels were compiled."""
    monkeypatch.setattr(module, "compiles", lambda device: True)


def test_each_size_and_method_is_called_twice_in_evaluation(compiled):
    net, told = Net().train(), []
    net.norm.eval()
    state = {name: t.clone() for name, t in net.state_dict().items()}
    warmed = fastseg.warmup(net, [(8, 16), (2, 3, 4, 4)], progress=told.append)
    shapes = [(1, 3, 8, 16)] * 4 + [(2, 3, 4, 4)] * 4
    assert net.seen == [(shape, torch.float32, False, False, False) for shape in shapes]
    assert [(one.shape, one.method) for one in warmed] == [(s, m) for s in shapes[::4] for m in ("forward", "predict")]
    assert told == warmed and all(one.first_s > 0 and one.call_s > 0 and not one.error for one in warmed)
    assert (net.training, net.conv.training, net.norm.training) == (True, True, False)
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())


def test_dtype_is_autocasts_and_a_runner_keeps_its_own(compiled):
    net = Net().eval()
    fastseg.warmup(net, [(4, 4)], dtype=torch.bfloat16, methods=["forward"])
    assert [autocast for *_, autocast in net.seen] == [True, True]
    runner = Runner(net, torch.zeros(1, 3, 4, 4), dtype=torch.bfloat16)
    fastseg.warmup(runner, [(8, 8)])
    assert (1, 3, 8, 8) in runner._seen


def test_sizes_that_fail_are_named_and_the_others_are_done(compiled):
    net, told = Net(), []
    with pytest.raises(RuntimeError) as raised:
        fastseg.warmup(net, [(7, 8), (8, 8)], methods=["forward"], progress=told.append)
    assert str(raised.value) == "warmup: 1 of 2 failed: 1x3x7x8 forward: failed: RuntimeError: PassManager::run failed"
    assert [bool(one.error) for one in told] == [True, False]
    assert net.training


def test_an_error_that_ends_the_device_is_not_held_back(compiled, monkeypatch):
    net = Net()

    def broken(self, x):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(Net, "forward", broken)
    with pytest.raises(torch.AcceleratorError):
        fastseg.warmup(net, [(4, 4), (8, 8)])
    assert net.training


def test_a_copy_runs_on_another_device(compiled):
    net = Net()
    fastseg.warmup(net, [(4, 4)], device="cpu")
    assert net.seen == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shapes": []}, "no shapes"),
        ({"shapes": [(1, 2, 3)]}, r"shape \(1, 2, 3\) is not"),
        ({"shapes": [(0, 4)]}, r"\(0, 4\)"),
        ({"shapes": [(4.0, 4)]}, "positive integers"),
        ({"shapes": [(4, 4)], "methods": ["train"]}, "no method 'train'"),
    ],
)
def test_refused_before_any_work(options, said):
    net = Net()
    with pytest.raises(ValueError, match=f"warmup: .*{said}"):
        fastseg.warmup(net, **options)
    assert net.seen == []


def test_on_a_cpu_nothing_runs():
    net = Net()
    assert fastseg.warmup(net, [(512, 512)]) == [] and net.seen == []
    assert "warmup" in dir(fastseg)


def test_the_command(tmp_path, capsys, monkeypatch):
    torch.save(fastseg.models.create("segnet_basic", 2).state_dict(), tmp_path / "w.pt")
    command = ["warmup", "--weights", str(tmp_path / "w.pt"), "--model", "segnet_basic",
               "--device", "cpu", "--sizes", "16", "16x8"]  # fmt: skip
    assert main(command) == 0
    assert "nothing to compile" in capsys.readouterr().out
    for name in ("fastseg.inference.warmup", "fastseg.cli.warmup"):
        monkeypatch.setattr(importlib.import_module(name), "compiles", lambda device: True)
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"{who} 1x3x{size} {method}"
        for who in ("model", "Runner")
        for size in ("16x16", "16x8")
        for method in ("forward", "predict")
    ]
