"""VGG16 and ResNet against golden numbers, torchvision's names, and the same networks in torch.nn.functional alone."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.models.encoders import VGG16

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


def plain_norm(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (state[f"{key}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.1, eps=1e-5)
