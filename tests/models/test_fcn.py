"""FCN against golden numbers, public names, and the same networks in torch.nn.functional alone."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseg.nn
from fastseg import reference
from fastseg.models import FCN, create

VGG16_LAYERS = [f"conv{i}_{k}" for i, n in enumerate((2, 2, 3, 3, 3), 1) for k in range(1, n + 1)]
# The forms, as options; the last two kinds have their own plain version below.
VGG16 = [{"backbone": "vgg16", "stride": stride} for stride in (32, 16, 8)]
RESNET = [{"backbone": "resnet18", "stride": stride} for stride in (16, 8, 4)] + [{"backbone": "resnet50", "stride": 4}]
D2L = [{"backbone": "resnet18", "stride": 32}]
FORMS = VGG16 + RESNET + D2L
form_id = lambda form: f"{form['backbone']}-{form['stride']}s"


def learnt(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def narrow(**options) -> FCN:
    """fp64; batch norms that are not the identity, biases that are not zero."""
    model = FCN(4, **{"width": 0.05, **options}).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(t.data, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
        elif getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, std=0.3)
    return model


@pytest.fixture(autouse=True)
def _reference_path():
    with reference():
        yield


class TestGolden:
    @pytest.mark.parametrize(
        ("options", "fixed", "trainable"),
        [
            ({"backbone": "vgg16", "stride": 32}, 134_346_581, 136_152_917),
            ({"backbone": "vgg16", "stride": 16}, 134_357_354, 134_815_994),
            ({"backbone": "vgg16", "stride": 8}, 134_362_751, 134_489_759),
            ({"backbone": "vgg16", "stride": 8, "at_once": True}, 134_362_751, 134_489_759),
            ({"backbone": "resnet50", "stride": 4}, 36_099_236 - 7_056 - 28_224, 36_099_236),
            ({"backbone": "resnet101", "stride": 4}, 55_091_364 - 7_056 - 28_224, 55_091_364),
            # The article's code has the k64 kernel for the auxiliary scores, and a k16 one that it never uses.
            ({"backbone": "resnet50", "stride": 4, "aux": True}, 36_063_956, 38_018_468 - 21 * 21 * 16**2),
            ({"backbone": "resnet101", "stride": 4, "aux": True}, 55_056_084, 57_010_596 - 21 * 21 * 16**2),
            ({"backbone": "resnet18", "stride": 32}, 12_993_642 - 21 * 21 * 64**2, 12_993_642),
        ],
        ids=str,
    )
    def test_counts(self, options, fixed, trainable):
        with torch.device("meta"):
            assert learnt(FCN(21, **options)) == fixed
            assert learnt(FCN(21, **options, trainable_upsampling=True)) == trainable

    def test_parts(self):
        with torch.device("meta"):
            vgg16, resnet = FCN(21), FCN(21, "resnet101", 4)
        assert learnt(vgg16.fc6) + learnt(vgg16.fc7) == 119_545_856
        heads = [learnt(getattr(resnet, f"score{stride}")) for stride in (4, 8, 16, 32)]
        assert heads == [148_949, 592_789, 2_365_205, 9_448_981]

    @pytest.mark.parametrize(
        ("stride", "scores", "kernels"),
        [
            (32, ["score_fr"], {"upscore": 64}),
            (16, ["score_fr", "score_pool4"], {"upscore2": 4, "upscore16": 32}),
            (8, ["score_fr", "score_pool4", "score_pool3"], {"upscore2": 4, "upscore_pool4": 4, "upscore8": 16}),
        ],
    )
    def test_vgg16_names(self, stride, scores, kernels):
        """Those of wkentaro's pytorch-fcn, fixed kernels included."""
        with torch.device("meta"):
            state = FCN(21, stride=stride).state_dict()
        names = {f"{layer}.{kind}" for layer in [*VGG16_LAYERS, "fc6", "fc7", *scores] for kind in ("weight", "bias")}
        assert state.keys() == names | {f"{kernel}.weight" for kernel in kernels}
        for kernel, size in kernels.items():
            assert tuple(state[f"{kernel}.weight"].shape) == (21, 21, size, size)
        assert tuple(state["fc6.weight"].shape) == (4096, 512, 7, 7)
        assert tuple(state["score_fr.weight"].shape) == (21, 4096, 1, 1)

    def test_d2l_names(self):
        """Those of Sequential(*resnet18.children()[:-2]) with two modules added."""
        with torch.device("meta"):
            state = FCN(21, "resnet18", 32).state_dict()
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        assert {key.partition(".")[0] for key in state} == {*"014567", "final_conv", "transpose_conv"}
        assert shapes["0.weight"] == (64, 3, 7, 7)
        assert shapes["1.running_var"] == (64,)
        assert shapes["4.1.conv2.weight"] == (64, 64, 3, 3)
        assert shapes["7.0.downsample.0.weight"] == (512, 256, 1, 1)
        assert shapes["final_conv.weight"] == (21, 512, 1, 1)
        assert (shapes["transpose_conv.weight"], shapes["transpose_conv.bias"]) == ((21, 21, 64, 64), (21,))

    def test_resnet_names(self):
        with torch.device("meta"):
            state = FCN(21, "resnet50", 4, aux=True).state_dict()
        children = {"backbone", "score4", "score8", "score16", "score32", "up_score2", "up_score4", "up_score32"}
        assert {key.partition(".")[0] for key in state} == children
        assert tuple(state["backbone.layer4.2.conv3.weight"].shape) == (2048, 512, 1, 1)
        assert tuple(state["score16.0.weight"].shape) == (256, 1024, 3, 3)
        assert tuple(state["up_score4.weight"].shape) == (21, 21, 8, 8)

    @pytest.mark.parametrize("trainable", [False, True])
    @pytest.mark.parametrize("form", FORMS, ids=form_id)
    def test_kernels_are_bilinear(self, form, trainable):
        model = FCN(3, **form, width=0.05, trainable_upsampling=trainable)
        kernels = [module for module in model.modules() if isinstance(module, nn.ConvTranspose2d)]
        assert kernels
        for module in kernels:
            size = module.kernel_size[0]
            factor, centre = (size + 1) // 2, size / 2 - 0.5  # the reference's surgery.py, even sizes
            for y in range(size):
                for x in range(size):
                    tap = (1 - abs(y - centre) / factor) * (1 - abs(x - centre) / factor)
                    assert torch.equal(module.weight[:, :, y, x], torch.eye(3) * tap)
            assert module.weight.requires_grad is trainable


