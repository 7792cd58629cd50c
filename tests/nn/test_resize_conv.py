"""Fusions of decoders as modules: against the steps that they stand for, in values, gradients and what is inside."""

import doctest

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastseg.nn import LinearFuse2d, ResizeConcatConv2d, UpsampleNearestConv2d, resize_conv

SIZE = (12, 16)


def maps(*channels: int) -> list[torch.Tensor]:
    """Of SIZE, of half of it, of a third of it."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, C, SIZE[0] // k, SIZE[1] // k) for k, C in enumerate(channels, 1)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def resized(found: list[torch.Tensor], mode: str, corners: bool) -> torch.Tensor:
    corners = {"align_corners": corners} if mode == "bilinear" else {}
    return torch.cat([F.interpolate(m, SIZE, mode=mode, **corners) for m in found], 1)


def after(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = module.conv(x)
    y = y if module.norm is None else module.norm(y)
    return y if module.act is None else F.relu(y)


def fuse(kernel_size: int, mode: str, corners: bool, **options):
    module = ResizeConcatConv2d([3, 4, 5], 6, kernel_size, mode=mode, align_corners=corners, **options)
    return module, maps(3, 4, 5), lambda found: after(module, resized(found, mode, corners))


def doubled(up_first: bool, skip: bool, **options):
    module = UpsampleNearestConv2d(4, 3 if skip else 0, 6, up_first=up_first, **options)
    small, beside = maps(4, 4)[1], maps(3)

    def steps(found):
        order = [F.interpolate(found[0], SIZE), *found[1:]]
        return after(module, torch.cat(order if up_first else order[::-1], 1))

    found = [small, *beside] if skip else [small]
    return module, found, steps


def linear(corners: bool, **options):
    module = LinearFuse2d([3, 4, 5], 7, 6, align_corners=corners, **options)

    def steps(found):
        taken = [line(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for line, m in zip(module.linears, found, strict=True)]
        return after(module, resized(taken, "bilinear", corners))

    return module, maps(3, 4, 5), steps


CASES = {
    "1x1": lambda: fuse(1, "bilinear", False),
    "1x1 corners, no norm": lambda: fuse(1, "bilinear", True, norm=False, act=None),
    "3x3": lambda: fuse(3, "bilinear", False, bias=True),
    "3x3 nearest": lambda: fuse(3, "nearest", False),
    "doubled": lambda: doubled(True, False),
    "doubled, skip": lambda: doubled(True, True, act=None),
    "doubled, skip first": lambda: doubled(False, True, norm=False),
    "linear": lambda: linear(False),
    "linear corners, no norm": lambda: linear(True, norm=False, bias=False),
}


def call(module: nn.Module, found: list[torch.Tensor]) -> torch.Tensor:
    return module(*found) if isinstance(module, UpsampleNearestConv2d) else module(found)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_as_the_steps(name, training):
    module, found, steps = CASES[name]()
    module.double().train(training)
    if module.norm is not None:
        nn.init.normal_(module.norm.weight), nn.init.normal_(module.norm.bias)
        nn.init.uniform_(module.norm.running_var, 0.5, 2)
    inputs = [*found, *module.parameters()]
    want = steps(found)
    buffers = [b.clone() for b in module.buffers()]
    got = call(module, found)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    seed = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, inputs, seed), torch.autograd.grad(want, inputs, seed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    if not training:
        assert all(torch.equal(a, b) for a, b in zip(buffers, module.buffers(), strict=True))
        with torch.no_grad():
            torch.testing.assert_close(call(module, found), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["1x1", "3x3", "doubled, skip", "linear"])
@torch.no_grad()
def test_what_is_inside_decides(name):
    module, found, steps = CASES[name]()
    module.double().eval()
    seen = []
    handle = module.norm.register_forward_hook(lambda *args: seen.append(args[0]))
    torch.testing.assert_close(call(module, found), steps(found), rtol=1e-10, atol=1e-10)
    assert seen == [module.norm] * 2  # the steps fire it too
    handle.remove()
    module.conv = nn.Sequential(module.conv, nn.Sigmoid())
    torch.testing.assert_close(call(module, found), steps(found), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ResizeConcatConv2d([], 4), "no map"),
        (lambda: ResizeConcatConv2d([4], 4, 5), "kernel_size is 5"),
        (lambda: ResizeConcatConv2d([4], 4, mode="cubic"), "'cubic'"),
        (lambda: UpsampleNearestConv2d(4, 0, 4, act="gelu"), "gelu"),
        (lambda: LinearFuse2d([], 4, 4), "no map"),
    ],
)
def test_bad_input(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_examples():
    assert doctest.testmod(resize_conv, extraglobs={"torch": torch}).failed == 0
    assert "mode='nearest'" in repr(ResizeConcatConv2d([2], 2, mode="nearest"))
