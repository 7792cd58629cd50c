"""DeepLabV2, V3 and V3+ against their golden numbers and against the same nets in torch.nn.functional alone."""

import copy
import hashlib
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from nets import unsettle
from PIL import Image
from plain_deeplab import Plain, plain_v2, plain_v3, plain_v3plus
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg import explain, reference
from fastseg.models import DeepLabV2, DeepLabV3, DeepLabV3Plus, create
from fastseg.models.encoders import Xception65
from fastseg.models.encoders.xception import Block
from fastseg.ops.core.dispatch import INTERPRETED

SMALL = {"width": 0.05, "decoder_channels": 16}
XCEPTION = {**SMALL, "backbone": "xception", "encoder_options": {"middle_blocks": 2}}
# At width 0.1 neighbouring stages of MobileNetV2 have equal widths: a block that lost its stride must have no residual.
FORMS = {
    "mobilenet 0.1": ({"width": 0.1, "decoder_channels": 16}, plain_v3plus),
    "mobilenet 0.5": ({"width": 0.5, "decoder_channels": 16}, plain_v3plus),
    "mobilenet google": ({**SMALL, "preset": "google"}, lambda net, x: plain_v3plus(net, x, preset="google")),
    "xception": (XCEPTION, lambda net, x: plain_v3plus(net, x, "xception")),
    "xception google": ({**XCEPTION, "preset": "google"}, lambda net, x: plain_v3plus(net, x, "xception", "google")),
    "resnet50": ({**SMALL, "backbone": "resnet50"}, lambda net, x: plain_v3plus(net, x, "resnet50")),
    "v3 resnet50": ({"backbone": "resnet50", "aux": True, "width": 0.05, "channels": 8}, plain_v3),
    "v3 resnet18": ({"backbone": "resnet18", "aux": True, "width": 0.1, "channels": 8}, plain_v3),
    "v2": ({"backbone": "resnet50", "width": 0.05}, lambda net, x: plain_v2(net, x, (0.5, 0.75))),
    "v2, one scale": ({"backbone": "resnet50", "width": 0.05, "scales": ()}, lambda net, x: plain_v2(net, x, ())),
}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def build(form: str, output_stride: int, classes: int = 4) -> nn.Module:
    kind = {"v2": DeepLabV2, "v3": DeepLabV3}.get(form[:2], DeepLabV3Plus)
    return unsettle(kind(classes, output_stride=output_stride, **FORMS[form][0]))


def listed(y: Tensor | list[Tensor]) -> list[Tensor]:
    return y if isinstance(y, list) else [y]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize("form", FORMS)
