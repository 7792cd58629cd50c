"""Weights in the names of other codes: the names are theirs, and the tensors land where the outputs are theirs."""

import hashlib
import warnings

import pytest
import torch
from public_nets import (
    Net,
    article_fcn,
    caffe_basic,
    caffe_segnet,
    kazuto_v2,
    smp_v3,
    timm_xception,
    torchvision_fcn,
    torchvision_mobilenet,
)
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg import reference
from fastseg.models import DeepLabV3Plus, create, load_encoder_weights, load_weights
from fastseg.models.encoders import ENCODERS, MobileNetV2, ResNet, Xception65
from fastseg.models.keys import Form, encoder_forms, model_forms

pytestmark = pytest.mark.filterwarnings("ignore:max_unpool")  # torch's own is the reference, and not deterministic


@pytest.fixture(autouse=True)
def _reference_path():
    with reference():
        yield


def form_of(model: nn.Module, source: str, *, encoder: bool = False):
    forms = encoder_forms(model, model.state_dict()) if encoder else model_forms(model)
    return next(form for form in forms if form.source == source)


def digest(model: nn.Module, source: str, *, encoder: bool = False) -> tuple[int, str]:
    """The number of the source's names and shapes, without num_batches_tracked, and a hash of them."""
    names, state = form_of(model, source, encoder=encoder).names, model.state_dict()
    shapes = {name: tuple(state[key].shape) for key, name in names.items() if not name.endswith("num_batches_tracked")}
    lines = "\n".join(sorted(f"{name} {shape}" for name, shape in shapes.items()))
    return len(shapes), hashlib.sha256(lines.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("build", "source", "want"),
    [
        # torchvision 0.28, timm 1.0.31, segmentation_models_pytorch 0.6: computed from their own state_dicts.
        (lambda: MobileNetV2(), "torchvision", (255, "169476a8b25caa92")),
        (lambda: ENCODERS["vgg16"](), "", (26, "4c3222feef6e051f")),
        (lambda: ENCODERS["vgg16_bn"](), "", (78, "350b0d820eb17db0")),
        (lambda: ResNet(18), "", (100, "43a9b5e01e6dc88a")),
        (lambda: ResNet(34), "", (180, "ccdf35a55b18384f")),
        (lambda: ResNet(50), "", (265, "9fb760970125b1e9")),
        (lambda: ResNet(101), "", (520, "5a1ad461b7161e1c")),
        (lambda: Xception65(preset="google"), "timm", (660, "f27b74985cabf4fc")),
        (lambda: Xception65(preset="google", middle_blocks=8), "timm", (420, "14cb7d919071777d")),
    ],
    ids=str,
)
def test_encoders_names_are_the_libraries(build, source, want):
    with torch.device("meta"):
        assert digest(build(), source, encoder=True) == want


SMP = {"dilation_style": "smp", "align_corners": True}


@pytest.mark.parametrize(
    ("name", "options", "source", "want", "parameters"),
    [
        ("deeplabv3", {**SMP}, "segmentation_models_pytorch", (302, "5e8da0520d49153c"), 39_638_869),
        ("deeplabv3", {**SMP, "backbone": "resnet101"}, "segmentation_models_pytorch", (557, "4aa0f2390a044a41"),
         58_630_997),
        ("deeplabv3", {**SMP, "backbone": "resnet18"}, "segmentation_models_pytorch", (137, "781a3b75767d705a"),
         15_904_085),
        ("fcn", {"preset": "torchvision"}, "", (272, "589ef230b31c48a9"), 32_957_013),
        ("fcn", {"preset": "torchvision", "aux": True}, "", (279, "d9e351b7fb37aa4a"), 35_322_218),
        ("fcn", {"preset": "torchvision", "backbone": "resnet101"}, "", (527, "c2b5ec50183d4289"), 51_949_141),
        ("fcn", {"preset": "torchvision", "backbone": "resnet101", "aux": True}, "", (534, "6d9a720bda79f45f"),
         54_314_346),
        ("deeplabv3", {}, "", (302, "29d8d53581f3cfdd"), 39_638_869),
        ("deeplabv3", {"aux": True}, "", (309, "ad984bc10d482262"), 42_004_074),
        ("deeplabv3", {"aux": True, "backbone": "resnet101"}, "", (564, "543484dba3b05e11"), 60_996_202),
    ],
    ids=str,
)  # fmt: skip
def test_models_names_are_the_libraries(name, options, source, want, parameters):
    with torch.device("meta"):
        model = create(name, 21, **options)
    assert digest(model, source) == want
    assert sum(p.numel() for p in model.parameters()) == parameters