class TestEqualsPlainPytorch:
    # Odd, and divisible by 32: the crops, ceil-mode pools and cuts matter in the first.
    @pytest.mark.parametrize("size", [(65, 47), (32, 64)], ids=str)
    @pytest.mark.parametrize("form", [*FORMS, {**VGG16[2], "at_once": True}], ids=str)
    def test_forward_and_gradients(self, form, size):
        """In training, dropout and updated statistics included; kernels learnt, so that their gradients count too."""
        model = narrow(**form, trainable_upsampling=True)
        state = {key: value.detach().clone() for key, value in model.state_dict().items()}
        parameters = [state[key].requires_grad_() for key, _ in model.named_parameters()]
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        torch.manual_seed(1)
        want = PLAIN(form)(state, x, **form)
        torch.manual_seed(1)
        got = model(x)
        assert got.shape == (2, 4, *size)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
        upstream = torch.randn_like(want)
        got.backward(upstream)
        grads = torch.autograd.grad(want, parameters, upstream)
        for (key, parameter), grad in zip(model.named_parameters(), grads, strict=True):
            scale = 1e-9 * float(grad.abs().max()) + 1e-9
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-8, atol=scale, msg=lambda m, k=key: f"{k}: {m}")
        for key, buffer in model.named_buffers():
            if not key.endswith("num_batches_tracked"):
                torch.testing.assert_close(buffer, state[key], rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("form", [VGG16[1], VGG16[2], RESNET[2]], ids=form_id)
    def test_auxiliary_scores_are_those_of_32s(self, form):
        model = narrow(**form, aux=True)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        x = torch.randn(2, 3, 65, 47, dtype=torch.float64)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        logits, auxiliary = model(x)
        torch.testing.assert_close(logits, PLAIN(form)(copy.deepcopy(state), x, **form, p=0.0), rtol=1e-9, atol=1e-10)
        want = PLAIN(form)(copy.deepcopy(state), x, form["backbone"], 32, p=0.0)
        torch.testing.assert_close(auxiliary, want, rtol=1e-9, atol=1e-10)

        target = torch.randint(4, (2, 65, 47))
        model.load_state_dict(state)
        loss = F.cross_entropy(logits, target) + 0.5 * F.cross_entropy(auxiliary, target)
        torch.testing.assert_close(model.loss(x, target), loss, rtol=1e-9, atol=0)
        model.eval()
        assert isinstance(model(x), Tensor)
        torch.testing.assert_close(model.loss(x, target), F.cross_entropy(model(x), target), rtol=1e-9, atol=0)


@pytest.mark.parametrize("form", FORMS, ids=form_id)
class TestFusedHeads:
    # One pixel; odd; divisible by 32; a side that leaves one pixel in the last row of blocks.
    @pytest.mark.parametrize("size", [(1, 1), (65, 47), (32, 64), (33, 129)], ids=str)
    def test_predict_is_argmax_of_forward(self, form, size):
        model = narrow(**form).eval()
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            full, classes = model(x), model.predict(x)
        assert full.shape == (2, 4, *size)
        assert (classes.dtype, classes.shape) == (torch.uint8, (2, *size))
        assert classes.is_contiguous()
        best, second = full.topk(2, dim=1).values.unbind(1)
        clear = best - second > 1e-9 * full.abs().max()
        assert clear.float().mean() > 0.9
        assert torch.equal(classes[clear].long(), full.argmax(1)[clear])

    @pytest.mark.parametrize(
        ("size", "dtype", "options"),
        [
            ((33, 65), torch.uint8, {}),  # the default ignore_index, -100, is no uint8
            ((65, 47), torch.uint8, {"ignore_index": 255, "reduction": "none"}),
            ((32, 64), torch.int64, {"ignore_index": 2}),
            ((1, 1), torch.int32, {"reduction": "sum", "label_smoothing": 0.1}),
        ],
        ids=str,
    )
    def test_loss(self, form, size, dtype, options):
        """Value, and gradients of all that is learnt; in eval, where a pixel is enough for batch norm."""
        model = narrow(**form).eval()
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        target = torch.randint(4, (2, *size), dtype=dtype)
        if options.get("ignore_index") == 255:
            target[:, :9] = 255
        options = {**options, "weight": torch.rand(4, dtype=torch.float64)}
        parameters = [p for p in model.parameters() if p.requires_grad]
        loss, want = model.loss(x, target, **options), F.cross_entropy(model(x), target.long(), **options)
        torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-12)
        grads = torch.autograd.grad(loss.sum(), parameters)
        for grad, other in zip(grads, torch.autograd.grad(want.sum(), parameters), strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-7, atol=1e-9 * float(other.abs().max()) + 1e-12)


