"""Batch norm + residual + activation as one op, against the same in plain PyTorch and against torch's own samples."""

from contextlib import ExitStack

import pytest
import torch
from samples import layouts, samples
from torch import Tensor
from torch.nn import functional as F

import fastseg
from fastseg.ops import BatchNormArgs, batch_norm_act
from fastseg.ops.batch_norm_act import batch_norm_act_ref
from fastseg.testing import check_op, guard, guarded

CL, NCHW = torch.channels_last, torch.contiguous_format
LAYOUTS = pytest.mark.parametrize("layout", [NCHW, CL], ids=["NCHW", "channels_last"])
ACTS = (None, "relu", "relu6", "leaky_relu")
# No dimension divides a block; more channels than a block, one image; one channel; rows without pixels around them.
SHAPES = [(2, 5, 9, 7), (1, 70, 3, 5), (3, 1, 5, 4), (6, 9, 1, 1)]


def wide_of(device: str) -> torch.dtype:
    """fp64 where the kernels take it."""
    return torch.float64 if device == "cpu" else torch.float32


def make(
    shape=(2, 5, 9, 7), dtype=torch.float64, layout=CL, training=True, residual=False, device="cpu", grad=True
) -> tuple[Tensor, BatchNormArgs, Tensor | None]:
    draw = lambda: (2 * torch.randn(shape, dtype=dtype, device=device)).contiguous(memory_format=layout)
    vector = lambda low, high: torch.empty(
        shape[1], dtype=torch.promote_types(dtype, torch.float32), device=device
    ).uniform_(low, high)
    x, r = draw(), draw() if residual else None
    norm = BatchNormArgs(vector(-0.5, 0.5), vector(0.5, 2), vector(-1.5, 1.5), vector(-0.5, 0.5), training)
    for t in (x, r, norm.weight, norm.bias):
        if t is not None:
            t.requires_grad_(grad)
    return x, norm, r


@LAYOUTS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_matches_reference(residual, training, layout, device):
    """Values, every gradient, running statistics; every activation on the first shape, ReLU on the others."""
    for shape, act in [*((SHAPES[0], act) for act in ACTS), *((shape, "relu") for shape in SHAPES[1:])]:
        x, norm, r = make(shape, wide_of(device), layout, training, residual, device)
        with fastseg.explain() as report:
            check_op(batch_norm_act, batch_norm_act_ref, [x, norm, act, r], terms=126)
        assert report.decisions[0].path == "triton"


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype, layout, device):
    """fp32 norms of half maps; gradients without an activation, so that rounding moves none past a kink."""
    x, norm, r = make((2, 24, 9, 7), dtype, layout, True, True, device)
    check_op(batch_norm_act, batch_norm_act_ref, [x, norm, None, r], terms=126)
    check_op(batch_norm_act, batch_norm_act_ref, [x, norm, "relu", r], grad=False, terms=126)
    half = BatchNormArgs(*(t.detach().to(dtype) for t in norm[:4]), True)  # as in a model after .half()
    check_op(batch_norm_act, batch_norm_act_ref, [x.detach(), half, "relu6"], grad=False, terms=126)


@LAYOUTS
@pytest.mark.parametrize("programs", [6, 8])
def test_over_several_programs(programs, layout, device):
    """Programs that walk several blocks, blocks of several images; of 5 x 2 (NCHW) and 10 (channels_last) blocks, by 2
    or 3 channel blocks, the last programs get few or none. Nothing past the buffers is read."""
    from fastseg.kernels.batch_norm import fwd as kernels
    from fastseg.kernels.runtime import config

    names = ("batch_norm_tile_stats", "batch_norm_act_fwd", "batch_norm_act_bwd_reduce", "batch_norm_act_bwd_input")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(kernels, "PROGRAMS", programs)
        for name in names:
            stack.enter_context(config.override(name, BLOCK_M=32, BLOCK_C=4))
        x, norm, r = make((5, 5, 8, 8), wide_of(device), layout, residual=True, device=device)
        check_op(batch_norm_act, batch_norm_act_ref, [x, norm, "relu", r], terms=320)
        with guarded():
            inside = guard(x.detach().contiguous(memory_format=layout)).requires_grad_()
            y = batch_norm_act(inside, norm, "relu")
            y.backward(guard(torch.ones_like(y)))