def published(model: nn.Module, source: str | Form, *, encoder: bool = False, prefix: str = "") -> dict[str, Tensor]:
    """Random fp64 weights in the source's names."""
    form = source if isinstance(source, Form) else form_of(model, source, encoder=encoder)
    state, names = model.state_dict(), form.names
    made = {}
    for key, name in names.items():
        shape = state[key].shape
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            made[prefix + name] = torch.rand(shape, dtype=torch.float64) + 0.5
        else:
            made[prefix + name] = torch.randn(shape, dtype=torch.float64) / max(1, shape[1:].numel()) ** 0.5
    return made


def image(*sides: int) -> Tensor:
    return torch.randn(2, 3, *sides, dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


class TestEncoders:
    @pytest.mark.parametrize("inside", [False, True])
    def test_torchvision_mobilenet(self, inside, tmp_path):
        encoder = MobileNetV2(width=0.25).double().eval()
        state = published(encoder, "torchvision", encoder=True)
        rest = {"features.18.0.weight": torch.zeros(9), "classifier.1.bias": torch.zeros(3)}
        torch.save({**state, **rest}, tmp_path / "w.pth")
        model = DeepLabV3Plus(3, width=0.25, decoder_channels=16, output_stride=16).double() if inside else encoder
        load_encoder_weights(model, tmp_path / "w.pth")
        if inside:
            encoder.load_state_dict(model.backbone.state_dict())
        x = image(33, 65)
        with torch.no_grad():
            close(encoder(x)[-1], torchvision_mobilenet(Net(state), x))

    def test_the_articles_mobilenet(self, tmp_path):
        """Flat names, those of our own; torchvision's for the same tensors would give the same."""
        encoder = MobileNetV2(width=0.25)
        flat = {key: torch.rand_like(v) for key, v in encoder.state_dict().items() if v.is_floating_point()}
        rest = {"features.18.0.weight": torch.zeros(9), "classifier.weight": torch.zeros(3)}
        torch.save({"state_dict": {f"module.{k}": v for k, v in (flat | rest).items()}}, tmp_path / "w.pth.tar")
        model = DeepLabV3Plus(3, width=0.25, decoder_channels=16)
        load_encoder_weights(model, tmp_path / "w.pth.tar")
        got = model.backbone.state_dict()
        assert all(torch.equal(got[key], value) for key, value in flat.items())

    @pytest.mark.parametrize("middle_blocks", [2, 0])
    def test_timm_xception(self, middle_blocks, tmp_path):
        encoder = Xception65(width=0.05, preset="google", middle_blocks=middle_blocks).double().eval()
        state = published(encoder, "timm", encoder=True)
        torch.save({**state, "head.fc.weight": torch.zeros(3)}, tmp_path / "w.pth")
        load_encoder_weights(encoder, tmp_path / "w.pth")
        x = image(65, 33)
        with torch.no_grad():
            close(encoder(x)[-1], timm_xception(Net(state, eps=1e-3), x))

    def test_timm_xception_is_not_the_articles_net(self, tmp_path):
        options = {"width": 0.05, "encoder_options": {"middle_blocks": 1}, "decoder_channels": 16}
        model = DeepLabV3Plus(3, "xception", **options)
        torch.save(published(model.backbone, "timm", encoder=True), tmp_path / "w.pth")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=r'w.pth has names of timm: .* without the leak.* preset="google"'):
            load_encoder_weights(model, tmp_path / "w.pth")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        load_encoder_weights(DeepLabV3Plus(3, "xception", preset="google", **options), tmp_path / "w.pth")

    def test_the_articles_xception(self, tmp_path):
        encoder = Xception65(width=0.05, middle_blocks=1)
        state = {key: torch.rand_like(v) for key, v in encoder.state_dict().items() if v.is_floating_point()}
        torch.save({**state, "fc.weight": torch.zeros(3), "fc.bias": torch.zeros(3)}, tmp_path / "w.pth")
        model = DeepLabV3Plus(3, "xception", width=0.05, encoder_options={"middle_blocks": 1}, decoder_channels=16)
        load_encoder_weights(model, tmp_path / "w.pth")
        assert all(torch.equal(model.backbone.state_dict()[key], value) for key, value in state.items())

    def test_kazutos_resnet(self, tmp_path):
        """What DeepLabV2 begins with there: layers without "base."; no head."""
        model = create("deeplabv2", 3, backbone="resnet50", width=0.05)
        state = published(model.backbone, "kazuto1011", encoder=True)
        torch.save({**state, "aspp.c0.bias": torch.zeros(4), "fc.bias": torch.zeros(3)}, tmp_path / "w.pth")
        load_encoder_weights(model, tmp_path / "w.pth")
        got = model.backbone
        assert torch.equal(got.layer3[5].conv3.weight, state["layer4.block6.increase.conv.weight"].float())
        assert torch.equal(got.layer1[0].downsample[1].bias, state["layer2.block1.shortcut.bn.bias"].float())
        with pytest.raises(ValueError, match="have the stride first: build with msra=True"):
            load_encoder_weights(create("deeplabv3", 3, width=0.05, channels=8), tmp_path / "w.pth")