@pytest.mark.parametrize("change", ["learnt", "loaded"])
@pytest.mark.parametrize("form", [VGG16[2], RESNET[2], *D2L], ids=form_id)
def test_other_kernels_are_honoured(form, change):
    """Kernels that were learnt, or loaded with values off the diagonal, are what predict and loss use."""
    model = narrow(**form, trainable_upsampling=change == "learnt").eval()
    state = {
        k: v + torch.randn_like(v) if v.shape[2:3] > (7,) or "up" in k else v for k, v in model.state_dict().items()
    }
    model.load_state_dict(state)
    x, target = torch.randn(1, 3, 40, 33, dtype=torch.float64), torch.randint(4, (1, 40, 33))
    with torch.no_grad():
        want = PLAIN(form)(state, x, **form, training=False)
        torch.testing.assert_close(model(x), want, rtol=1e-9, atol=1e-9)
        assert torch.equal(model.predict(x).long(), want.argmax(1))
        torch.testing.assert_close(model.loss(x, target), F.cross_entropy(want, target))


@pytest.mark.parametrize("form", [VGG16[2], RESNET[2], *D2L], ids=form_id)
def test_fused_heads_see_low_resolution_logits(form, monkeypatch):
    """What reaches them: the logits, framed by one pixel at most."""
    seen = []
    for name in ("UpsampleArgmax", "UpsampleCrossEntropyLoss"):
        head = getattr(fastseg.nn, name)
        run = head.forward

        def watched(self, x, *args, run=run, **options):
            seen.append(x.shape)
            return run(self, x, *args, **options)

        monkeypatch.setattr(head, "forward", watched)
    model = narrow(**form).eval()
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
        logits = model.logits(x)
        model.predict(x)
        model.loss(x, torch.zeros(1, 64, 96, dtype=torch.int64))
    assert len(seen) == 2
    for shape in seen:
        for n, of_logits, side in zip(shape[2:], logits.shape[2:], (64, 96), strict=True):
            assert n <= min(of_logits, math.ceil(side / form["stride"])) + 2


