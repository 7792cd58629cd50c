"""Edges of the separable convolution that default tiles and small maps never reach; each test names what it would miss.

Small blocks stand for large maps: with 16 rows a block, 60 pixels walk every loop of the kernels more than once.
"""

import contextlib
import sys

import pytest
import torch
from separable_inputs import make
from torch import nn

import fastseg
from fastseg.ops import BatchNormArgs, separable_conv2d
from fastseg.ops.registered import separable_conv as _separable_conv
from fastseg.ops.registered.separable_conv import ACTIVATIONS
from fastseg.ops.separable_conv import separable_conv2d_ref
from fastseg.testing import check_op

pytest.importorskip("triton")
from fastseg.kernels.batch_norm import fwd as batch_norm_act
from fastseg.kernels.runtime import config
from fastseg.kernels.runtime.conv_sizes import Geometry
from fastseg.kernels.runtime.launch import intercept, run
from fastseg.kernels.separable_conv import fwd as separable_conv_fwd
from fastseg.kernels.separable_conv.cost import plan

SMALL = {
    "separable_conv_fwd_fused": {"BLOCK_H": 4, "BLOCK_W": 4, "BLOCK_N": 16, "BLOCK_K": 16},
    "separable_conv_fwd_dw": {"BLOCK_H": 2, "BLOCK_W": 8, "BLOCK_C": 16},
    "separable_conv_fwd_pw": {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16},
    "separable_conv_bwd_pw_input": {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16},
    "separable_conv_bwd_pw_weight": {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16},
    "separable_conv_bwd_dw_input": {"BLOCK_H": 4, "BLOCK_W": 4, "BLOCK_C": 16},
    "separable_conv_bwd_dw_weight": {"BLOCK_M": 16, "BLOCK_C": 16},
    "batch_stats": {"BLOCK_T": 4, "BLOCK_C": 16},
    "batch_norm_act_fwd": {"BLOCK_M": 16, "BLOCK_C": 16},
    "batch_norm_act_bwd_reduce": {"BLOCK_M": 16, "BLOCK_C": 16},
}


@pytest.fixture(params=["fused", "split"])
def form(request):
    """Run the op in one form whatever the cost model says."""
    with fastseg.force("separable_conv2d", request.param):
        yield request.param


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_every_loop_walks_twice(training, form, device, monkeypatch):
    # Two blocks and a rest on every axis: channels, output channels, tiles, and rows of one program of a reduction.
    monkeypatch.setattr(batch_norm_act, "PROGRAMS", 6)
    inputs, kwargs = make("aspp", C=17, COUT=33, H=6, W=7, K=2, padding=0, training=training, device=device)
    with contextlib.ExitStack() as stack:
        for kernel, values in SMALL.items():
            stack.enter_context(config.override(kernel, **values))
        check_op(separable_conv2d, separable_conv2d_ref, inputs, terms=200, **kwargs)


@pytest.mark.parametrize("K", [2, 3])
def test_taps_packed_for_large_maps(K, form, device, monkeypatch):
    # Channels innermost from 2^22 depthwise elements on: the weights' layout of a map a million times as large
    small = separable_conv_fwd.tap_weights
    monkeypatch.setattr(_separable_conv, "tap_weights", lambda dw, g: small(dw, g._replace(N=2**22)))
    inputs, kwargs = make("smp", C=5, K=K, H=6, W=7, device=device)
    check_op(separable_conv2d, separable_conv2d_ref, inputs, terms=100, **kwargs)


def test_taps_are_packed_from_four_million_elements_on():
    dw = torch.randn(32, 1, 3, 3)
    for N, strides in ((2**9, (1, 32)), (2**9 - 1, (9, 1))):
        taps = separable_conv_fwd.tap_weights(dw, Geometry(N, 32, 16, 16, 8, 16, 16, 3, 1, 1, 1))
        assert taps.stride() == strides
        assert torch.equal(taps, dw.view(32, 9))


