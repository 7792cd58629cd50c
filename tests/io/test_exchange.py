"""Weights go back under the names, the nesting and the dtypes of the file that they came from."""

import collections

import pytest
import torch
from torch import nn

from fastseg.io.exchange import save_weights_like
from fastseg.models import load_weights


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


FORMS = {
    "bare": lambda s: s,
    "DistributedDataParallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "Lightning": lambda s: {
        "epoch": 3, "state_dict": collections.OrderedDict((f"model.{k}", v) for k, v in s.items()),
        "optimizer_states": [{"lr": 0.1, "moments": torch.ones(4)}],
    },
    "compiled, half": lambda s: {f"_orig_mod.{k}": v.half() if v.is_floating_point() else v for k, v in s.items()},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back(form, tmp_path):
    trained, model = net(), net()
    for value in trained.state_dict().values():
        value.copy_(torch.randint(1, 9, value.shape))
    theirs = FORMS[form](trained.state_dict())
    torch.save(theirs, tmp_path / "theirs.pt")
    load_weights(model, tmp_path / "theirs.pt")
    save_weights_like(model, tmp_path / "same.pt", tmp_path / "theirs.pt")
    assert torch.load(tmp_path / "same.pt", weights_only=True).keys() == theirs.keys()
    equal(torch.load(tmp_path / "same.pt", weights_only=True), theirs)
    with torch.no_grad():
        model[0].weight.mul_(2)
    save_weights_like(model, tmp_path / "new.pt", tmp_path / "theirs.pt")
    equal(torch.load(tmp_path / "new.pt", weights_only=True), FORMS[form](model.state_dict()))
    again = net()
    load_weights(again, tmp_path / "new.pt")
    assert torch.equal(again[0].weight, 2 * trained[0].weight)


def equal(got, want) -> None:
    assert type(got) is type(want)
    if isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype and torch.equal(got, want)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for name, value in want.items():
            equal(got[name], value)
    elif isinstance(want, list):
        for a, b in zip(got, want, strict=True):
            equal(a, b)
    else:
        assert got == want


def test_folders_of_save_pretrained(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = net(), net()
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    load_weights(other, tmp_path)
    assert torch.equal(other[0].weight, model[0].weight)
    nn.init.ones_(other[1].weight)
    save_weights_like(other, tmp_path / "new.safetensors", tmp_path)
    written = safetensors.load_file(tmp_path / "new.safetensors")
    equal(dict(sorted(written.items())), dict(sorted(other.state_dict().items())))


def test_what_does_not_fit(tmp_path):
    torch.save(net().state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="does not fit Sequential"):
        save_weights_like(nn.Sequential(nn.Conv2d(3, 5, 3)), tmp_path / "b.pt", tmp_path / "a.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"a folder with no model\.safetensors"):
        load_weights(net(), tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="several parts"):
        load_weights(net(), tmp_path / "empty")
    assert not (tmp_path / "b.pt").exists()
