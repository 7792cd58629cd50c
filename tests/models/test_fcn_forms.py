"""FCN's forms beside the paper's: torchvision's, dictionaries of outputs, and what d2l's prints."""

import pytest
import torch
from nets import unsettle
from torch import nn
from torch.nn import functional as F

from fastseg import reference
from fastseg.models import FCN


def narrow(**options) -> FCN:
    return unsettle(FCN(4, **{"width": 0.05, **options}))


@pytest.fixture(autouse=True)
def _reference_path():
    with reference():
        yield


def test_d2l_prints_as_in_the_article():
    """The last stage of https://d2l.ai's FCN, as it prints ``list(pretrained_net.children())[-3:]``."""
    conv = "Conv2d({}, 512, kernel_size=(3, 3), stride={}, padding=(1, 1), bias=False)"
    norm = repr(nn.BatchNorm2d(512))  # which is torch's own, and differs between versions
    inner = lambda first: [
        f"    (conv1): {first}", f"    (bn1): {norm}", "    (relu): ReLU(inplace=True)",
        f"    (conv2): {conv.format(512, '(1, 1)')}", f"    (bn2): {norm}",
    ]  # fmt: skip
    want = [
        "  (0): BasicBlock(", *inner(conv.format(256, "(2, 2)")), "    (downsample): Sequential(",
        "      (0): Conv2d(256, 512, kernel_size=(1, 1), stride=(2, 2), bias=False)", f"      (1): {norm}", "    )",
        "  )", "  (1): BasicBlock(", *inner(conv.format(512, "(1, 1)")), "  )",
    ]  # fmt: skip
    with torch.device("meta"):
        printed = str(getattr(FCN(21, "resnet18", 32), "7")).splitlines()
    assert printed == ["Sequential(", *want, ")"]


class TestTorchvision:
    """``preset="torchvision"``; it is compared with torchvision's layers in test_keys.py."""

    def test_training(self):
        """Two lists of logits; the loss is torchvision's: the auxiliary one counts half. Gradients of all."""
        model = narrow(preset="torchvision", aux=True).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        x, target = torch.randn(2, 3, 65, 47, dtype=torch.float64), torch.randint(4, (2, 65, 47))
        logits, auxiliary = model(x)
        want = F.cross_entropy(logits, target) + 0.5 * F.cross_entropy(auxiliary, target)
        loss = model.loss(x, target)
        torch.testing.assert_close(loss, want, rtol=1e-9, atol=0)
        parameters = list(model.parameters())
        for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)

    def test_heads(self):
        model = narrow(preset="torchvision", backbone="resnet18").eval()
        x, target = torch.randn(2, 3, 65, 47, dtype=torch.float64), torch.randint(4, (2, 65, 47))
        with torch.no_grad():
            full = F.interpolate(model.logits(x), size=(65, 47), mode="bilinear", align_corners=False)
            torch.testing.assert_close(model(x), full)
            assert torch.equal(model.predict(x).long(), full.argmax(1))
            torch.testing.assert_close(model.loss(x, target), F.cross_entropy(full, target))
        assert model.aux_classifier is None and model.encoder_state().keys() == model.backbone.state_dict().keys()


@pytest.mark.parametrize("options", [{"preset": "torchvision"}, {"backbone": "resnet18", "stride": 4}, {}], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_as_dict(options, training):
    """The names of torchvision and of the article, in training and in evaluation."""
    model = narrow(**options, aux=True, as_dict=True).train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    twin = narrow(**options, aux=True).train()
    twin.load_state_dict(model.state_dict())
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(training)
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    x = torch.randn(2, 3, 40, 33, dtype=torch.float64)
    with torch.no_grad():
        got, want = model(x), twin(x)
        assert list(got) == ["out", "aux"]
        for a, b in zip(got.values(), want, strict=True):
            torch.testing.assert_close(a, b)
        assert list(narrow(**options, as_dict=True).train(training)(x)) == ["out"]
        if not training:
            assert torch.equal(model.predict(x).long(), got["out"].argmax(1))