@LAYOUTS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradcheck(training, layout, device):
    if device != "cpu":
        pytest.skip("fp64 runs under the interpreter")
    x, norm, r = make((2, 3, 3, 2), layout=layout, training=training, residual=True)

    def fn(x, weight, bias, r):
        args = norm._replace(running_mean=norm.running_mean.clone(), running_var=norm.running_var.clone())
        return batch_norm_act(x, args._replace(weight=weight, bias=bias), "leaky_relu", r)

    assert torch.autograd.gradcheck(fn, (x, norm.weight, norm.bias, r), fast_mode=True)


def test_reference_is_torchs(device):
    for training in (True, False):
        x, norm, r = make(residual=True, dtype=torch.float32, training=training, grad=False)
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        want = F.relu(F.batch_norm(x, mean, var, norm.weight, norm.bias, training, 0.1, 1e-5) + r)
        assert torch.equal(batch_norm_act_ref(x, norm, "relu", r), want)
        assert torch.equal(mean, norm.running_mean) and torch.equal(var, norm.running_var)


def test_torchs_samples(device):
    """Every sample of nn.functional.batch_norm, in every layout; what is no map gets torch's error, and is made one."""
    clone = lambda t: None if t is None else t.clone()
    seen, maps = 0, 0
    for sample in samples("batch_norm", dtype=wide_of(device), device=device):
        mean, var = sample.args[:2]
        arguments = dict(zip(("weight", "bias"), sample.args[2:], strict=False)) | sample.kwargs
        norm = BatchNormArgs(mean, var, **arguments)
        seen += 1
        image = sample.input
        if image.dim() != 4:
            with pytest.raises(ValueError, match=f"expected 4D input \\(got {image.dim()}D input\\)"):
                batch_norm_act(image, norm)
            if image.dim() == 1:
                continue
            image = image.reshape(*image.shape[:2], -1, 1)  # the same, as a map
        for x in layouts(image):
            got, want = (norm._replace(running_mean=clone(mean), running_var=clone(var)) for _ in range(2))
            y = batch_norm_act(x, got)
            expected = F.batch_norm(x, *want)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            for ours, theirs in zip(got[:2], want[:2], strict=True):
                if ours is not None:
                    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            maps += 1
    assert maps >= seen > 0


@LAYOUTS
def test_large_mean(layout, device):
    """Mean 1e4, deviation 1e-2: E[x^2] - E[x]^2 would be noise. Eager's own error stands beside it."""
    x64 = 1e4 + 1e-2 * torch.randn(2, 4, 40, 40, device=device, dtype=torch.float64)
    x = x64.float().contiguous(memory_format=layout)
    exact = x.double().var((0, 2, 3))
    var, eager = (torch.ones(4, device=device) for _ in range(2))
    zeros = lambda: torch.zeros(4, device=device)
    batch_norm_act(x, BatchNormArgs(zeros(), var, training=True, momentum=1.0))
    F.batch_norm(x, zeros(), eager, training=True, momentum=1.0)
    ours, theirs = (float(((v.double() - exact) / exact).abs().max()) for v in (var, eager))
    assert ours < 1e-5 and ours <= theirs, (ours, theirs)


@LAYOUTS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nan_and_infinity(training, layout, device):
    """They stay where torch has them, in values and gradients; the statistics are not finite where torch's are not."""
    for act in ACTS:
        for value in (float("nan"), float("inf"), -float("inf")):
            x, norm, r = make((2, 4, 4, 8), torch.float32, layout, training, True, device)  # whole vectors
            with torch.no_grad():
                x[0, 0, 1, 1] = value
                r[1, 1, 2, 2] = value
            results = []
            for fn in (batch_norm_act, batch_norm_act_ref):
                own = norm._replace(running_mean=norm.running_mean.clone(), running_var=norm.running_var.clone())
                y = fn(x, own, act, r)
                grads = torch.autograd.grad(y.sum(), (x, r, norm.weight, norm.bias))
                results.append([y, *grads, *(t.where(t.isfinite(), torch.nan) for t in own[:2])])
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-4)


@LAYOUTS
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_what_is_kept_for_the_backward(residual, layout, device):
    """x and vectors, where eager keeps x and the activated map; with a residual the result, for its mask."""
    x, norm, r = make((2, 16, 16, 16), torch.float32, layout, residual=residual, device=device)

    def kept(fn) -> list[int]:
        storages: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
        ):
            y = fn(x, norm, "relu", r)
        assert y.untyped_storage().data_ptr() in storages or not residual
        return [n for n in storages.values() if n >= x.nbytes]

    assert kept(batch_norm_act) == [x.nbytes] * (1 + residual)
    assert kept(batch_norm_act_ref) == [x.nbytes] * 2


