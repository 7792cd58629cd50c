"""Every model against its golden numbers and against the same network written with torch.nn.functional alone."""

import hashlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg import explain, reference
from fastseg.kernels import config
from fastseg.models import DeepLabV3Plus, create, names
from fastseg.models.encoders import MobileNetV2

# The smallest form of each model that still has all its parts.
NARROW = {
    "deeplabv3plus": {"width": 0.1, "decoder_channels": 16},
    "fcn": {"backbone": "resnet18", "stride": 4, "aux": True, "width": 0.05},
    "segnet": {"width": 0.02},
    "segnet_basic": {"channels": 8},
    "unet": {"padding": "same", "norm": True, "widths": (4, 8, 8)},
    "unetplusplus": {"norm": True, "up": "bilinear", "widths": (4, 8, 8)},
}
FUSED = {
    "deeplabv3plus": {"separable_conv2d"},
    "fcn": {"bilinear_conv_transpose2d"},
    "segnet": {"max_pool2d", "max_unpool2d"},
    "segnet_basic": {"max_pool2d", "max_unpool2d"},
    "unet": {"max_pool2d"},
    "unetplusplus": {"max_pool2d", "upsample_concat", "batch_norm_act"},
}  # the ops of each that have kernels


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", names())
class TestEveryModel:
    def test_sizes_predict_and_loss(self, name):
        """65x47 divides by no stride; the logits keep every pixel."""
        model = create(name, 5, **NARROW[name]).double()
        x = torch.randn(2, 3, 65, 47, dtype=torch.float64)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # one pass in training then sets the statistics, and the classes vary
        with reference(), torch.no_grad():
            model(x)
        model.eval()
        target = torch.randint(5, (2, 65, 47), dtype=torch.uint8)
        target[:, :9] = 255
        with reference(), torch.no_grad():
            full = model(x)
            assert full.shape == (2, 5, 65, 47)
            assert model.logits(x).shape[:2] == (2, 5)

            classes = model.predict(x)
            assert classes.dtype == torch.uint8
            assert len(classes.unique()) >= 3
            best, second = full.topk(2, dim=1).values.unbind(1)
            clear = best - second > 1e-9
            assert clear.any()
            assert torch.equal(classes.long()[clear], full.argmax(1)[clear])

            loss = model.loss(x, target, ignore_index=255)
        torch.testing.assert_close(loss, F.cross_entropy(full, target.long(), ignore_index=255))

    def test_training_reaches_every_parameter(self, name):
        model = create(name, 5, **NARROW[name])
        with reference():
            model.loss(torch.randn(2, 3, 64, 48), torch.randint(5, (2, 64, 48))).backward()
        learnt = {key: p for key, p in model.named_parameters() if p.requires_grad}
        without = [key for key, p in learnt.items() if p.grad is None or not p.grad.any()]
        # A bias before batch norm in training has no effect: its gradient is rounding at most.
        assert [key for key in without if not key.endswith("bias")] == []

    def test_kernels_equal_reference(self, name, device):
        """Logits and every gradient, in training; fp64 where the kernels take it, so that rounding hides nothing."""
        dtype, rtol = (torch.float64, 1e-9) if device == "cpu" else (torch.float32, 2e-3)
        model = create(name, 3, **NARROW[name]).to(device, dtype)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        x = torch.randn(2, 3, 24, 24, device=device, dtype=dtype)
        target = torch.randint(3, (2, 24, 24), device=device)
        results = {}
        for path in ("kernels", "reference"):
            model.load_state_dict(state)
            model.zero_grad()
            torch.manual_seed(0)  # dropout
            with torch.backends.cudnn.flags(allow_tf32=False), explain() as report:
                if path == "reference":
                    with reference():
                        model.loss(x, target).backward()
                else:
                    model.loss(x, target).backward()
            paths = {(decision.op, decision.path) for decision in report if decision.op in FUSED[name]}
            assert paths == {(op, "triton" if path == "kernels" else "reference") for op in FUSED[name]}
            buffers = {key: b.clone() for key, b in model.named_buffers()}
            results[path] = {key: p.grad for key, p in model.named_parameters() if p.requires_grad} | buffers
        for key, want in results["reference"].items():
            got = results["kernels"][key]
            scale = want.double().norm() + (1e-6 if key.endswith("bias") else 0)
            assert (got.double() - want.double()).norm() <= rtol * scale + 1e-12, key


