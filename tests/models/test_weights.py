"""Loading weights: what is accepted, and that everything else is one clear error with nothing half loaded."""

import os
import pickle
import zipfile

import pytest
import torch
from torch import nn

from fastseg.models import FCN, create, load_encoder_weights, load_weights
from fastseg.models.encoders import ENCODERS


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


@pytest.fixture
def model() -> nn.Module:
    return network()


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {key: torch.rand_like(v) if v.is_floating_point() else v + 7 for key, v in network().state_dict().items()}


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.fixture
def refuses(model, tmp_path):
    """Check that the file (or the object, saved) gives a one-line ValueError and leaves the model alone."""

    def check(content: object, message: str) -> None:
        path = tmp_path / "weights.bin"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message) as caught:
            load_weights(model, path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        assert same(model, before)

    return check


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes(model, state, tmp_path, wrapper, prefix):
    content = {prefix + key: value for key, value in state.items()}
    torch.save({wrapper: content, "epoch": 3} if wrapper else content, tmp_path / "weights.pth")
    load_weights(model, str(tmp_path / "weights.pth"))
    assert same(model, state)


def test_safetensors(model, state, tmp_path):
    """Recognised by content: the name says nothing."""
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "weights.pth")
    load_weights(model, tmp_path / "weights.pth")
    assert same(model, state)


def test_old_format(model, state, tmp_path):
    torch.save(state, tmp_path / "weights.pth", _use_new_zipfile_serialization=False)
    load_weights(model, tmp_path / "weights.pth")
    assert same(model, state)


def test_half_precision_file_and_model(model, state, tmp_path):
    halves = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    torch.save(halves, tmp_path / "weights.pth")
    load_weights(model, tmp_path / "weights.pth")
    assert same(model, {key: value.to(state[key].dtype) for key, value in halves.items()})
    torch.save(state, tmp_path / "weights.pth")
    load_weights(model.half(), tmp_path / "weights.pth")
    assert same(model, halves)


def test_num_batches_tracked_may_be_absent(model, state, tmp_path):
    del state["1.num_batches_tracked"]
    torch.save(state, tmp_path / "weights.pth")
    load_weights(model, tmp_path / "weights.pth")
    assert same(model, {**state, "1.num_batches_tracked": torch.tensor(0)})


def test_all_faults_in_one_line(refuses, state):
    del state["0.bias"], state["1.running_mean"]
    state["2.weight"] = torch.zeros(5, 4, 1, 1)
    state["extra"] = torch.zeros(1)
    refuses(
        state,
        r"does not fit Sequential: 2 missing \(0.bias, 1.running_mean\); 1 unexpected \(extra\); "
        r"1 mismatched \(2.weight: float32 \(5, 4, 1, 1\) in the file, float32 \(2, 4, 1, 1\) in the model\)",
    )


def test_long_lists_are_cut(refuses):
    refuses({str(i): torch.zeros(1) for i in range(9)}, r"9 unexpected \(0, 1, 2, \.\.\.\)")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(refuses, state, value):
    state["2.weight"][1, 3] = value
    refuses(state, r"1 not finite \(2.weight\)")


def test_overflow_in_the_models_dtype(refuses, model, state):
    model.half()
    state["2.bias"][0] = 1e6
    refuses(state, r"1 not finite \(2.bias\)")


@pytest.mark.parametrize("wrong", [torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.complex64), "text", 3])
def test_wrong_kind(refuses, state, wrong):
    state["2.bias"] = wrong
    refuses(state, r"1 mismatched \(2.bias: (int32|complex64|str|int)")


def test_claimed_size_is_not_allocated(refuses, state):
    """A tensor of 10^12 elements that shares one is refused by its shape, before any value is looked at."""
    state["2.bias"] = torch.zeros(1).expand(10**12)
    refuses(state, r"2.bias: float32 \(1000000000000,\)")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {}, {1: torch.zeros(3)}, {"state_dict": {}}], ids=repr)
def test_not_a_dictionary_of_tensors(refuses, content):
    refuses(content, "not a dictionary of named tensors")


class Payload:
    """Its pickle makes a directory when it is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_code_is_not_executed(refuses, state, tmp_path, form):
    trap = tmp_path / "executed"
    content = {**state, "2.bias": Payload(str(trap))}
    if form == "pickle":
        (tmp_path / "weights.bin").write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, tmp_path / "weights.bin", _use_new_zipfile_serialization=form == "zip")
    refuses(None, "refused, not executed")
    assert not trap.exists()


def saved(state, tmp_path, form: str) -> bytes:
    path = tmp_path / f"whole.{form}"
    if form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    return path.read_bytes()


@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_truncated(refuses, state, tmp_path, form, kept):
    whole = saved(state, tmp_path, form)
    refuses(whole[: int(kept * len(whole))], "load_weights")


def test_flipped_bit(refuses, state, tmp_path):
    whole = bytearray(saved(state, tmp_path, "zip"))
    whole[whole.index(state["0.weight"].numpy().tobytes())] ^= 1
    refuses(bytes(whole), "checksum of .* is wrong")


def test_compressed_archive(refuses, state, tmp_path):
    """torch.load would map the compressed bytes as if they were numbers."""
    torch.save(state, tmp_path / "whole.zip")
    with (
        zipfile.ZipFile(tmp_path / "whole.zip") as source,
        zipfile.ZipFile(tmp_path / "weights.bin", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    refuses(None, "compressed archive")


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"hello world " * 30, b"PK\x03\x04" + b"\0" * 60, (10**12).to_bytes(8, "little") + b'{"w":1}'],
    ids=["empty", "newline", "text", "zip head", "huge safetensors header"],
)
def test_garbage(refuses, content):
    refuses(content, "cannot read|damaged")


def test_no_such_file(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file at .*; weights are read from local files only"):
        load_weights(model, tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match="no file at"):
        load_weights(model, tmp_path)


def torchvision_state(encoder: nn.Module, **classifier: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random weights under the encoder's names, which are torchvision's, and a classifier's."""
    state = {key: torch.rand_like(v) if v.is_floating_point() else v + 7 for key, v in encoder.state_dict().items()}
    return state | {key.replace("_", "."): torch.rand(shape) for key, shape in classifier.items()}