@pytest.mark.parametrize("order, K, bias", [("aspp", 3, True), ("mobilenet", 5, False), ("smp", 3, False)])
def test_frozen_folds_the_middle_norm_into_packed_taps(order, K, bias, form, device):
    """No kernel sees a middle norm or weights with taps innermost; a write to one of the tensors ends that."""
    inputs, kwargs = make(order, C=17, COUT=21, H=7, W=6, K=K, bias=bias, device=device)
    norm = kwargs["mid_norm"]
    held = nn.ParameterList([t.detach() for t in (*inputs[1:], *(norm[:4] if norm else ())) if t is not None])
    tensors = iter(held)
    x, *weights = [inputs[0].detach(), *[None if t is None else next(tensors) for t in inputs[1:]]]
    if norm:
        kwargs["mid_norm"] = norm._replace(**dict(zip(norm._fields[:4], tensors, strict=True)))
    with torch.no_grad(), fastseg.frozen(held):
        for written in (False, True):
            if written:
                weights[0].mul_(2)
            seen: list[dict] = []

            def note(kernel, grid, args, named, seen=seen):
                seen.append(named)
                run(kernel, grid, args, named)

            with intercept(note):
                y = separable_conv2d(x, *weights, **kwargs)
            torch.testing.assert_close(y, separable_conv2d_ref(x, *weights, **kwargs), rtol=1e-5, atol=1e-5)
            taps = [named for named in seen if "DW_C" in named]
            assert taps and all((named["DW_C"] == 1 and not named["MID_NORM"]) is not written for named in taps)


@pytest.mark.parametrize("order, bias", [("aspp", True), ("smp", False)])
@pytest.mark.parametrize("values, folded", [(7 * 6 * 17, True), (7 * 6 * 17 + 1, False)])
def test_a_large_map_folds_the_middle_norm_at_each_call(order, bias, values, folded, form, device, monkeypatch):
    """The fused form, which would compute each scale in every program; nothing is remembered, and training does not."""
    monkeypatch.setattr(sys.modules[separable_conv2d_ref.__module__], "FOLDED_FROM", values)
    inputs, kwargs = make(order, C=17, COUT=21, H=7, W=6, bias=bias, device=device)
    inputs = [None if t is None else t.detach() for t in inputs]
    seen: list[dict] = []

    def note(kernel, grid, args, named):
        seen.append(named)
        run(kernel, grid, args, named)

    for _ in range(2):
        with torch.no_grad(), intercept(note):
            y = separable_conv2d(*inputs, **kwargs)
        torch.testing.assert_close(y, separable_conv2d_ref(*inputs, **kwargs), rtol=1e-5, atol=1e-5)
        inputs[1].mul_(2)
    norms = [named["MID_NORM"] for named in seen if "DW_C" in named]
    assert norms == [bool(kwargs.get("mid_norm")) and not (folded and form == "fused")] * 2


# Both sides of every corner of the activations, the corners themselves, and what must not be swallowed; as many as fill
# whole vectors: torch's CPU gradient of ReLU6 at NaN is 0 there, 1 in the loop over the elements that are left.
CORNERS = [-1.0, -0.0, 0.0, 3.0, 6.0, 7.0, float("inf"), float("nan")] * 8


@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("place", ["pre_act", "mid_act", "post_act"])
def test_activations_at_their_corners(place, act, form, device):
    x = torch.tensor(CORNERS, device=device).view(1, 1, 1, -1)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    one = torch.ones(1, 1, 1, 1, device=device)
    y = separable_conv2d(x, one, one, **{place: act})
    want = ACTIVATIONS[act](x)
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
    upstream = torch.full_like(x, 3.0)
    got_grad, want_grad = (torch.autograd.grad(out, x, upstream)[0] for out in (y, want))
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("half", ["mid", "post"])
def test_each_convolution_rounds_its_output(half, form, device):
    # 1 + 2^-12 is 1 in fp16: the norm behind sees exactly its mean, where an unrounded sum would give 2^-12 x 2^10
    like = {"device": device, "dtype": torch.float16}
    one, x, bias = torch.ones(1, 1, 1, 1, **like), torch.ones(1, 1, 4, 4, **like), torch.full((1,), 2**-12, **like)
    norm = BatchNormArgs(torch.ones(1, device=device), torch.full((1,), 2.0**-20, device=device), eps=0.0)
    biases = {"depthwise_bias" if half == "mid" else "pointwise_bias": bias}
    y = separable_conv2d(x, one, one, **biases, **{f"{half}_norm": norm})
    assert (y == 0).all()


def test_the_norms_keep_their_own_eps(form, device):
    inputs, kwargs = make("aspp", training=True, device=device)
    kwargs["mid_norm"] = kwargs["mid_norm"]._replace(eps=0.5)
    kwargs["post_norm"] = kwargs["post_norm"]._replace(eps=1e-3)
    check_op(separable_conv2d, separable_conv2d_ref, inputs, terms=200, **kwargs)


def test_vectors_of_any_stride(device):
    inputs, kwargs = make("aspp", bias=True, training=False, device=device)
    apart = lambda t: torch.stack([t.detach(), t.detach() + 1], 1)[:, 0].requires_grad_(t.requires_grad)
    inputs[3:] = map(apart, inputs[3:])
    inputs[2] = inputs[2].detach().flatten(1).t().contiguous().t()[:, :, None, None].requires_grad_()
    for name in ("mid_norm", "post_norm"):
        norm = kwargs[name]
        kwargs[name] = norm._replace(**{field: apart(getattr(norm, field)) for field in norm._fields[:4]})
    check_op(separable_conv2d, separable_conv2d_ref, inputs, terms=200, **kwargs)


