"""Batch norm, activation and max pooling as one op, against the three one after another."""

import pytest
import torch
from torch import Tensor

import fastseg
from fastseg.ops import BatchNormArgs, batch_norm_act_max_pool2d
from fastseg.ops.batch_norm_act_max_pool import batch_norm_act_max_pool2d_ref
from fastseg.testing import check_op

CL = torch.channels_last
# kernel, stride, padding, ceil: SegNet at even and odd sizes; cells that no window covers; padded.
GEOMETRIES = [(2, 2, 0, False), (2, 2, 0, True), (2, 3, 0, False), (3, 3, 1, True)]


def make(
    C=5, H=9, W=7, dtype=torch.float64, training=True, device="cpu", requires_grad=True
) -> tuple[Tensor, BatchNormArgs]:
    x = torch.randn(2, C, H, W, dtype=dtype, device=device).contiguous(memory_format=CL)
    wide = torch.promote_types(dtype, torch.float32)
    vector = lambda low, high: torch.empty(C, dtype=wide, device=device).uniform_(low, high)
    weight, bias = vector(-1.5, 1.5), vector(-0.5, 0.5)  # negative: the largest cell is not the largest after the norm
    norm = BatchNormArgs(vector(-0.5, 0.5), vector(0.5, 2), weight, bias, training)
    for t in (x, weight, bias):
        t.requires_grad_(requires_grad)
    return x, norm


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu", None])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_matches_reference(geometry, act, training, device):
    """Values, gradients of x, weight and bias, running statistics; fp64 where the kernels take it."""
    x, norm = make(dtype=torch.float64 if device == "cpu" else torch.float32, training=training, device=device)
    with fastseg.explain() as report:
        check_op(batch_norm_act_max_pool2d, batch_norm_act_max_pool2d_ref, [x, norm, act, *geometry], terms=126)
    assert report.decisions[0].path == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype, device):
    """No activation, so that rounding moves no gradient past a kink; statistics in fp32 of half maps."""
    x, norm = make(C=8, dtype=dtype, device=device, requires_grad=False)
    x.copy_(torch.randperm(x.numel(), device=device).view(x.shape).to(dtype) / 64 % 4)  # no near ties in a window
    check_op(batch_norm_act_max_pool2d, batch_norm_act_max_pool2d_ref, [x, norm, None], grad=False, terms=126)


