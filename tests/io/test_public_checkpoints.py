"""Checkpoints of others: options that name the net, one reading of the file, one net in memory."""

import warnings

import pytest
import torch
from nets import NARROW

import fastseg
from fastseg.io import checkpoint
from fastseg.io.checkpoint import load_checkpoint, save_checkpoint
from fastseg.models import create, load_weights, names


@pytest.fixture(autouse=True)
def _reference():
    with fastseg.reference():
        yield


@pytest.mark.parametrize("name", sorted(NARROW))
def test_every_model_is_filled_whole(name, tmp_path):
    """Built without memory and then filled: as one that was created and loaded, buffers and outputs too."""
    options = NARROW[name]
    model = create(name, 3, **options)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded, classes = load_checkpoint(tmp_path / "w.pth", name, options=options)
    assert classes == ["0", "1", "2"] and not loaded.training
    for (key, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert key == other and a.dtype == b.dtype and torch.equal(a, b), key
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    x = torch.randn(1, 3, 65, 47)
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval()(x))
    # It is no view of the file, which may change.
    path = tmp_path / "w.pth"
    path.write_bytes(b"\0" * path.stat().st_size)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_every_name_is_tried():
    assert set(NARROW) <= set(names())


def test_old_files_without_counters(tmp_path):
    model = create("segnet_basic", 3, channels=8)
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pth")
    loaded, _ = load_checkpoint(tmp_path / "w.pth", "segnet_basic", options={"channels": 8})
    counters = [value for key, value in loaded.state_dict().items() if key.endswith("num_batches_tracked")]
    assert len(counters) == 8 and not any(counters)


def test_the_file_is_read_once_and_one_net_gets_memory(tmp_path, monkeypatch):
    options = {"width": 0.1, "decoder_channels": 16}
    save_checkpoint(tmp_path / "w.pt", create("deeplabv3plus", 3, **options), "deeplabv3plus", options, list("abc"))
    read, filled = [], []
    for name, calls in (("read_payload", read), ("fill", filled)):
        run = getattr(checkpoint, name)
        monkeypatch.setattr(checkpoint, name, lambda *args, run=run, calls=calls: (calls.append(args), run(*args))[1])
    built = []

    def watched(*args, **kwargs):
        model = create(*args, **kwargs)
        built.append({p.device.type for p in model.parameters()})
        return model

    monkeypatch.setattr(checkpoint, "create", watched)
    model, classes = load_checkpoint(tmp_path / "w.pt")
    assert (len(read), len(filled), classes) == (1, 1, ["a", "b", "c"])
    assert filled[0][0] is model
    assert all(devices == {"meta"} for devices in built)  # what has memory is the one that is filled


def test_options_name_the_net(tmp_path):
    """A public file of another backbone, with a head that the net lacks."""
    options = {"backbone": "resnet18", "width": 0.05, "channels": 8}
    source = create("deeplabv3", 5, aux=True, **options)
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="the auxiliary head is left out"):
        model, classes = load_checkpoint(tmp_path / "w.pth", "deeplabv3", options=options)
    assert classes == list("01234")
    twin = create("deeplabv3", 5, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_weights(twin, tmp_path / "w.pth")
    x = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        assert torch.equal(model(x), twin.eval()(x))
    with pytest.raises(ValueError, match=r"w.pth does not fit DeepLabV3: 80 missing \(module.backbone.layer1.2"):
        load_checkpoint(tmp_path / "w.pth", "deeplabv3", options=options | {"backbone": "resnet34", "aux": True})
    with pytest.raises(ValueError, match="deeplabv3 has no option depth"):
        load_checkpoint(tmp_path / "w.pth", "deeplabv3", options={"depth": 18})


def test_options_go_before_the_checkpoints_own(tmp_path):
    options = {"norm": True, "up": "bilinear", "widths": [4, 8, 8], "deep_supervision": True}
    model = create("unetplusplus", 3, **options).eval()
    save_checkpoint(tmp_path / "w.pt", model, "unetplusplus", options, list("abc"))
    fast, _ = load_checkpoint(tmp_path / "w.pt", options={"mode": "fast"})
    whole, _ = load_checkpoint(tmp_path / "w.pt")
    assert (fast.mode, whole.mode) == ("fast", "accurate")


@pytest.mark.parametrize("key", [None, "ema", "model"])
def test_several_sets_of_weights(tmp_path, key):
    models = {name: create("segnet_basic", classes, channels=8) for name, classes in (("model", 3), ("ema", 4))}
    torch.save({name: model.state_dict() for name, model in models.items()}, tmp_path / "w.pth")
    run = lambda: load_checkpoint(tmp_path / "w.pth", "segnet_basic", options={"channels": 8}, key=key)
    if key is None:
        with pytest.raises(ValueError, match="2 sets of weights that fit: 'model', 'ema'"):
            run()
        return
    model, classes = run()
    assert len(classes) == {"model": 3, "ema": 4}[key]
    assert torch.equal(model.classifier.weight, models[key].classifier.weight)


def test_weights_of_other_names_count_classes(tmp_path):
    """SMP's DeepLabV3: the number of classes is read where its names have it."""
    options = {"width": 0.05, "channels": 8, "dilation_style": "smp", "align_corners": True}
    names = {"backbone.": "encoder.", "classifier.0.": "decoder.aspp.", "classifier.1.": "decoder.conv.",
             "classifier.2.": "decoder.bn.", "classifier.4.": "segmentation_head.0."}  # fmt: skip
    source = create("deeplabv3", 6, **options)
    state = source.state_dict()
    for ours, theirs in names.items():
        state = {theirs + key.removeprefix(ours) if key.startswith(ours) else key: v for key, v in state.items()}
    torch.save(state, tmp_path / "w.pth")
    model, classes = load_checkpoint(tmp_path / "w.pth", "deeplabv3", options=options)
    assert len(classes) == 6
    assert all(torch.equal(v, source.state_dict()[key]) for key, v in model.state_dict().items())
