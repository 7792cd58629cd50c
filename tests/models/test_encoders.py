"""VGG16 and ResNet against golden numbers, torchvision's names, and the same networks in torch.nn.functional alone."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg import reference
from fastseg.models.encoders import ENCODERS, VGG16, ResNet

VGG_INDICES = {  # of the convolutions in torchvision's features; a batch norm is at the next index
    False: (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
    True: (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40),
}
VGG_STAGES = (2, 2, 3, 3, 3)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def randomise(module: nn.Module) -> nn.Module:
    """Batch norms that are not the identity, biases that are not zero."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            for t in (child.weight, child.bias, child.running_mean):
                nn.init.normal_(t.data, std=0.5)
            nn.init.uniform_(child.running_var, 0.5, 2)
        elif isinstance(child, nn.Conv2d) and child.bias is not None:
            nn.init.normal_(child.bias, std=0.1)
    return module


def compare_with_plain(encoder: nn.Module, plain, x: Tensor) -> None:
    """Every feature, every gradient and every running statistic; ``plain(state, x)`` gives the list of features."""
    state = {key: value.detach().clone() for key, value in encoder.state_dict().items()}
    learnt = {key: state[key].requires_grad_() for key, _ in encoder.named_parameters()}
    want, got = plain(state, x), encoder(x)
    assert len(got) == len(want) == len(encoder.out_channels) == 6
    assert [f.shape[1] for f in got] == encoder.out_channels
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    upstream = [torch.randn_like(f) for f in want]
    pairs = lambda features: [(f, dy) for f, dy in zip(features, upstream, strict=True) if f.requires_grad]
    total = sum((f * dy).sum() for f, dy in pairs(want))
    want_grads = torch.autograd.grad(total, list(learnt.values()))
    sum((f * dy).sum() for f, dy in pairs(got)).backward()
    for (key, parameter), grad in zip(encoder.named_parameters(), want_grads, strict=True):
        scale = 1e-9 * float(grad.abs().max()) + 1e-10
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-8, atol=scale, msg=lambda m, k=key: f"{k}: {m}")
    for key, buffer in encoder.named_buffers():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(buffer, state[key], rtol=1e-9, atol=1e-10)


class TestVGG16:
    @pytest.mark.parametrize(("norm", "count"), [(False, 14_714_688), (True, 14_723_136)])
    def test_golden_count_and_names(self, norm, count):
        encoder = VGG16(norm=norm)
        assert parameters(encoder) == count
        indices = [i for i, layer in enumerate(encoder.features) if isinstance(layer, nn.Conv2d)]
        assert tuple(indices) == VGG_INDICES[norm]
        norms = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        names = {f"features.{i}.{n}" for i in indices for n in ("weight", "bias")}
        names |= {f"features.{i + 1}.{n}" for i in indices for n in norms if norm}
        assert encoder.state_dict().keys() == names
        assert encoder.out_channels == [64, 128, 256, 512, 512, 512]

    @pytest.mark.parametrize("norm", [False, True])
    @pytest.mark.parametrize("options", [{}, {"ceil_mode": True, "first_padding": 4}], ids=["torchvision", "caffe"])
    def test_equals_plain_pytorch(self, norm, options):
        """An odd size, so that the pools' two modes differ; in training, so that the statistics are updated."""
        encoder = randomise(VGG16(in_channels=2, width=0.1, norm=norm, **options)).double()
        padding, ceil_mode = options.get("first_padding", 1), options.get("ceil_mode", False)

        def plain(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
            features, indices = [], iter(VGG_INDICES[norm])
            for stage, convolutions in enumerate(VGG_STAGES):
                for k in range(convolutions):
                    i = next(indices)
                    pad = padding if stage == k == 0 else 1
                    x = F.conv2d(x, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=pad)
                    if norm:
                        x = plain_norm(state, f"features.{i + 1}", x)
                    x = F.relu(x)
                features.append(x)
                x = F.max_pool2d(x, 2, 2, ceil_mode=ceil_mode)
            return [*features, x]

        compare_with_plain(encoder, plain, torch.randn(2, 2, 39, 53, dtype=torch.float64))

    @pytest.mark.parametrize("norm", [False, True])
    def test_stages(self, norm):
        encoder = VGG16(width=0.1, norm=norm)
        stages = encoder.stages()
        assert tuple(len(stage) for stage in stages) == VGG_STAGES
        pairs = [pair for stage in stages for pair in stage]
        assert [conv for conv, _ in pairs] == [encoder.features[i] for i in VGG_INDICES[norm]]
        assert [bn for _, bn in pairs] == [encoder.features[i + 1] if norm else None for i in VGG_INDICES[norm]]

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"output_stride": 16}, "output_stride is 16; VGG does not dilate"), ({"width": 0}, "VGG16: width is 0; use")],
    )
    def test_bad_option(self, options, message):
        with pytest.raises(ValueError, match=message):
            VGG16(**options)