@pytest.mark.parametrize("index_format", ["compact", "int64"])
@pytest.mark.parametrize("act", ["relu", None])
def test_indices_are_those_of_the_activated_map(index_format, act, device):
    x, norm = make(device=device, dtype=torch.float64 if device == "cpu" else torch.float32)
    options = {"ceil_mode": True, "return_indices": True, "index_format": index_format}
    y, indices = batch_norm_act_max_pool2d(x, norm, act, **options)
    with fastseg.reference():
        want, want_indices = batch_norm_act_max_pool2d(x, norm, act, **options)
    if index_format == "compact":
        indices, want_indices = indices.to_torch(), want_indices.to_torch()
    assert torch.equal(indices, want_indices)
    dy = torch.randn_like(y)
    for got, expected in zip(
        torch.autograd.grad(y, (x, norm.weight), dy), torch.autograd.grad(want, (x, norm.weight), dy), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_without_a_norm(device):
    """As after folding: bias and norm are in the convolution."""
    x = make(device=device, requires_grad=False)[0].float()
    y, indices = batch_norm_act_max_pool2d(x, None, "relu", return_indices=True)
    want, expected = torch.nn.functional.max_pool2d(torch.relu(x), 2, return_indices=True)
    assert torch.equal(y, want) and torch.equal(indices.to_torch(), expected)
    x.requires_grad_()
    with fastseg.explain() as report:
        batch_norm_act_max_pool2d(x, None, "relu").sum().backward()
    assert report.decisions[0].why == "nothing is saved without a norm: one after another"
    assert [d.path for d in report] == ["reference", "triton"]  # the pooling by itself


def test_statistics_of_a_large_mean(device):
    """Mean 1e4, deviation 1e-2: E[x^2] - E[x]^2 would be noise."""
    x = (
        (1e4 + 1e-2 * torch.randn(2, 4, 40, 40, device=device, dtype=torch.float64))
        .float()
        .contiguous(memory_format=CL)
    )
    running = torch.zeros(4, device=device), torch.ones(4, device=device)
    batch_norm_act_max_pool2d(x, BatchNormArgs(*running, training=True, momentum=1.0), None)
    torch.testing.assert_close(running[0], x.double().mean((0, 2, 3)).float())
    torch.testing.assert_close(running[1], x.double().var((0, 2, 3)).float(), rtol=1e-4, atol=0)


def test_statistics_over_several_programs(device):
    """Rows that no block divides, more than a program walks, the last program with few of them."""
    from fastseg.kernels.batch_norm import fwd as batch_norm_act
    from fastseg.kernels.batch_norm.stats import batch_norm_stats
    from fastseg.kernels.runtime import config

    z = torch.randn(3, 5, 13, 11, device=device).contiguous(memory_format=CL) * 3 + 7
    with config.override("batch_norm_tile_stats", BLOCK_M=32, BLOCK_C=16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_norm_act, "PROGRAMS", 5)
        mean, var, unbiased = batch_norm_stats(z)
    want = z.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), want.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), want.var(1, correction=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(unbiased.double(), want.var(1), rtol=1e-5, atol=0)


def test_what_is_kept_for_the_backward(device):
    """x, 2 bits a window and vectors; plain modules keep x, the activated map and int64 indices."""
    x, norm = make(C=16, H=16, W=16, dtype=torch.float32, device=device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        batch_norm_act_max_pool2d(x, norm, "relu")
    sizes = sorted((t.nbytes for t in kept if t.numel() > 48), reverse=True)
    assert sizes == [x.nbytes, 2 * 16 * 8 * 8 // 4]


def test_nan_and_double_backward(device):
    x, norm = make(dtype=torch.float32, training=False, device=device)
    with torch.no_grad():
        x[0, 0, 0, 0] = float("nan")
    y = batch_norm_act_max_pool2d(x, norm, "relu")
    assert y[0, 0, 0, 0].isnan() and not y[0, 1:].isnan().any()
    found = []
    for z in (y, batch_norm_act_max_pool2d_ref(x, norm)):
        (dx,) = torch.autograd.grad(z[:, 1:].pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx[:, 1:].square().sum(), x)[0][:, 1:])
    assert found[1].abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case, why", [("NCHW", "not channels_last"), ("overlap", "overlapping windows in training")])
def test_what_runs_one_after_another(case, why, device):
    x, norm = make(device=device, dtype=torch.float64 if device == "cpu" else torch.float32)
    x = x.detach().contiguous().requires_grad_() if case == "NCHW" else x
    with fastseg.explain() as report:
        check_op(batch_norm_act_max_pool2d, batch_norm_act_max_pool2d_ref, [x, norm, "relu", 3, 2, 1], terms=126)
    assert report.decisions[0].why.startswith(why)


def test_bad_arguments(device):
    x, norm = make(device=device)
    with pytest.raises(ValueError, match="act is 'gelu'; use None, \"relu\""):
        batch_norm_act_max_pool2d(x, norm, "gelu")
    with pytest.raises(ValueError, match=r"x is \(5, 9, 7\); it must be \(N, C, H, W\)"):
        batch_norm_act_max_pool2d(x[0], norm)
    with pytest.raises(ValueError, match=r"norm.running_mean is \(5,\).*must be \(4,\)"):
        batch_norm_act_max_pool2d(x[:, :4], norm)
    with pytest.raises(RuntimeError, match="pad should be at most half"):
        batch_norm_act_max_pool2d(x, norm, "relu", 2, 2, 2)
