"""Checkpoints as training code saves them: what stands around the weights, and what is ambiguous."""

import warnings

import pytest
import torch
from torch import nn

from fastseg.models import create, load_encoder_weights, load_weights
from fastseg.models.encoders import ENCODERS
from fastseg.models.locate import locate
from fastseg.models.weights import read_payload


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 2, 1)))


def numbered(model: nn.Module, shift: float = 0.0) -> dict[str, torch.Tensor]:
    """A state_dict in which every tensor is another."""
    torch.manual_seed(int(shift))
    return {
        key: torch.rand_like(v) + shift if v.is_floating_point() else v + 7 for key, v in model.state_dict().items()
    }


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


STATE = numbered(network(), 1)
OTHER = numbered(network(), 2)
OPTIMIZER = {"state": {0: {"momentum_buffer": torch.zeros(4), "step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1}]}
LIGHTNING = {
    "epoch": 3, "global_step": 9, "pytorch-lightning_version": "2.5", "optimizer_states": [OPTIMIZER],
    "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.5)}},
    "loops": {"fit_loop": {"state_dict": {}}}, "hyper_parameters": {"lr": 0.1},
}  # fmt: skip
FITTING = {
    "bare": STATE,
    **{name: {name: STATE, "epoch": 3, "optimizer": OPTIMIZER} for name in
       ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights",
        "model_ema", "ema", "ema_state_dict", "params_ema", "generator", "module")},
    **{f"prefix {prefix}": prefixed(prefix, STATE) for prefix in
       ("module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "_orig_mod.module.", "model.module.",
        "model._orig_mod.", "segmentation_model.", "a.b.c.")},
    "Lightning": {**LIGHTNING, "state_dict": prefixed("model.", STATE)},
    "Lightning, compiled": {**LIGHTNING, "state_dict": prefixed("model._orig_mod.", STATE)},
    "AveragedModel": {"n_averaged": torch.tensor(5), **prefixed("module.", STATE)},
    "model_ema of AveragedModel": {"model_ema": {"n_averaged": torch.tensor(5), **prefixed("module.", STATE)}},
    "AveragedModel of DDP": {"ema": {"n_averaged": torch.tensor(5), **prefixed("module.module.", STATE)}},
    "nested": {"checkpoint": {"model": {"state_dict": prefixed("module.", STATE)}}},
    "compiled part": {key.replace("2.0", "2._orig_mod.0"): value for key, value in STATE.items()},
    "checkpointed part": {key.replace("2.0", "2._checkpoint_wrapped_module.0"): value for key, value in STATE.items()},
    "mask_values": {**STATE, "mask_values": [0, 1]},
    "mask_values of DDP": {"state_dict": {**prefixed("module.", STATE), "mask_values": [[0, 0, 0], [1, 1, 1]]}},
    "another net beside": {"model": STATE, "discriminator": {"0.weight": torch.zeros(1)}},
}  # fmt: skip


@pytest.mark.parametrize("kind", FITTING)
def test_is_taken_off(kind, tmp_path):
    torch.save(FITTING[kind], tmp_path / "w.pth")
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing was left out that a user should know of
        load_weights(model, tmp_path / "w.pth")
    for key, value in model.state_dict().items():
        assert torch.equal(value, STATE[key]), key


@pytest.mark.parametrize("prefix", ["", "model.", "module._orig_mod."])
def test_safetensors(prefix, tmp_path):
    pytest.importorskip("safetensors.torch").save_file(prefixed(prefix, STATE), tmp_path / "w.safetensors")
    model = network()
    load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(value, STATE[key]) for key, value in model.state_dict().items())


def test_entries_beside_the_net_are_named(tmp_path):
    """Lightning saves the loss's buffers and metrics too."""
    beside = {"criterion.weight": torch.ones(2), "iou.confmat": torch.ones(2, 2)}
    torch.save({**LIGHTNING, "state_dict": {**prefixed("model.", STATE), **beside}}, tmp_path / "w.ckpt")
    model = network()
    with pytest.warns(UserWarning, match=r"w.ckpt: criterion.weight, iou.confmat beside 'model.' left out"):
        load_weights(model, tmp_path / "w.ckpt")
    assert all(torch.equal(value, STATE[key]) for key, value in model.state_dict().items())


AMBIGUOUS = {
    "two dictionaries": ({"model": STATE, "model_ema": OTHER}, "'model', 'model_ema'"),
    "their wrappers": (
        {"state_dict": prefixed("model.", STATE), "ema": {"n_averaged": torch.tensor(1), **prefixed("module.", OTHER)}},
        "'state_dict.model', 'ema.module'",
    ),
    "two prefixes": (
        {"state_dict": {**prefixed("model.", STATE), **prefixed("ema_model.module.", OTHER)}},
        "'state_dict.model', 'state_dict.ema_model.module'",
    ),
    "outermost and inside": ({**STATE, "ema": OTHER}, "its outermost names, 'ema'"),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_ambiguity_names_what_fits(kind, tmp_path):
    content, named = AMBIGUOUS[kind]
    torch.save(content, tmp_path / "w.pth")
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"holds 2 sets of weights that fit: {named}; choose one"):
        load_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "key", "want"),
    [
        ("two dictionaries", "model", STATE),
        ("two dictionaries", "model_ema", OTHER),
        ("their wrappers", "ema", OTHER),
        ("their wrappers", "state_dict", STATE),
        ("two prefixes", "ema_model", OTHER),
        ("two prefixes", "state_dict.model", STATE),
        ("outermost and inside", "", STATE),
        ("outermost and inside", "ema", OTHER),
    ],
)
def test_a_key_chooses(kind, key, want, tmp_path):
    torch.save(AMBIGUOUS[kind][0], tmp_path / "w.pth")
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what stands beside it is named
        load_weights(model, tmp_path / "w.pth", key=key)
    assert all(torch.equal(value, want[k]) for k, value in model.state_dict().items())