class TestEncoderWeights:
    @pytest.mark.parametrize("name", ["vgg16", "vgg16_bn", "resnet18", "resnet50"])
    @pytest.mark.parametrize("inside", [False, True])
    def test_by_name(self, tmp_path, name, inside):
        """Into an encoder and into a model that has one; the classifier is left out, the rest of the model stays."""
        encoder = ENCODERS[name](width=0.05)
        state = torchvision_state(encoder, classifier_0_weight=(5, 8), fc_bias=(3,))
        torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "w.pth")
        model = nn.Sequential(nn.Conv2d(3, 3, 1), encoder) if inside else encoder
        before = model[0].weight.clone() if inside else None
        load_encoder_weights(model, str(tmp_path / "w.pth"))
        assert same(encoder, state)
        assert before is None or torch.equal(model[0].weight, before)

    def test_fcn_on_vgg16(self, tmp_path):
        """fc6 and fc7 are the classifier's first two layers, as convolutions."""
        model = FCN(4, width=0.05, aux=True)
        hidden, channels = model.fc6.weight.shape[:2]
        state = torchvision_state(
            ENCODERS["vgg16"](width=0.05),
            classifier_0_weight=(hidden, channels * 49),
            classifier_0_bias=(hidden,),
            classifier_3_weight=(hidden, hidden),
            classifier_3_bias=(hidden,),
            classifier_6_weight=(10, hidden),
            classifier_6_bias=(10,),
        )
        torch.save(state, tmp_path / "w.pth")
        before = {key: value.clone() for key, value in model.state_dict().items() if "score" in key}
        load_encoder_weights(model, tmp_path / "w.pth")
        pooled = torch.rand(1, channels, 7, 7)
        want = nn.functional.linear(pooled.flatten(1), state["classifier.0.weight"], state["classifier.0.bias"])
        close = {"rtol": 1e-5, "atol": 1e-5}  # fp32 sums in another order
        torch.testing.assert_close(model.fc6(pooled).flatten(1), want, **close)
        torch.testing.assert_close(
            model.fc7(want[:, :, None, None]).flatten(1),
            nn.functional.linear(want, state["classifier.3.weight"], state["classifier.3.bias"]),
            **close,
        )
        for name, index in {"conv1_1": 0, "conv1_2": 2, "conv2_1": 5, "conv3_1": 10, "conv5_3": 28}.items():
            assert torch.equal(model.get_submodule(name).weight, state[f"features.{index}.weight"])
            assert torch.equal(model.get_submodule(name).bias, state[f"features.{index}.bias"])
        assert len(before) == 10
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())

    @pytest.mark.parametrize("stride", [32, 4])
    def test_fcn_on_resnet(self, tmp_path, stride):
        model, encoder = FCN(4, "resnet18", stride, width=0.05).eval(), ENCODERS["resnet18"](width=0.05).eval()
        state = torchvision_state(encoder, fc_weight=(10, 32), fc_bias=(10,))
        torch.save(state, tmp_path / "w.pth")
        load_encoder_weights(model, tmp_path / "w.pth")
        load_encoder_weights(encoder, tmp_path / "w.pth")
        x = torch.rand(1, 3, 32, 64)
        if stride == 32:
            assert torch.equal(model.logits(x), model.final_conv(encoder(x)[-1]))
        else:
            assert torch.equal(model.backbone(x)[-1], encoder(x)[-1])

    @pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched", "not finite"])
    def test_refused_as_a_whole(self, tmp_path, fault):
        model = FCN(4, "resnet18", 32, width=0.05)
        state = torchvision_state(ENCODERS["resnet18"](width=0.05), fc_bias=(10,))
        if fault == "missing":
            del state["bn1.bias"]
        elif fault == "unexpected":
            state["layer5.0.conv1.weight"] = torch.zeros(1)
        elif fault == "mismatched":
            state["conv1.weight"] = torch.zeros(64, 3, 7, 7)
        else:
            state["layer4.1.bn2.weight"][0] = float("nan")
        torch.save(state, tmp_path / "w.pth")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        message = rf"load_encoder_weights: .*w.pth does not fit the encoder of FCN: 1 {fault} \(\S+.*\)$"
        with pytest.raises(ValueError, match=message):
            load_encoder_weights(model, tmp_path / "w.pth")
        assert same(model, before)

    def test_no_encoder_to_fill(self, tmp_path):
        torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "w.pth")
        model = create("unet", 3, widths=(4, 8))
        with pytest.raises(TypeError, match="UNet has 0 encoders of type VGG16, ResNet, MobileNetV2, Xception65"):
            load_encoder_weights(model, tmp_path / "w.pth")
        with pytest.raises(FileNotFoundError, match="load_encoder_weights: no file at"):
            load_encoder_weights(ENCODERS["vgg16"](width=0.05), tmp_path / "absent.pth")