@pytest.mark.parametrize("only", ["depthwise_bias", "mid_norm", "pointwise_bias", "post_norm"])
def test_one_tensor_alone_requires_grad(only, device):
    inputs, kwargs = make("acts" if only.endswith("bias") else "aspp", bias=True, device=device)
    norm = kwargs.get(only)
    alone = [inputs[3 if only == "depthwise_bias" else 4]] if norm is None else norm[2:4]
    norms = [t for name in ("mid_norm", "post_norm") if kwargs[name] for t in kwargs[name][2:4]]
    for t in (*inputs, *norms):
        t.requires_grad_(any(t is a for a in alone))
    check_op(separable_conv2d, separable_conv2d_ref, inputs, terms=200, **kwargs)


def test_the_cost_model_takes_both_forms():
    fused = lambda C, COUT, dtype: (
        plan(Geometry(8, C, 64, 64, COUT, 64, 64, 3, 1, 1, 1), dtype, mid_batch_stats=False).pays
    )
    assert fused(32, 32, torch.float16)  # bound by memory: the depthwise map is saved
    assert not fused(728, 728, torch.float32)  # fused would compute the taps six times


def test_images_of_2_to_the_31_elements_are_left_to_torch():
    g = Geometry(1, 2**11, 2**10, 2**10, 16, 2**9, 2**9, 3, 2, 1, 1)
    assert "2147483648 elements" in g.unsupported()
    assert g._replace(C=2**11 - 1).unsupported() == ""


def test_reference_reads_strided_norm_parameters():
    """torch 2.13's own batch norm does not, in the backward of channels_last input on a CPU."""
    inputs, kwargs = make("smp")
    dense = kwargs["post_norm"]
    strided = dense._replace(weight=dense.weight.detach().repeat_interleave(2)[::2].requires_grad_())
    grads = []
    for norm in (dense, strided):
        y = separable_conv2d_ref(*inputs, **{**kwargs, "post_norm": norm})
        grads.append(torch.autograd.grad(y.square().sum(), inputs[0])[0])
    torch.testing.assert_close(grads[1], grads[0])


def test_residual_is_not_kept_for_backward():
    inputs, kwargs = make("aspp", training=True, residual=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        separable_conv2d(*inputs, **kwargs)
    assert inputs[0].data_ptr() in kept  # x is, on either path
    assert kwargs["residual"].data_ptr() not in kept  # its gradient is dy itself


def test_sums_are_rounded_once(form, device):
    """Over the taps, the blocks of channels, and in the backward over pixels: 2048 + 1 is 2048 in fp16: a sum that
    is rounded on its way loses each of the ones."""
    ones = lambda *shape: torch.ones(*shape, device=device, dtype=torch.float16)
    x = ones(1, 48, 1, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    dw, pw = ones(48, 1, 1, 1), torch.zeros_like(ones(48, 48, 1, 1))
    pw[::16, ::16], pw[0, 0] = 1, 2048  # one channel in each block
    with contextlib.ExitStack() as stack:
        for kernel, values in SMALL.items():
            stack.enter_context(config.override(kernel, **values))
        y = separable_conv2d(x, dw, pw)
        assert (y[:, 0] == 2050).all()
        assert (torch.autograd.grad(y, x, torch.ones_like(y))[0][:, 0] == 2050).all()  # over output channels
        rows = ones(1, 1, 3, 16)
        rows[:, :, 0, 0], rows[:, :, 0, 1:], rows[:, :, 1:, 1:] = 2048, 0, 0  # three blocks of 16 pixels
        taps, weight = torch.zeros_like(ones(1, 1, 3, 3)), ones(1, 1, 1, 1).requires_grad_()
        taps[:, :, 1, 1] = 1
        taps.requires_grad_()
        y = separable_conv2d(rows.contiguous(memory_format=torch.channels_last), taps, weight)
        dtaps, dweight = torch.autograd.grad(y, (taps, weight), torch.ones_like(y))
        assert dweight == 2050 and dtaps[0, 0, 1, 1] == 2050
        large = ones(1, 1, 3, 3)
        large[:, :, 0, 0] = 2048
        one = ones(1, 1, 3, 3).requires_grad_()
        y = separable_conv2d(one, large, weight)
        assert y[0, 0, 1, 1] == 2056  # over the taps
        assert torch.autograd.grad(y, one, torch.ones_like(y))[0][0, 0, 1, 1] == 2056
