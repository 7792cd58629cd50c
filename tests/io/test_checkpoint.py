"""Weights that know their model."""

import pytest
import torch

import fastseg
from fastseg.io import checkpoint
from fastseg.io.checkpoint import load_checkpoint, save_checkpoint
from fastseg.models import create

OPTIONS = {"width": 0.1, "decoder_channels": 16, "output_stride": 8}


@pytest.fixture
def model():
    return create("deeplabv3plus", 3, **OPTIONS).eval()


def test_options_and_classes_travel_with_the_weights(tmp_path, model):
    save_checkpoint(tmp_path / "w.pt", model, "deeplabv3plus", OPTIONS, ["sky", "road", "tree"])
    loaded, classes = load_checkpoint(tmp_path / "w.pt")
    assert classes == ["sky", "road", "tree"]
    assert not loaded.training
    x = torch.randn(1, 3, 33, 33)
    with fastseg.reference(), torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_bare_state_dict_needs_the_name(tmp_path):
    full = create("deeplabv3plus", 5)
    torch.save(full.state_dict(), tmp_path / "bare.pt")
    loaded, classes = load_checkpoint(tmp_path / "bare.pt", "deeplabv3plus")
    assert classes == ["0", "1", "2", "3", "4"]  # counted in the classifier
    torch.testing.assert_close(loaded.cls_conv.weight, full.cls_conv.weight, rtol=0, atol=0)
    with pytest.raises(ValueError, match="--model"):
        load_checkpoint(tmp_path / "bare.pt")


def _payload(trained, **changes):
    return {
        "model": "deeplabv3plus",
        "options": OPTIONS,
        "classes": ["a", "b", "c"],
        "state_dict": trained.state_dict(),
    } | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "alexnet"}, "no model 'alexnet'"),
        ({"options": {"bogus": 1}}, "bogus"),
        ({"options": {"width": 1e9}}, "deeplabv3plus"),  # a model that no memory holds
        ({"options": {"width": "wide"}}, "width"),
        ({"options": [1]}, "not a dictionary"),
        ({"options": {}}, "mismatched"),
        ({"state_dict": {"weight": torch.zeros(3)}}, "classifier is not in the file"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_misleading_file_is_refused(tmp_path, model, changes, words):
    torch.save(_payload(model, **changes), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=words) as error:
        load_checkpoint(tmp_path / "w.pt")
    assert "w.pt" in str(error.value)


def test_nothing_is_allocated_before_shapes_fit(tmp_path, model, monkeypatch):
    devices = set()

    def watched(*args, **options):
        built = create(*args, **options)
        devices.update(parameter.device.type for parameter in built.parameters())
        return built

    torch.save(_payload(model, options=OPTIONS | {"width": 0.5}), tmp_path / "w.pt")
    monkeypatch.setattr(checkpoint, "create", watched)
    with pytest.raises(ValueError, match="mismatched"):
        load_checkpoint(tmp_path / "w.pt")
    assert devices == {"meta"}


def test_name_and_number_of_classes_are_checked(tmp_path, model):
    torch.save(_payload(model), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="not of 'unet'"):
        load_checkpoint(tmp_path / "w.pt", "unet")
    with pytest.raises(ValueError, match="cls_conv"):
        load_checkpoint(tmp_path / "w.pt", num_classes=7)


def test_wrong_list_of_class_names_is_not_used(tmp_path, model):
    torch.save(_payload(model, classes=["one"]), tmp_path / "w.pt")
    assert load_checkpoint(tmp_path / "w.pt")[1] == ["0", "1", "2"]