class TestModels:
    @pytest.mark.parametrize("training", [False, True])
    def test_kazutos_deeplabv2(self, training, tmp_path):
        """In training, with its norms held in evaluation as its script has them, its outputs are of their own sizes."""
        model = create("deeplabv2", 4, backbone="resnet50", width=0.05, preset="kazuto").double()
        state = published(model, "kazuto1011", prefix="base.")
        torch.save(state, tmp_path / "w.pth")
        load_weights(model, tmp_path / "w.pth")
        for module in model.train(training).modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        x = image(65, 97)
        with torch.no_grad():
            want, got = kazuto_v2(Net(state), x), model(x)
        if not training:
            close(got, F.interpolate(want[-1], size=(65, 97), mode="bilinear", align_corners=False))
            return
        assert [tuple(y.shape[2:]) for y in got] == [(9, 13), (5, 7), (7, 10), (9, 13)]
        for a, b in zip(got, want, strict=True):
            close(a, b)

    @pytest.mark.parametrize("parts", [("aspp", "conv", "bn"), ("0", "1", "2")], ids=["0.4 and later", "before"])
    def test_smps_deeplabv3(self, parts, tmp_path):
        model = create("deeplabv3", 4, width=0.05, channels=8, **SMP).double().eval()
        state = published(model, "segmentation_models_pytorch")
        for new, old in zip(("aspp", "conv", "bn"), parts, strict=True):
            state = {key.replace(f"decoder.{new}.", f"decoder.{old}."): value for key, value in state.items()}
        torch.save(state, tmp_path / "w.pth")
        load_weights(model, tmp_path / "w.pth")
        x = image(64, 96)
        with torch.no_grad():
            close(model(x), smp_v3(Net(state), x, parts))

    @pytest.mark.parametrize("options", [{}, {"dilation_style": "smp"}, {"align_corners": True}])
    def test_smps_weights_in_another_net_are_refused(self, options, tmp_path):
        model = create("deeplabv3", 4, width=0.05, channels=8, **options)
        torch.save(published(model, "segmentation_models_pytorch"), tmp_path / "w.pth")
        with pytest.raises(ValueError, match='build the model with dilation_style="smp" and align_corners=True'):
            load_weights(model, tmp_path / "w.pth")

    @pytest.mark.parametrize("aux", [False, True])
    def test_torchvisions_fcn(self, aux, tmp_path):
        """A file with the auxiliary head, as all published ones; without a place for it, it is named."""
        full = create("fcn", 4, preset="torchvision", aux=True, width=0.05)
        state = published(full, "")
        torch.save(state, tmp_path / "w.pth")
        model = create("fcn", 4, preset="torchvision", aux=aux, as_dict=aux, width=0.05).double().eval()
        if aux:
            load_weights(model, tmp_path / "w.pth")
        else:
            with pytest.warns(UserWarning, match="the auxiliary head is left out; a model built with aux=True"):
                load_weights(model, tmp_path / "w.pth")
        x = image(61, 72)
        with torch.no_grad():
            got, want = model(x), torchvision_fcn(Net(state), x)
            assert model.logits(x).shape == (2, 4, 8, 9)
            assert (model.predict(x).long() == want[0].argmax(1)).float().mean() > 0.999
        for a, b in zip(got.values() if aux else [got], want if aux else want[:1], strict=True):
            close(a, b)

    def test_torchvisions_deeplabv3_without_a_place_for_the_auxiliary_head(self, tmp_path):
        state = published(create("deeplabv3", 4, aux=True, width=0.05, channels=8), "")
        torch.save(state, tmp_path / "w.pth")
        model = create("deeplabv3", 4, width=0.05, channels=8)
        with pytest.warns(UserWarning, match="the auxiliary head is left out; a model built with aux=True"):
            load_weights(model, tmp_path / "w.pth")
        assert torch.equal(model.classifier[4].weight, state["classifier.4.weight"].float())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_weights(create("deeplabv3", 4, aux=True, width=0.05, channels=8), tmp_path / "w.pth")

    @pytest.mark.parametrize("names", ["the article's", "ours"])
    @pytest.mark.parametrize("aux", [False, True])
    def test_the_articles_fcn4s(self, aux, names, tmp_path):
        """With the two kernels that its forward never uses, and a dictionary of both outputs in evaluation."""
        whole = create("fcn", 4, backbone="resnet50", stride=4, aux=True, width=0.05)
        forms = [form for form in model_forms(whole) if form.source == "the FCN article"]
        article_form = next(form for form in forms if "pool1_FCNHead.0.weight" in form.names.values())
        article = published(whole, article_form)
        article |= {f"up_score{s}.0.weight": torch.randn(4, 4, 2 * s, 2 * s).double() for s in (2, 4, 8, 32)}
        stored = article
        if names == "ours":
            back = {theirs: ours for ours, theirs in article_form.names.items()}
            stored = {back.get(key, key.replace(".0.weight", ".weight")): value for key, value in article.items()}
            assert {"up_score8.weight", "score4.0.weight"} <= stored.keys()
        torch.save(stored, tmp_path / "w.pth")
        model = create("fcn", 4, backbone="resnet50", stride=4, aux=aux, as_dict=True, width=0.05).double().eval()
        load_weights(model, tmp_path / "w.pth")
        x = image(64, 32)
        with torch.no_grad():
            got, want = model(x), article_fcn(Net(article), x)
        assert list(got) == (["out", "aux"] if aux else ["out"])
        for key, value in got.items():
            close(value, want[key])