@pytest.mark.parametrize("form", FORMS, ids=form_id)
def test_copies_are_independent(form):
    model = narrow(**form).eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        want = model(x)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(x), want)
        assert not model.logits(x).equal(twin.logits(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "vgg19"}, "no backbone 'vgg19'; use one of vgg16, resnet18, resnet34, resnet50, resnet101"),
        ({"stride": 4}, "stride is 4; with vgg16 use one of 32, 16, 8"),
        ({"backbone": "resnet50", "stride": 2}, "stride is 2; with resnet50 use one of 32, 16, 8, 4"),
        ({"stride": 32, "aux": True}, "aux=True at stride 32"),
        ({"stride": 16, "at_once": True}, "at_once=True with vgg16 at stride 16"),
        ({"backbone": "resnet18", "at_once": True}, "at_once=True with resnet18 at stride 8"),
        ({"preset": "d2l"}, "no preset 'd2l'; use \"torchvision\" or None"),
        ({"preset": "torchvision", "backbone": "vgg16"}, "backbone 'vgg16', stride 8.*; it has a ResNet at stride 8"),
        ({"preset": "torchvision", "stride": 4}, "stride 4.*; it has a ResNet at stride 8"),
        ({"preset": "torchvision", "trainable_upsampling": True}, "no kernel to learn"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"width": -1.0}, "width is -1.0"),
    ],
)
def test_bad_option(options, message):
    with pytest.raises(ValueError, match=message):
        create("fcn", **{"num_classes": 2, **options})


def test_target_of_another_size():
    with pytest.raises(ValueError, match=r"x is \(1, 3, 64, 64\), target is \(1, 32, 64\); give them equal sides"):
        narrow().loss(torch.zeros(1, 3, 64, 64), torch.zeros(1, 32, 64, dtype=torch.int64))


# ---------------------------------------------------------------------------------------------------------------------
# The same networks from a state_dict.


def PLAIN(form: dict):
    return plain_vgg16 if form["backbone"] == "vgg16" else plain_d2l if form in D2L else plain_resnet


