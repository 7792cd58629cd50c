"""Trilinear interpolation: torch's numbers for every way to say the size, both layouts, derivatives of any order."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastseg
from fastseg import nn as fnn
from fastseg.ops import upsample_trilinear
from fastseg.ops.upsample_trilinear import upsample_trilinear_ref

CL, NCHW = torch.channels_last_3d, torch.contiguous_format
AC = pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])
CASES = [
    ((1, 2, 3, 2, 3), {"scale_factor": 2}, NCHW),
    ((1, 3, 2, 3, 2), {"scale_factor": 2}, CL),
    ((2, 2, 2, 3, 2), {"size": (5, 3, 2)}, CL),  # the depth alone
    ((2, 2, 3, 2, 3), {"size": (3, 5, 4)}, NCHW),  # the planes alone
    ((1, 2, 4, 4, 5), {"size": (2, 3, 3)}, CL),  # smaller
    ((1, 2, 3, 4, 2), {"scale_factor": (1.3, 1.7, 2.5)}, NCHW),  # positions are not those of the sizes
    ((1, 1, 1, 1, 1), {"size": 3}, NCHW),
    ((1, 2, 2, 3, 2), {"size": (2, 3, 2)}, NCHW),  # to itself
]


@AC
@pytest.mark.parametrize(("shape", "target", "layout"), CASES, ids=str)
def test_values_and_gradients(shape, target, layout, align_corners, device):
    x = torch.randn(shape, device=device).to(memory_format=layout).requires_grad_()
    options = target | {"align_corners": align_corners}
    y = upsample_trilinear(x, **options)
    dy = torch.randn_like(y)
    y.backward(dy)
    wide = x.detach().double().cpu().requires_grad_()
    want = F.interpolate(wide, **target, mode="trilinear", align_corners=align_corners)
    want.backward(dy.double().cpu())
    torch.testing.assert_close(y.cpu(), want.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.cpu(), wide.grad.float(), rtol=1e-5, atol=1e-5)


def test_half_is_rounded_once(device):
    x = torch.randn(1, 2, 3, 3, 4, device=device).half()
    y = upsample_trilinear(x, scale_factor=2)
    want = F.interpolate(x.double(), scale_factor=2, mode="trilinear")
    assert y.dtype == torch.float16
    assert ((y.double() - want).abs() <= want.abs() * 2**-10 + 1e-6).all()


def test_second_derivatives(device):
    found = []
    for call in (upsample_trilinear, upsample_trilinear_ref):
        torch.manual_seed(1)
        x = torch.randn(1, 2, 2, 2, 3, device=device, requires_grad=True)
        (first,) = torch.autograd.grad((call(x, (3, 4, 4)) ** 3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first, x, torch.randn_like(first))
        found.append((first, second))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_it_runs_the_kernel_of_planes_twice(device):
    x = torch.randn(1, 2, 2, 2, 3, device=device)
    with fastseg.explain() as report:
        y = upsample_trilinear(x, scale_factor=2)
    assert [(d.op, d.path) for d in report] == [("upsample_trilinear", "triton")]
    with fastseg.reference(), fastseg.explain() as report:
        torch.testing.assert_close(upsample_trilinear(x, scale_factor=2), y, rtol=1e-5, atol=1e-5)
    assert [d.path for d in report] == ["reference"]
    mapped = torch.vmap(lambda x: upsample_trilinear(x, scale_factor=2))(x[None])[0]
    torch.testing.assert_close(mapped, y, rtol=1e-5, atol=1e-5)


def test_what_torch_refuses_and_the_module():
    x = torch.randn(1, 2, 3, 4, 5)
    for bad in ({}, {"size": 3, "scale_factor": 2}, {"size": (3, 3)}, {"scale_factor": (2, 2)}, {"size": 0}):
        with pytest.raises((ValueError, RuntimeError)):
            upsample_trilinear(x, **bad)
        with pytest.raises((ValueError, RuntimeError)):
            upsample_trilinear_ref(x, **bad)
    for options in ({"scale_factor": 2.0}, {"size": (4, 5, 6), "align_corners": True}):
        ours, torchs = (kind(**options, mode="trilinear") for kind in (fnn.Upsample, nn.Upsample))
        torch.testing.assert_close(ours(x), torchs(x), rtol=1e-5, atol=1e-5)