# Depth: trainable parameters without the classifier, 3x3 convolutions of a block, blocks of the four layers.
RESNETS = {
    18: (11_176_512, 2, (2, 2, 2, 2)),
    34: (21_284_672, 2, (3, 4, 6, 3)),
    50: (23_508_032, 1, (3, 4, 6, 3)),
    101: (42_500_160, 1, (3, 4, 23, 3)),
}
# (Layer 3, layer 4) as (stride, dilation of the first block, dilation of the others), by (output stride, style).
PLACES = {
    (32, "torchvision"): ((2, 1, 1), (2, 1, 1)),
    (16, "torchvision"): ((2, 1, 1), (1, 1, 2)),
    (16, "smp"): ((2, 1, 1), (1, 2, 2)),
    (8, "torchvision"): ((1, 1, 2), (1, 2, 4)),
    (8, "smp"): ((1, 2, 2), (1, 4, 4)),
}


class TestResNet:
    @pytest.mark.parametrize("depth", RESNETS)
    def test_golden_count_and_names(self, depth):
        with torch.device("meta"):
            encoder = ResNet(depth)
        count, wide, blocks = RESNETS[depth]
        assert parameters(encoder) == count
        names = {"conv1", "bn1"}
        for i, number in enumerate(blocks, 1):
            for k in range(number):
                convolutions = range(1, 3 if wide == 2 else 4)
                names |= {f"layer{i}.{k}.{kind}{n}" for n in convolutions for kind in ("conv", "bn")}
            if i > 1 or wide == 1:
                names |= {f"layer{i}.0.downsample.{n}" for n in (0, 1)}
        assert {key.rpartition(".")[0] for key in encoder.state_dict()} == names
        assert not [key for key in encoder.state_dict() if "conv" in key and key.endswith("bias")]
        expansion = 1 if wide == 2 else 4
        assert encoder.out_channels == [3, 64, *(c * expansion for c in (64, 128, 256, 512))]
        assert tuple(encoder.layer4[0].conv1.weight.shape[:2]) == (512, 256 * expansion)

    # At width 0.02 all layers are equally wide: one that lost its stride must still have its projection.
    @pytest.mark.parametrize(("depth", "width"), [(18, 0.02), (50, 0.1), pytest.param(18, 0.1, marks=pytest.mark.long)])
    @pytest.mark.parametrize("place", PLACES, ids=str)
    def test_equals_plain_pytorch(self, depth, width, place):
        output_stride, style = place
        encoder = randomise(ResNet(depth, 2, output_stride, width, dilation_style=style)).double()
        _, wide, blocks = RESNETS[depth]

        def plain(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
            conv = lambda x, key, *args: F.conv2d(x, state[f"{key}.weight"], None, *args)
            norm = lambda x, key: plain_norm(state, key, x)
            features = [x, F.relu(norm(conv(x, "conv1", 2, 3), "bn1"))]
            y = F.max_pool2d(features[1], 3, 2, 1)
            places = ((1, 1, 1), (2, 1, 1), *PLACES[place])
            for i, (number, (stride, first, later)) in enumerate(zip(blocks, places, strict=True), 1):
                for k in range(number):
                    name, s, d = f"layer{i}.{k}", stride if k == 0 else 1, first if k == 0 else later
                    skip = y
                    if wide == 2:
                        y = F.relu(norm(conv(y, f"{name}.conv1", s, d, d), f"{name}.bn1"))
                        y = norm(conv(y, f"{name}.conv2", 1, d, d), f"{name}.bn2")
                    else:
                        y = F.relu(norm(conv(y, f"{name}.conv1"), f"{name}.bn1"))
                        y = F.relu(norm(conv(y, f"{name}.conv2", s, d, d), f"{name}.bn2"))
                        y = norm(conv(y, f"{name}.conv3"), f"{name}.bn3")
                    if k == 0 and (i > 1 or wide == 1):
                        skip = norm(conv(skip, f"{name}.downsample.0", s), f"{name}.downsample.1")
                    y = F.relu(y + skip)
                features.append(y)
            return features

        compare_with_plain(encoder, plain, torch.randn(2, 2, 33, 25, dtype=torch.float64))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"depth": 19}, "depth is 19; use one of 18, 34, 50, 101"),
            ({"output_stride": 4}, "output_stride is 4; use 8, 16 or 32"),
            ({"dilation_style": "caffe"}, 'dilation_style is \'caffe\'; use "torchvision" or "smp"'),
            ({"width": float("nan")}, "ResNet: width is nan"),
        ],
    )
    def test_bad_option(self, options, message):
        with pytest.raises(ValueError, match=message):
            ResNet(**{"depth": 18, **options})


@pytest.mark.parametrize("name", ENCODERS)
def test_one_signature(name):
    """(in_channels, output_stride, width); entry i of the features has stride 2^i, and the width announced."""
    encoder = ENCODERS[name](1, 32, 0.1).eval()
    with reference(), torch.no_grad():
        features = encoder(torch.randn(1, 1, 64, 96))
    assert [tuple(f.shape[-2:]) for f in features] == [(64 >> i, 96 >> i) for i in range(6)]
    assert [f.shape[1] for f in features] == encoder.out_channels


def plain_norm(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (state[f"{key}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.1, eps=1e-5)