def plain_vgg16(state, x, backbone, stride, at_once=False, training=True, p=0.5) -> Tensor:
    conv = lambda x, name, pad=0: F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=pad)
    up = lambda x, name, stride: F.conv_transpose2d(x, state[f"{name}.weight"], stride=stride)
    crop = lambda x, n, like: x[:, :, n : n + like.shape[2], n : n + like.shape[3]]
    image, pools = x, []
    for i, convolutions in enumerate((2, 2, 3, 3, 3), 1):
        for k in range(1, convolutions + 1):
            x = F.relu(conv(x, f"conv{i}_{k}", 100 if i == k == 1 else 1))
        x = F.max_pool2d(x, 2, 2, ceil_mode=True)
        pools.append(x)
    x = F.dropout(F.relu(conv(x, "fc6")), p, training)
    x = F.dropout(F.relu(conv(x, "fc7")), p, training)
    x = conv(x, "score_fr")
    if stride == 32:
        return crop(up(x, "upscore", 32), 19, image)
    x = up(x, "upscore2", 2)
    x = x + crop(conv(pools[3] * (0.01 if at_once else 1), "score_pool4"), 5, x)
    if stride == 16:
        return crop(up(x, "upscore16", 16), 27, image)
    x = up(x, "upscore_pool4", 2)
    x = x + crop(conv(pools[2] * (0.0001 if at_once else 1), "score_pool3"), 9, x)
    return crop(up(x, "upscore8", 8), 31, image)


def plain_norm(state, x, name, training) -> Tensor:
    mean, var, weight, bias = (state[f"{name}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias, training, momentum=0.1, eps=1e-5)


def plain_encoder(state, x, depth, names, training) -> list[Tensor]:
    """The four stages; ``names`` of conv1, bn1 and the layers."""
    conv = lambda x, name, *args: F.conv2d(x, state[f"{name}.weight"], None, *args)
    norm = lambda x, name: plain_norm(state, x, name, training)
    x = F.max_pool2d(F.relu(norm(conv(x, names[0], 2, 3), names[1])), 3, 2, 1)
    features = []
    for i, blocks in enumerate({18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]):
        for k in range(blocks):
            name, skip, stride = f"{names[2 + i]}.{k}", x, 2 if i > 0 and k == 0 else 1
            if depth == 18:
                x = F.relu(norm(conv(x, f"{name}.conv1", stride, 1), f"{name}.bn1"))
                x = norm(conv(x, f"{name}.conv2", 1, 1), f"{name}.bn2")
            else:
                x = F.relu(norm(conv(x, f"{name}.conv1"), f"{name}.bn1"))
                x = F.relu(norm(conv(x, f"{name}.conv2", stride, 1), f"{name}.bn2"))
                x = norm(conv(x, f"{name}.conv3"), f"{name}.bn3")
            if f"{name}.downsample.0.weight" in state:
                skip = norm(conv(skip, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            x = F.relu(x + skip)
        features.append(x)
    return features


def plain_resnet(state, x, backbone, stride, training=True, p=0.1) -> Tensor:
    """The article's, extended to any size by cutting what is upsampled at the bottom and right."""

    def head(x, name):
        x = F.conv2d(x, state[f"{name}.0.weight"], None, 1, 1)
        x = F.dropout(F.leaky_relu(plain_norm(state, x, f"{name}.1", training), 0.01), p, training)
        return F.conv2d(x, state[f"{name}.4.weight"], state[f"{name}.4.bias"])

    def up(x, factor, like):
        x = F.conv_transpose2d(x, state[f"up_score{factor}.weight"], None, factor, factor // 2)
        return x[:, :, : like.shape[2], : like.shape[3]]

    names = [f"backbone.{n}" for n in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")]
    features = plain_encoder(state, x, int(backbone.removeprefix("resnet")), names, training)
    y = head(features[3], "score32")
    for i, nominal in ((2, 16), (1, 8), (0, 4)):
        if nominal >= stride:
            skip = head(features[i], f"score{nominal}")
            y = up(y, 2, skip) + skip
    return up(y, stride, x)


def plain_d2l(state, x, backbone, stride, training=True) -> Tensor:
    deep = plain_encoder(state, x, int(backbone.removeprefix("resnet")), list("014567"), training)[3]
    y = F.conv2d(deep, state["final_conv.weight"], state["final_conv.bias"])
    y = F.conv_transpose2d(y, state["transpose_conv.weight"], state["transpose_conv.bias"], 32, 16)
    return y[:, :, : x.shape[2], : x.shape[3]]
