"""Every model against its golden numbers and against the same network written with torch.nn.functional alone."""

import pytest
import torch
from nets import NARROW
from torch import nn
from torch.nn import functional as F

from fastseg import explain, reference
from fastseg.models import create, names
from fastseg.models.encoders import MobileNetV2

FUSED = {
    "deconvnet": {"max_pool2d", "max_unpool2d", "batch_norm_act"},
    "deeplabv2": {"batch_norm_act"},
    "deeplabv3": {"batch_norm_act"},
    "deeplabv3plus": {"separable_conv2d"},
    "fcn": {"bilinear_conv_transpose2d"},
    "segformer": {"batch_norm_act"},
    "segnet": {"max_pool2d", "max_unpool2d"},
    "segnet_basic": {"max_pool2d", "max_unpool2d"},
    "unet": {"max_pool2d"},
    "unetplusplus": {"max_pool2d", "upsample_concat", "batch_norm_act"},
    "upernet": {"batch_norm_act"},
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
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # it draws in memory order, and kernels may lay a map out otherwise
        state = {key: value.clone() for key, value in model.state_dict().items()}
        x = torch.randn(2, 3, 24, 24, device=device, dtype=dtype)
        target = torch.randint(3, (2, 24, 24), device=device)
        results = {}
        for path in ("kernels", "reference"):
            model.load_state_dict(state)
            model.zero_grad()
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
    known = "backbone, output_stride, preset, width"
    with pytest.raises(ValueError, match=f"deeplabv3plus has no option widht; it has {known}"):
        create("deeplabv3plus", 3, widht=0.5)