BN = {"statistics": (None, 1e-9), "scale and shift": (("running_mean", "running_var"), 1e-9), "absorbed": (None, 1e-9)}


class TestCaffesSegNet:
    """Files converted from Caffe: with statistics, with a norm's scale and shift alone, with no norms."""

    @pytest.mark.parametrize("kind", BN)
    @pytest.mark.parametrize("name", ["segnet", "segnet_basic"])
    def test_equals_caffes_net(self, name, kind, tmp_path):
        options = {"width": 0.02} if name == "segnet" else {"channels": 8}
        model = create(name, 4, **options).double().eval()
        state = published(model, "Caffe's SegNet")
        if kind == "scale and shift":
            state = {k: v for k, v in state.items() if "running" not in k}
            norm = lambda x, n: x * state[f"{n}.weight"].view(-1, 1, 1) + state[f"{n}.bias"].view(-1, 1, 1)
        elif kind == "absorbed":
            state = {k: v for k, v in state.items() if "_bn." not in k}
            norm = lambda x, n: x
        else:
            norm = Net(state, eps=1e-9).norm
        if name == "segnet_basic":
            state = {k: v for k, v in state.items() if not (k.startswith("conv_decode") and k.endswith("bias")
                                                            and "_bn" not in k)}  # fmt: skip
        blobs = {k: v.view(1, -1, 1, 1) if "_bn." in k else v for k, v in state.items()}  # as Caffe shapes them
        torch.save(blobs, tmp_path / "w.pth")
        load_weights(model, tmp_path / "w.pth")
        assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-9}
        x, run = image(45, 30), caffe_segnet if name == "segnet" else caffe_basic
        with torch.no_grad():
            got, want = model(x), run(Net(state), x, norm)
        # A norm of variance 1 divides by sqrt(1 + 1e-9).
        torch.testing.assert_close(got, want, rtol=1e-6, atol=2e-8 * float(want.abs().max()))

    def test_no_other_tensor_may_be_absent(self, tmp_path):
        model = create("segnet", 4, width=0.02)
        state = published(model, "Caffe's SegNet")
        del state["conv3_2_D.bias"]
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=r"1 missing \(conv3_2_D.bias\)"):
            load_weights(model, tmp_path / "w.pth")

    @pytest.mark.parametrize("name", ["segnet", "segnet_basic"])
    def test_eps(self, name):
        options = {"width": 0.02} if name == "segnet" else {"channels": 8}
        eps = lambda model: {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
        assert eps(create(name, 4, **options)) == {1e-5}
        assert eps(create(name, 4, **options, eps=1e-9)) == {1e-9}
        for bad in (0.0, -1e-5, 1.0, float("nan")):
            with pytest.raises(ValueError, match=f"eps is {bad}; use a number above 0"):
                create(name, 4, **options, eps=bad)
