"""The functional ASPP against its definition, and its errors."""

import importlib

import pytest
import torch
from torch import Tensor

import fastseg
from fastseg.ops import aspp
from fastseg.ops.aspp import aspp_ref

atrous_module = importlib.import_module("fastseg.ops.atrous_conv2d")  # the package's attribute is the function
DILATIONS = (5, 1, 4)  # a 1x1 has any


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def branches(biased: bool) -> tuple[list[Tensor], list[Tensor] | None]:
    weights = tensors((16, 16, 1, 1), (16, 16, 3, 3), (16, 16, 3, 3))
    return weights, tensors(*[(16,)] * 3) if biased else None


@pytest.mark.parametrize("pool_first", [False, True])
@pytest.mark.parametrize("act", [None, "relu", "relu6"])
@pytest.mark.parametrize("biased", [False, True])
def test_concat(act, biased, pool_first):
    (x,) = tensors((2, 16, 6, 7))
    weights, biases = branches(biased)
    project, pool = tensors((5, 64, 1, 1), (16, 16, 1, 1))
    project_bias, pool_bias = tensors((5,), (16,)) if biased else (None, None)
    options = {"project_weight": project, "project_bias": project_bias, "pool_weight": pool, "pool_bias": pool_bias}
    run = lambda: aspp(x, weights, DILATIONS, biases, **options, act=act, pool_first=pool_first)
    want = aspp_ref(x, weights, DILATIONS, biases, **options, act=act, pool_first=pool_first)
    got = run()
    torch.testing.assert_close(got, want)
    leaves = [t for t in (x, *weights, *(biases or ()), *options.values()) if t is not None]
    upstream = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(run(), want)
        with fastseg.reference():
            torch.testing.assert_close(run(), want)


def test_no_pool_and_sum():
    (x,) = tensors((1, 16, 6, 7))
    weights, biases = branches(True)
    (project,) = tensors((5, 48, 1, 1))
    want = aspp_ref(x, weights, DILATIONS, biases, project_weight=project)
    torch.testing.assert_close(aspp(x, weights, DILATIONS, biases, project_weight=project), want)
    want = aspp_ref(x, weights, DILATIONS, biases, fusion="sum")
    got = aspp(x, weights, DILATIONS, biases, fusion="sum")
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(y.sum(), (x, *weights, *biases)) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_librarys_maps_are_not_copied_beside_each_other(monkeypatch):
    """Where the kernel does not take the branches: each is projected, its sum taken up by the next one's epilogue."""
    x, project, pool, bias = (t.detach() for t in tensors((2, 16, 6, 7), (5, 64, 1, 1), (16, 16, 1, 1), (5,)))
    weights, biases = ([t.detach() for t in ts] for ts in branches(True))
    want = aspp(x, weights, DILATIONS, biases, project_weight=project, project_bias=bias, pool_weight=pool)
    plain = aspp(x, weights, DILATIONS, biases, project_weight=project[:, :48], project_bias=bias)
    monkeypatch.setattr(atrous_module.torch, "cat", None)
    with fastseg.force("atrous_branches", "reference"):
        got = aspp(x, weights, DILATIONS, biases, project_weight=project, project_bias=bias, pool_weight=pool)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
        got = aspp(x, weights, DILATIONS, biases, project_weight=project[:, :48], project_bias=bias)
        torch.testing.assert_close(got, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"act": "gelu"}, "act is 'gelu'"),
        ({"fusion": "max"}, "fusion is 'max'"),
        ({"dilations": (1, 2)}, "3 weights, 2 dilations, 3 biases"),
        ({"project_weight": None}, "needs project_weight"),
        ({"project_weight": torch.zeros(5, 48, 1, 1)}, r"it must be \(OUT, 64, 1, 1\)"),
        ({"pool_weight": torch.zeros(16, 8, 1, 1)}, r"it must be \(M, 16, 1, 1\)"),
        ({"fusion": "sum"}, "neither projection nor image pool"),
        ({"x": torch.zeros(16, 6, 7)}, "expected 4D input"),
    ],
)
def test_errors(change, message):
    weights, biases = branches(True)
    options = {
        "x": torch.zeros(1, 16, 6, 7), "weights": weights, "dilations": DILATIONS, "biases": biases,
        "project_weight": torch.zeros(5, 64, 1, 1), "pool_weight": torch.zeros(16, 16, 1, 1),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        aspp(**options | change)