class TestDeepLabV3Plus:
    def test_logits_are_those_before_the_last_resize(self):
        model = create("deeplabv3plus", 5, **NARROW["deeplabv3plus"]).double().eval()
        x = torch.randn(2, 3, 65, 47, dtype=torch.float64)
        with reference(), torch.no_grad():
            full = F.interpolate(model.logits(x), size=(65, 47), mode="bilinear", align_corners=True)
            torch.testing.assert_close(full, model(x), rtol=1e-12, atol=1e-12)

    def test_golden_counts(self):
        model = DeepLabV3Plus(num_classes=21)
        counts = {name: parameters(child) for name, child in model.named_children() if parameters(child)}
        assert counts == {
            "backbone": 1_811_712,
            "aspp": 2_707_968,
            "shortcut_conv": 1_296,
            "cat_conv": 1_291_776,
            "cls_conv": 5_397,
        }
        assert parameters(model) == 5_818_149
        assert sum(b.numel() for b in model.buffers()) == 35_804

    def test_golden_keys(self):
        """Names and shapes of the public weights; the hash is of their sorted list without num_batches_tracked."""
        state = DeepLabV3Plus(num_classes=21).state_dict()
        assert len(state) == 371
        lines = sorted(f"{key} {tuple(v.shape)}" for key, v in state.items() if not key.endswith("num_batches_tracked"))
        assert len(lines) == 311
        for line in (
            "backbone.features.0.0.weight (32, 3, 3, 3)",
            "backbone.features.1.conv.3.weight (16, 32, 1, 1)",
            "backbone.features.17.conv.6.weight (320, 960, 1, 1)",
            "aspp.branch4.0.bias (256,)",
            "aspp.branch5_bn.running_var (256,)",
            "aspp.conv_cat.0.weight (256, 1280, 1, 1)",
            "shortcut_conv.0.weight (48, 24, 1, 1)",
            "cat_conv.4.weight (256, 256, 3, 3)",
            "cls_conv.weight (21, 256, 1, 1)",
        ):
            assert line in lines
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        assert digest == "62e5495a6bd3874e91a6cb357864d743bead2a63483fb808f59895c50e235c66"

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize("output_stride", [16, 8])
    # At width 0.1 neighbouring stages have equal widths: a block that lost its stride must still have no residual.
    @pytest.mark.parametrize("width", [0.1, 0.5])
    def test_equals_plain_pytorch(self, output_stride, training, width):
        model = DeepLabV3Plus(4, output_stride=output_stride, width=width, decoder_channels=16).double().train(training)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # not the identity that it starts as
                for t in (module.weight, module.bias, module.running_mean):
                    nn.init.normal_(t.data, std=0.5)
                nn.init.uniform_(module.running_var, 0.5, 2)
        state = {key: value.detach().clone() for key, value in model.state_dict().items()}
        learnt = {key: state[key].requires_grad_() for key, _ in model.named_parameters()}
        x = torch.randn(2, 3, 65, 47, dtype=torch.float64)

        torch.manual_seed(1)  # dropout
        want = plain_deeplab(state, x, output_stride, training)
        upstream = torch.randn_like(want)
        want_grads = torch.autograd.grad(want, list(learnt.values()), upstream)
        torch.manual_seed(1)
        with reference():
            got = model(x)
            got.backward(upstream)

        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
        for (key, parameter), grad in zip(model.named_parameters(), want_grads, strict=True):
            # atol: through a bias before batch norm in training flows nothing but rounding.
            torch.testing.assert_close(
                parameter.grad, grad, rtol=1e-8, atol=1e-9 * float(upstream.norm()), msg=lambda m, k=key: f"{k}: {m}"
            )
        for key, buffer in model.named_buffers():
            if not key.endswith("num_batches_tracked"):
                torch.testing.assert_close(buffer, state[key], rtol=1e-9, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"backbone": "vgg16"}, "no backbone 'vgg16'; use one of mobilenet_v2"),
            ({"output_stride": 32}, "output_stride is 32; use 8 or 16"),
            ({"decoder_channels": 20}, "decoder_channels is 20; use a multiple of 16"),
            ({"num_classes": 0}, "num_classes is 0"),
            ({"width": -1.0}, "width is -1.0"),
        ],
    )
    def test_bad_option(self, options, message):
        with pytest.raises(ValueError, match=message):
            create("deeplabv3plus", **{"num_classes": 2, **options})


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_mobilenet_features(output_stride):
    """Entry i has stride 2^i, capped; the widths are those announced (96 x 0.1 is 16: 8 would be under 90 %)."""
    encoder = MobileNetV2(in_channels=1, output_stride=output_stride, width=0.1).eval()
    with reference(), torch.no_grad():
        features = encoder(torch.randn(1, 1, 64, 96))
    strides = [min(2**i, output_stride) for i in range(6)]
    assert [tuple(f.shape[-2:]) for f in features] == [(64 // s, 96 // s) for s in strides]
    assert [f.shape[1] for f in features] == encoder.out_channels == [1, 8, 8, 8, 16, 32]


def test_create_names_what_exists():
    with pytest.raises(ValueError, match=r"no model 'deeplab'; use one of .*deeplabv3plus"):
        create("deeplab", 3)
    with pytest.raises(ValueError, match=r"deeplabv3plus has no option widht; it has backbone, output_stride, width"):
        create("deeplabv3plus", 3, widht=0.5)


# What each block's depthwise convolution does: (nominal stride, {output stride: (stride, dilation)}).
BLOCKS = {
    **{i: (1, {16: (1, 1), 8: (1, 1)}) for i in (1, 3, 5, 6)},
    **{i: (2, {16: (2, 1), 8: (2, 1)}) for i in (2, 4)},
    7: (2, {16: (2, 1), 8: (1, 1)}),
    **{i: (1, {16: (1, 1), 8: (1, 2)}) for i in range(8, 14)},
    14: (2, {16: (1, 1), 8: (1, 2)}),
    **{i: (1, {16: (1, 2), 8: (1, 4)}) for i in (15, 16, 17)},
}


def plain_deeplab(state: dict[str, Tensor], x: Tensor, output_stride: int, training: bool) -> Tensor:
    """DeepLabV3+ with MobileNetV2 from a state_dict; updates its running statistics when training."""

    def conv(y, key, stride=1, dilation=1, groups=1):
        weight = state[f"{key}.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        return F.conv2d(y, weight, state.get(f"{key}.bias"), stride, padding, dilation, groups)

    def norm(y, key):
        mean, var, weight, bias = (state[f"{key}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, mean, var, weight, bias, training, momentum=0.1, eps=1e-5)

    def conv_norm_relu(y, conv_key, norm_key, dilation=1):
        return F.relu(norm(conv(y, conv_key, dilation=dilation), norm_key))

    def resize(y, size):
        return F.interpolate(y, size=size, mode="bilinear", align_corners=True)

    y = F.relu6(norm(conv(x, "backbone.features.0.0", stride=2), "backbone.features.0.1"))
    for i, (nominal_stride, forms) in sorted(BLOCKS.items()):
        stride, dilation = forms[output_stride]
        name, skip = f"backbone.features.{i}.conv", y
        depthwise = 0
        if i > 1:
            y = F.relu6(norm(conv(y, f"{name}.0"), f"{name}.1"))
            depthwise = 3
        y = conv(y, f"{name}.{depthwise}", stride, dilation, groups=y.shape[1])
        y = F.relu6(norm(y, f"{name}.{depthwise + 1}"))
        y = norm(conv(y, f"{name}.{depthwise + 3}"), f"{name}.{depthwise + 4}")
        if nominal_stride == 1 and y.shape[1] == skip.shape[1]:
            y = y + skip
        if i == 3:
            low = y

    rates = {16: (6, 12, 18), 8: (12, 24, 36)}[output_stride]
    branches = [conv_norm_relu(y, "aspp.branch1.0", "aspp.branch1.1")]
    branches += [
        conv_norm_relu(y, f"aspp.branch{i}.0", f"aspp.branch{i}.1", rate)
        for i, rate in zip((2, 3, 4), rates, strict=True)
    ]
    pooled = conv_norm_relu(y.mean(2, keepdim=True).mean(3, keepdim=True), "aspp.branch5_conv", "aspp.branch5_bn")
    branches.append(resize(pooled, y.shape[-2:]))
    y = conv_norm_relu(torch.cat(branches, 1), "aspp.conv_cat.0", "aspp.conv_cat.1")

    low = conv_norm_relu(low, "shortcut_conv.0", "shortcut_conv.1")
    y = torch.cat([resize(y, low.shape[-2:]), low], 1)
    y = F.dropout(conv_norm_relu(y, "cat_conv.0", "cat_conv.1"), 0.5, training)
    y = F.dropout(conv_norm_relu(y, "cat_conv.4", "cat_conv.5"), 0.1, training)
    return resize(conv(y, "cls_conv"), x.shape[-2:])


def test_launches_per_forward(device):
    """The stem, and each of MobileNetV2's 17 pairs and 16 expansions, is one launch at 512^2; counted, not run."""
    model = DeepLabV3Plus(21).to(device, memory_format=torch.channels_last).eval()
    launched = []
    with torch.no_grad(), config.intercept(lambda kernel, *_: launched.append(kernel.fn.__name__)), explain() as report:
        model.logits(torch.zeros(1, 3, 512, 512, device=device).to(memory_format=torch.channels_last))
    assert [d.why.split(":")[0] for d in report if d.op == "separable_conv2d"] == ["fused"] * 17
    assert launched[:34] == [
        "_stem_conv_fwd_kernel",
        "_separable_conv_fwd_fused_kernel",
        *["_separable_conv_fwd_pw_kernel", "_separable_conv_fwd_fused_kernel"] * 16,
    ]