def test_equals_plain_pytorch(form, output_stride, training):
    """Logits, every gradient, running statistics."""
    model = build(form, output_stride).train(training)
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    learnt = {key: state[key].requires_grad_() for key, _ in model.named_parameters()}
    x = torch.randn(2, 3, 65, 47, dtype=torch.float64)

    torch.manual_seed(1)  # dropout
    want = listed(FORMS[form][1](Plain(state, output_stride, training), x))
    if form == "v2, one scale":
        want = want[:1]
    upstream = [torch.randn_like(y) for y in want]
    used = {key: p for key, p in learnt.items() if training or not key.startswith("aux_classifier")}
    want_grads = dict(zip(used, torch.autograd.grad(want, list(used.values()), upstream), strict=True))
    torch.manual_seed(1)
    with reference():
        got = listed(model(x))
        torch.autograd.backward(got, upstream)

    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    scale = float(torch.stack([u.norm() for u in upstream]).norm())
    for key, parameter in model.named_parameters():
        if key in used:  # atol: through a bias before batch norm in training flows nothing but rounding
            torch.testing.assert_close(
                parameter.grad, want_grads[key], rtol=1e-8, atol=1e-9 * scale, msg=lambda m, k=key: f"{k}: {m}"
            )
    for key, buffer in model.named_buffers():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(buffer, state[key], rtol=1e-9, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("form", ["xception", "xception google"])
def test_kernels_equal_plain_pytorch(form, device):
    """Small maps under the interpreter: what is fused in evaluation, folded norms included."""
    dtype, tolerance = (torch.float64, 1e-9) if device == "cpu" else (torch.float32, 1e-3)
    model = build(form, 16).eval().to(device, dtype, memory_format=torch.channels_last)
    x = torch.randn(1, 3, 24, 24, device=device, dtype=dtype)
    with torch.no_grad(), explain() as report:
        got = model(x)
        want = FORMS[form][1](Plain(model.state_dict(), 16, False), x)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert {"separable_conv2d"} <= {d.op for d in report if d.path == "triton"}


@pytest.mark.skipif(not INTERPRETED, reason="fp64 through the kernels")
@pytest.mark.parametrize("rectified", [False, True])
def test_kernels_train_a_block_as_plain_pytorch(rectified):
    """A block of the middle flow, whose ReLU leaks: gradients and statistics; the whole net is compared above."""
    block = unsettle(Block(8, 8, 8, 1, 2, google=False)).train().to(memory_format=torch.channels_last)
    twin, x = copy.deepcopy(block), torch.randn(2, 8, 6, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for net, scope in ((block, nullcontext()), (twin, reference())):
        with scope:
            y, before = net(x.relu() if rectified else x, rectified=rectified, rectify=rectified)
        grads = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), [x, *net.parameters()])
        results.append((y, before, *grads, *net.buffers()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def golden(model: nn.Module) -> tuple[int, int, int, str]:
    """Parameters, elements of buffers, keys, hash of the sorted names and shapes without num_batches_tracked."""
    state = model.state_dict()
    lines = sorted(f"{key} {tuple(v.shape)}" for key, v in state.items() if not key.endswith("num_batches_tracked"))
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return parameters(model), sum(b.numel() for b in model.buffers()), len(state), digest[:16]


def on_meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return create(name, 21, **options)


class TestGolden:
    def test_v3plus(self):
        """The public weights of both backbones."""
        assert golden(on_meta("deeplabv3plus")) == (5_818_149, 35_804, 371, "62e5495a6bd3874e")
        assert golden(on_meta("deeplabv3plus", backbone="xception")) == (54_713_557, 189_533, 857, "4acb22b136cc6aaa")
        counts = [parameters(child) for child in on_meta("deeplabv3plus", backbone="xception").children()]
        assert [n for n in counts if n] == [37_867_312, 15_536_640, 12_432, 1_291_776, 5_397]

    def test_v3plus_google(self):
        model = on_meta("deeplabv3plus", backbone="xception", preset="google")
        assert parameters(model) == 41_055_413
        assert parameters(model.aspp) == 3_019_776
        assert parameters(model.shortcut_conv) + parameters(model.cat_conv) == 162_928

    def test_v3(self):
        """torchvision's."""
        counts = {
            (backbone, aux): parameters(on_meta("deeplabv3", backbone=backbone, aux=aux))
            for backbone in ("resnet50", "resnet101")
            for aux in (False, True)
        }
        assert list(counts.values()) == [39_638_869, 42_004_074, 58_630_997, 60_996_202]
        keys = list(on_meta("deeplabv3", aux=True).state_dict())
        for key in (
            "backbone.layer4.2.conv3.weight", "classifier.0.convs.0.0.weight", "classifier.0.convs.4.1.weight",
            "classifier.0.convs.4.2.running_var", "classifier.0.project.1.bias", "classifier.1.weight",
            "classifier.4.bias", "aux_classifier.0.weight", "aux_classifier.4.bias",
        ):  # fmt: skip
            assert key in keys

    def test_v2(self):
        model = on_meta("deeplabv2")
        assert parameters(model) == 44_048_532
        assert parameters(model.aspp) == 1_548_372

    @pytest.mark.parametrize("backbone", ["mobilenet_v2", "xception", "resnet18"])
    def test_momentum_of_google(self, backbone):
        """Of every norm, the backbone's too."""
        model = on_meta("deeplabv3plus", backbone=backbone, preset="google")
        assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {3e-4}
        article = on_meta("deeplabv3plus", backbone=backbone)
        assert {m.momentum for m in article.aspp.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}

    def test_norms_of_google(self):
        """1e-3 in Xception, 1e-5 around it; the last three convolutions dilated twice as much."""
        model = on_meta("deeplabv3plus", backbone="xception", preset="google", output_stride=8)
        eps = {name.startswith("backbone"): m.eps for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        assert eps == {True: 1e-3, False: 1e-5}
        assert model.backbone.conv5.depthwise.dilation == (4, 4)
        assert model.backbone.block20.sepconv1.depthwise.dilation == (2, 2)


def test_the_leak_is_the_preset():
    """The same weights give other logits without it."""
    nets = [
        Xception65(output_stride=16, width=0.05, middle_blocks=1, preset=p).eval() for p in ("bubbliiiing", "google")
    ]
    for module in nets[1].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5
    nets[1].conv3.depthwise.dilation = nets[1].conv4.depthwise.dilation = nets[1].conv5.depthwise.dilation = (1, 1)
    for layer in (nets[1].conv3, nets[1].conv4, nets[1].conv5):
        layer.depthwise.padding = (1, 1)
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(1, 3, 33, 33)
    with torch.no_grad(), reference():
        a, b = (net(x) for net in nets)
        torch.testing.assert_close(a[3], b[3])
        assert not torch.allclose(a[5], b[5], atol=1e-3)
        y = torch.randn(1, nets[0].block4.sepconv1.depthwise.in_channels, 5, 5)
        leaky, plain = nets[0].block4(y), nets[1].block4(y)
        torch.testing.assert_close(leaky - plain, y.relu() - y, rtol=1e-4, atol=1e-5)


def test_logits_are_those_before_the_last_resize():
    model = build("mobilenet 0.1", 16)
    x = torch.randn(2, 3, 65, 47, dtype=torch.float64)
    model.eval()
    with reference(), torch.no_grad():
        full = F.interpolate(model.logits(x), size=(65, 47), mode="bilinear", align_corners=True)
        torch.testing.assert_close(full, model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name, form", [("deeplabv3", "v3 resnet18"), ("deeplabv2", "v2")])
def test_loss_of_several_heads(name, form):
    """That of the list which ``forward`` gives in training: V3 halves the auxiliary head's, V2 adds all."""
    model = build(form, 8).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x, target = torch.randn(2, 3, 33, 33, dtype=torch.float64), torch.randint(4, (2, 33, 33))
    with reference():
        losses = [F.cross_entropy(y, target) for y in model(x)]
        want = losses[0] + 0.5 * losses[1] if name == "deeplabv3" else sum(losses)
        torch.testing.assert_close(model.loss(x, target), want)


class TestV2TrainsAsItsReference:
    """``preset="kazuto"``; the outputs themselves are compared in test_keys.py."""

    @pytest.fixture
    def model(self):
        return unsettle(DeepLabV2(4, "resnet50", width=0.05, preset="kazuto")).train()

    def test_momentum(self, model):
        norms = lambda net: {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)}
        assert (norms(model), norms(DeepLabV2(4, "resnet50", width=0.05))) == ({1e-3}, {0.1})

    @pytest.mark.parametrize("sides", [(61, 83), (65, 47), (33, 33)])
    def test_loss_is_of_labels_shrunk_to_each_output(self, model, sides):
        """As its script does it, by Pillow; every class, void and class weights."""
        target = torch.randint(4, (2, *sides))
        target[:, 3:9, 5:7] = 255
        x, weight = torch.randn(2, 3, *sides, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
        with reference():
            outputs = model(x)
            shrunk = [
                torch.stack([
                    torch.from_numpy(np.array(Image.fromarray(t.numpy().astype(np.float32)).resize(
                        y.shape[:1:-1], Image.Resampling.NEAREST))) for t in target
                ]).long() for y in outputs
            ]  # fmt: skip
            options = {"ignore_index": 255, "weight": weight}
            losses = [F.cross_entropy(y, t, **options) for y, t in zip(outputs, shrunk, strict=True)]
            assert len(losses) == 4
            torch.testing.assert_close(model.loss(x, target, **options), sum(losses), rtol=1e-9, atol=0)
            # A label counts as often as it stands for a pixel of the image.
            sums = [
                F.cross_entropy(y, t, **options, reduction="sum") * (target.numel() / t.numel())
                for y, t in zip(outputs, shrunk, strict=True)
            ]
            torch.testing.assert_close(model.loss(x, target, **options, reduction="sum"), sum(sums), rtol=1e-9, atol=0)
            with pytest.raises(ValueError, match='reduction is "none", and there are several sizes'):
                model.loss(x, target, reduction="none")

    def test_evaluation_is_the_same_net(self, model):
        other = DeepLabV2(4, "resnet50", width=0.05).double().eval()
        other.load_state_dict(model.eval().state_dict())
        x, target = torch.randn(2, 3, 33, 33, dtype=torch.float64), torch.randint(4, (2, 33, 33))
        with reference(), torch.no_grad():
            assert torch.equal(model(x), other(x))
            assert torch.equal(model.loss(x, target), other.loss(x, target))

    def test_one_scale(self):
        model = unsettle(DeepLabV2(4, "resnet50", width=0.05, scales=(), preset="kazuto")).train()
        x, target = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.randint(4, (2, 32, 32))
        with reference():
            (logits,) = model(x)
            centres = torch.tensor([3, 9, 16, 22, 28])  # of 5 pixels of 6.4
            want = F.cross_entropy(logits, target[:, centres][:, :, centres])
            torch.testing.assert_close(model.loss(x, target), want)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deeplabv3plus", {"backbone": "vgg16"}, "no backbone 'vgg16'; use one of mobilenet_v2"),
        ("deeplabv3plus", {"output_stride": 32}, "output_stride is 32; use 8 or 16"),
        ("deeplabv3plus", {"decoder_channels": 20}, "decoder_channels is 20; use a multiple of 16"),
        ("deeplabv3plus", {"num_classes": 0}, "num_classes is 0"),
        ("deeplabv3plus", {"width": -1.0}, "width is -1.0"),
        ("deeplabv3plus", {"preset": "vainf"}, "no preset 'vainf'; use one of bubbliiiing, google"),
        ("deeplabv3plus", {"backbone": "xception", "encoder_options": {"middle_blocks": 17}}, "middle_blocks is 17"),
        ("deeplabv3", {"backbone": "vgg16"}, "no backbone 'vgg16'"),
        ("deeplabv3", {"output_stride": 4}, "output_stride is 4"),
        ("deeplabv2", {"backbone": "resnet18"}, "no backbone 'resnet18'"),
        ("deeplabv2", {"preset": "google"}, "no preset 'google'; use \"kazuto\" or None"),
        ("deeplabv3", {"dilation_style": "timm"}, "dilation_style is 'timm'"),
        ("deeplabv2", {"scales": (1.5,)}, r"scales are \(1.5,\)"),
    ],
)
def test_bad_option(name, options, message):
    with pytest.raises(ValueError, match=message):
        create(name, **{"num_classes": 2, **options})