@pytest.mark.parametrize(("key", "which"), [("teacher", "none"), ("state_dict", "several")])
def test_a_key_that_does_not_choose(key, which, tmp_path):
    torch.save(AMBIGUOUS["two prefixes"][0], tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"{which} of what fits is under '{key}'; what fits: 'state_dict.model'"):
        load_weights(network(), tmp_path / "w.pth", key=key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.0.weight": None}, r"1 missing \(model.0.weight\), which are looked for under 'state_dict.model'"),
        ({"model.3.weight": torch.zeros(1)}, r"1 unexpected \(model.3.weight\), which are"),
        ({"model.0.bias": torch.zeros(9)}, r"1 mismatched \(0.bias: float32 \(9,\) in the file"),
        ({"model.0.bias": "text"}, r"1 mismatched \(0.bias: str in the file"),
        ({"model.0.bias": torch.full((4,), float("nan"))}, r"1 not finite \(0.bias\)"),
        ({"model.mask_valued": [1]}, r"1 unexpected \(model.mask_valued\)"),
    ],
)
def test_wrapped_weights_are_distrusted_as_bare_ones(change, message, tmp_path):
    state = {key: value for key, value in {**prefixed("model.", STATE), **change}.items() if value is not None}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_unknown_prefix_shared_by_some_is_no_wrapper(tmp_path):
    torch.save({**prefixed("backbone.", STATE), "classifier.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"1 unexpected \(classifier.weight\)"):
        load_weights(network(), tmp_path / "w.pth")


def test_what_refers_to_itself_ends():
    """A pickle may hold a dictionary in itself; names may have any number of dots."""
    loop: dict = {"w": torch.zeros(1)}
    loop["again"] = loop
    loop["deep"] = {"." * 10_000: torch.zeros(1), "x": {"x": {"x": {"x": {"x": STATE}}}}}
    from fastseg.models.keys import model_forms

    assert locate(loop, model_forms(network()), "w.pth").missing  # STATE lies deeper than is looked


@pytest.mark.parametrize("prefix", ["", "encoder.", "backbone.", "model.encoder.", "module.backbone."])
def test_encoder_out_of_a_whole_model(prefix, tmp_path):
    """Its decoder is named as left out; a classifier is not worth a line."""
    encoder = ENCODERS["resnet18"](width=0.05)
    state = {**numbered(encoder), "fc.weight": torch.zeros(3)}
    rest = {"model.decoder.weight": torch.zeros(1)} if prefix else {}
    torch.save({"state_dict": {**prefixed(prefix, state), **rest}}, tmp_path / "w.pth")
    target = create("fcn", 4, backbone="resnet18", stride=4, width=0.05)
    if prefix:
        with pytest.warns(UserWarning, match=f"model.decoder.weight beside '{prefix}' left out"):
            load_encoder_weights(target, tmp_path / "w.pth")
    else:
        load_encoder_weights(target, tmp_path / "w.pth")
    assert all(torch.equal(value, state[key]) for key, value in target.backbone.state_dict().items())


def test_the_payload_of_training_is_still_read(tmp_path):
    torch.save({"model": "unet", "state_dict": STATE, "training": {"optimizer": OPTIMIZER}}, tmp_path / "last.pt")
    assert read_payload(tmp_path / "last.pt")["model"] == "unet"
    load_weights(network(), tmp_path / "last.pt")
