"""A convolution, norm and activation after an upsampled map beside another, over ordinary modules."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastseg
from fastseg.nn.fuse.upsample_concat import run_upsample_concat_conv


def made(groups=1, bias=True):
    conv, norm = nn.Conv2d(6, 4, 3, padding=1, groups=groups, bias=bias), nn.BatchNorm2d(4)
    for t in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(t)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return conv, norm


@pytest.mark.parametrize("case", ["folded", "gradients", "training", "no norm", "grouped", "hooked"])
def test_is_the_modules_one_after_the_other(case):
    conv, norm = made(2 if case == "grouped" else 1, bias=case != "training")
    norm.train(case == "training")
    if case == "hooked":
        conv.register_forward_hook(lambda module, args, y: y + 1)
    deep, low = torch.randn(2, 4, 2, 2), torch.randn(2, 2, 4, 3)
    up = F.interpolate(deep, (4, 3), mode="bilinear", align_corners=True)
    with fastseg.reference():
        state = {name: t.clone() for name, t in norm.state_dict().items()}
        want = conv(torch.cat([low, up], 1))
        want = F.relu(want if case == "no norm" else norm(want))
        after = {name: t.clone() for name, t in norm.state_dict().items()}
        norm.load_state_dict(state)
    chosen = None if case == "no norm" else norm
    with torch.set_grad_enabled(case == "gradients"):
        y = run_upsample_concat_conv(deep, low, conv, chosen, "relu", align_corners=True, up_first=False)
    torch.testing.assert_close(y, want.detach(), atol=1e-5, rtol=1e-4, check_stride=False)
    for name, t in norm.state_dict().items():
        torch.testing.assert_close(t, after[name], msg=name)
    if case == "gradients":
        y.sum().backward()
        assert conv.weight.grad is not None and norm.weight.grad is not None