@LAYOUTS
def test_only_what_is_wanted(layout, device):
    """Each subset of gradients equals that of all; frozen statistics and affine included."""
    for training in (True, False):
        x, norm, r = make(dtype=wide_of(device), layout=layout, training=training, residual=True, device=device)
        leaves = (x, norm.weight, norm.bias, r)
        for act in ("relu", None):
            dy = torch.randn_like(x)
            want = torch.autograd.grad(batch_norm_act_ref(x, norm, act, r), leaves, dy)
            for wanted in ((0,), (1,), (2,), (3,), (0, 3)):
                parts = [t if i in wanted else t.detach() for i, t in enumerate(leaves)]
                y = batch_norm_act(parts[0], norm._replace(weight=parts[1], bias=parts[2]), act, parts[3])
                got = torch.autograd.grad(y, [leaves[i] for i in wanted], dy)
                for i, g in zip(wanted, got, strict=True):
                    torch.testing.assert_close(g, want[i], rtol=1e-4, atol=1e-4)


def test_strides_of_inputs_and_gradients(device):
    """A slice, a residual and an upstream gradient in other layouts, an expanded gradient."""
    x, norm, r = make((2, 8, 6, 4), wide_of(device), residual=True, device=device)
    sliced = torch.cat((x, x), 1).contiguous(memory_format=CL)[:, 3:11].detach().requires_grad_()
    for a, b in ((sliced, r), (x, r.detach().contiguous().requires_grad_())):
        results = []
        for fn in (batch_norm_act, batch_norm_act_ref):
            y = fn(a, norm, "relu", b)
            for dy in (torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=device).view(y.shape),
                       torch.ones((), dtype=y.dtype, device=device).expand(y.shape)):  # fmt: skip
                results.append([y, *torch.autograd.grad(y, (a, b, norm.weight), dy, retain_graph=True)])
        assert results[0][0].is_contiguous(memory_format=CL)
        for got, want in zip(results[:2], results[2:], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_empty_batch_and_one_value(device):
    for training in (True, False):
        x, norm, _ = make((0, 3, 4, 4), torch.float32, training=training, device=device)
        y = batch_norm_act(x, norm, "relu")
        y.sum().backward()
        assert y.shape == x.shape and x.grad.shape == x.shape and not norm.weight.grad.any()
    x, norm, _ = make((1, 3, 1, 1), torch.float32, device=device)
    with pytest.raises(ValueError, match="xpected more than 1 value per channel when training"):
        batch_norm_act(x, norm)


def test_forward_mode_and_second_derivatives(device):
    x, norm, r = make(dtype=wide_of(device), residual=True, device=device)
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level(), fastseg.explain() as report:
        y = batch_norm_act(torch.autograd.forward_ad.make_dual(x, tangent), norm, "relu", r)
        got = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert report.decisions[0].why == "forward-mode AD"
    want = torch.autograd.functional.jvp(lambda x: batch_norm_act_ref(x, norm, "relu", r), x, tangent)[1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    found = []
    for y in (batch_norm_act(x, norm, "relu", r), batch_norm_act_ref(x, norm, "relu", r)):
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), x)[0])
    assert found[1].abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_writing_over_the_result_is_noticed(device):
    """With a residual the backward reads y, as ReLU's does."""
    x, norm, r = make(dtype=torch.float32, residual=True, device=device)
    y = batch_norm_act(x, norm, "relu", r)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_residual_of_another_dtype_follows_torch(device):
    x, norm, r = make(dtype=torch.bfloat16, residual=True, device=device, grad=False)
    y = batch_norm_act(x, norm, "relu", r.float())
    assert y.dtype == torch.float32 and torch.equal(y, batch_norm_act_ref(x, norm, "relu", r.float()))


def test_bad_arguments(device):
    x, norm, _ = make(device=device)
    with pytest.raises(ValueError, match="act is 'gelu'; use None, \"relu\""):
        batch_norm_act(x, norm, "gelu")
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        batch_norm_act(x[0], norm)
    with pytest.raises(ValueError, match=r"norm.running_mean is \(5,\).*must be \(4,\)"):
        batch_norm_act(x[:, :4], norm)
    with pytest.raises(ValueError, match=r"residual is \(2, 4, 9, 7\), x is \(2, 5, 9, 7\); they must be equal"):
        batch_norm_act(x, norm, "relu", x[:, :4])
    with pytest.raises(ValueError, match="without running statistics, set training=True"):
        batch_norm_act(x, norm._replace(running_mean=None, running_var=None, training=False))
