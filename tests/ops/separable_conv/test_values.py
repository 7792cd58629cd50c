"""separable_conv2d against plain PyTorch in fp64: values, gradients, layouts, dtypes, and what breaks kernels."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from separable_inputs import ORDERS, make
from torch import Tensor

import fastseg
from fastseg.kernels.runtime.launch import intercept
from fastseg.kernels.runtime.launch import run as run_kernel
from fastseg.ops import BatchNormArgs, separable_conv2d
from fastseg.ops.separable_conv import separable_conv2d_ref
from fastseg.testing import Tolerance, check_op, compare, guard, guarded

# Half types: u, a, z (forward) and dz, g1 (backward) are each rounded once, as torch rounds them.
HALF = {torch.float16: Tolerance(2**-9, 2**-9), torch.bfloat16: Tolerance(2**-6, 2**-6)}


@pytest.fixture(params=["fused", "split"])
def form(request):
    """Run the op in one form whatever the cost model says."""
    with fastseg.force("separable_conv2d", request.param):
        yield request.param


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order(order, training, form, device):
    # 9x11 is no multiple of a tile; two images, so that a wrong image offset shows
    bias = order in ("bare", "acts") or (order == "smp" and not training)  # batch statistics cancel a bias before them
    inputs, kwargs = make(order, training=training, bias=bias, residual=True, device=device)
    check_op(separable_conv2d, separable_conv2d_ref, inputs, terms=200, **kwargs)


@pytest.mark.parametrize("residual", [False, True], ids=["bare", "residual"])
@pytest.mark.parametrize("order", ["xception", "aspp"])
def test_activation_after_the_residual(order, residual, form, device):
    """With gradients, in training and evaluation; without, where it is part of the last launch if no other precedes."""
    for training in (False, True):
        inputs, kwargs = make(order, training=training, residual=residual, device=device)
        check_op(separable_conv2d, separable_conv2d_ref, inputs, terms=200, out_act="relu6", **kwargs)
    inputs, kwargs = make(order, residual=residual, device=device)
    launched = []
    with torch.no_grad():
        want = separable_conv2d_ref(*inputs, **kwargs, out_act="relu")
        compare(separable_conv2d(*inputs, **kwargs, out_act="relu"), want.double(), terms=200)
        with intercept(lambda kernel, *_: launched.append(kernel.fn.__name__)):
            separable_conv2d(*inputs, **kwargs, out_act="relu")
    assert len(launched) == (1 if form == "fused" else 2)


SIZES: dict[str, dict] = {
    "blocks": {"C": 32, "COUT": 32, "H": 8, "W": 8},  # whole blocks everywhere
    "channels past a block": {"C": 33, "COUT": 65, "H": 5, "W": 6, "N": 3},
    "one pixel": {
        "N": 4,
        "H": 1,
        "W": 1,
        "training": False,
    },  # batch statistics: of few values, or invariant to a factor
    "one channel": {"C": 1, "COUT": 1, "H": 7, "W": 4, "training": False},
    "thin": {"H": 1, "W": 23},
    "stride 2, even": {"H": 8, "W": 10, "stride": 2},
    "stride 2, odd, dilated": {"H": 9, "W": 13, "stride": 2, "dilation": 2},
    "stride 3, no padding": {"H": 10, "W": 11, "stride": 3, "padding": 0},
    "5x5": {"K": 5, "H": 9, "W": 7},
    "7x7 dilated": {"N": 1, "K": 7, "H": 9, "W": 10, "dilation": 2},
    "even kernel": {"K": 2, "H": 6, "W": 7, "padding": 1},
    "padding past the kernel": {"H": 4, "W": 5, "padding": 4},
    "dilation past the map": {"H": 5, "W": 6, "dilation": 7, "training": False},
}


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, form, device):
    inputs, kwargs = make("aspp", **{"training": True, "device": device, **SIZES[size]})
    check_op(separable_conv2d, separable_conv2d_ref, inputs, terms=200, **kwargs)


@pytest.mark.parametrize("rate", [6, 12, 18, 24, 36])
def test_aspp_rates(rate, device):
    inputs, kwargs = make("aspp", N=1, C=3, COUT=4, H=33, W=33, dilation=rate, device=device)
    with torch.no_grad():
        check_op(separable_conv2d, separable_conv2d_ref, inputs, terms=30, grad=False, **kwargs)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half(dtype, training, form, device):
    inputs, kwargs = make("norms", C=40, COUT=24, training=training, dtype=dtype, residual=True, device=device)
    check_op(separable_conv2d, separable_conv2d_ref, inputs, tolerance=HALF[dtype], terms=100, **kwargs)


@pytest.mark.parametrize("allowed", [False, True], ids=["ieee", "tf32"])
def test_precision_follows_torchs_switch(allowed, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    seen = []

    def watch(kernel, grid, args, kwargs):
        seen.append(kwargs.get("PRECISION"))
        run_kernel(kernel, grid, args, kwargs)

    inputs, kwargs = make("smp", device=device)
    with intercept(watch):
        check_op(separable_conv2d, separable_conv2d_ref, inputs, terms=100,
                 tolerance=Tolerance(2**-10, 2**-10) if allowed else None, **kwargs)  # fmt: skip
    assert {p for p in seen if p} == {"tf32" if allowed else "ieee"}


@pytest.mark.parametrize("order", ["mobilenet", "acts"])
def test_gradcheck(order, form, device):
    if device != "cpu":
        pytest.skip("float64 runs under the interpreter only")
    inputs, kwargs = make(order, N=2, C=2, H=3, W=4, COUT=3, bias=order == "acts", training=True, residual=True,
                          dtype=torch.float64)  # fmt: skip
    norms = [t for norm in (kwargs["mid_norm"], kwargs["post_norm"]) if norm for t in norm[2:4]]
    leaves = [t for t in (*inputs, *norms, kwargs["residual"])
              if t is not None]  # fmt: skip

    def run(*_):
        return separable_conv2d(*inputs, **kwargs)

    assert torch.autograd.gradcheck(run, leaves, eps=1e-5, atol=1e-4, nondet_tol=0.0, fast_mode=True)


def layouts() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "contiguous": torch.randn(2, 5, 6, 7),
        "sliced in C": torch.randn(2, 12, 6, 7).to(memory_format=torch.channels_last)[:, 3:8],
        "transposed": torch.randn(2, 5, 7, 6).transpose(2, 3),
        "expanded": torch.randn(1, 5, 6, 1).expand(2, 5, 6, 7),
        "offset": torch.randn(2 * 5 * 6 * 7 + 3)[3:].view(2, 5, 6, 7),
        "batch of 1, odd strides": torch.randn(3, 5, 6, 7).to(memory_format=torch.channels_last)[1:2],
        "one column, strange strides": torch.randn(2, 5, 6, 9)[..., 4:5],
    }


@pytest.mark.parametrize("name", layouts())
def test_layouts(name, device):
    x = layouts()[name].to(device)
    _, dw, pw, *_ = make(device=device)[0]
    inputs, kwargs = [x, dw, pw], {"residual": torch.randn(x.shape[0], 7, *x.shape[2:], device=device)}
    check_op(separable_conv2d, separable_conv2d_ref, inputs, terms=50, **kwargs)


def test_output_keeps_the_memory_format(device):
    inputs, kwargs = make(device=device)
    assert separable_conv2d(*inputs, **kwargs).is_contiguous(memory_format=torch.channels_last)
    inputs[0] = inputs[0].detach().contiguous().requires_grad_()
    y = separable_conv2d(*inputs, **kwargs)
    assert y.is_contiguous()
    (dx,) = torch.autograd.grad(y.sum(), inputs[:1])
    assert dx.is_contiguous()


def test_expanded_upstream_gradient(device):
    inputs, kwargs = make(training=True, device=device)
    leaves = inputs[:3]
    got = torch.autograd.grad(separable_conv2d(*inputs, **kwargs).sum(), leaves)  # a gradient of stride 0
    with fastseg.reference():
        want = torch.autograd.grad(separable_conv2d(*inputs, **kwargs).sum(), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=2e-4, rtol=1e-4)  # a sum that batch statistics make cancel


def test_batch_statistics_cancel_a_bias(device):
    inputs, kwargs = make("aspp", training=True, bias=True, device=device)
    *_, dw_bias, pw_bias = torch.autograd.grad(separable_conv2d(*inputs, **kwargs).square().sum(), inputs[1:])
    assert (dw_bias == 0).all() and (pw_bias == 0).all()
    kwargs |= {name: kwargs[name]._replace(training=False) for name in ("mid_norm", "post_norm")}
    check_op(separable_conv2d, separable_conv2d_ref, inputs, terms=200, **kwargs)


@pytest.mark.parametrize("frozen", ["x", "weights", "norms", "all but the residual"])
def test_only_what_requires_grad(frozen, device):
    inputs, kwargs = make(bias=True, residual=True, device=device)
    norms = [t for norm in (kwargs["mid_norm"], kwargs["post_norm"]) for t in norm[2:4]]
    groups = {"x": inputs[:1], "weights": inputs[1:], "norms": norms, "all but the residual": [*inputs, *norms]}
    for t in groups[frozen]:
        t.requires_grad_(False)
    check_op(separable_conv2d, separable_conv2d_ref, inputs, terms=200, **kwargs)


def test_running_statistics_of_a_large_mean(device):
    # mean 1e4, deviation 1e-2 x 2^7: E[u^2] - E[u]^2 would lose every digit of the variance
    x = torch.randn(2, 3, 9, 11, device=device) * 1.28 + 1e4
    dw = torch.zeros(3, 1, 3, 3, device=device)
    dw[:, :, 1, 1] = 1
    pw = torch.eye(3, device=device)[:, :, None, None].contiguous()
    norm = BatchNormArgs(torch.zeros(3, device=device), torch.ones(3, device=device), training=True, momentum=1.0)
    y = separable_conv2d(x, dw, pw, mid_norm=norm)
    wide = x.double().cpu()
    compare(norm.running_var, wide.var((0, 2, 3)), name="running_var", tolerance=Tolerance(1e-4, 0.0))
    compare(norm.running_mean, wide.mean((0, 2, 3)), name="running_mean")
    want = F.batch_norm(wide, None, None, training=True)
    assert (y.cpu() - want).abs().max() < 2e-3  # fp32 holds 1e4 to 5e-4


def test_momentum_and_missing_statistics(device):
    inputs, kwargs = make("smp", training=True, device=device)
    kwargs["post_norm"] = kwargs["post_norm"]._replace(momentum=0.3)
    check_op(separable_conv2d, separable_conv2d_ref, inputs, terms=200, **kwargs)
    kwargs["post_norm"] = kwargs["post_norm"]._replace(running_mean=None, running_var=None)
    check_op(separable_conv2d, separable_conv2d_ref, inputs, terms=200, **kwargs)


def test_without_affine(device):
    inputs, kwargs = make("aspp", training=True, affine=False, device=device)
    check_op(separable_conv2d, separable_conv2d_ref, inputs, terms=200, **kwargs)


def test_no_gradient_paths(device):
    inputs, kwargs = make(training=True, device=device)
    before = kwargs["mid_norm"].running_mean.clone()
    with torch.no_grad():
        y = separable_conv2d(*inputs, **kwargs)
    assert not y.requires_grad
    assert not torch.equal(kwargs["mid_norm"].running_mean, before)  # training statistics move all the same
    inputs, kwargs = make(device=device)
    with torch.inference_mode():
        inputs = [None if t is None else t.detach() for t in inputs]
        check_op(separable_conv2d, separable_conv2d_ref, inputs, grad=False, terms=50,
                 **kwargs)  # fmt: skip


def test_nan_and_infinity(device):
    x = torch.zeros(1, 2, 5, 5, device=device)
    x[0, 0, 2, 2] = float("nan")
    x[0, 1, 1, 1] = float("inf")
    dw = torch.zeros(2, 1, 3, 3, device=device)  # zero weight x NaN is NaN in all nine taps
    pw = torch.eye(2, device=device)[:, :, None, None].contiguous()
    for act in ("relu", "relu6", "leaky_relu"):
        got = separable_conv2d(x, dw, pw, pre_act=None, mid_act=act, post_act=act)
        want = separable_conv2d_ref(x, dw, pw, pre_act=None, mid_act=act, post_act=act)
        assert torch.equal(got.isnan().cpu(), want.isnan().cpu())


def test_repeats_bit_for_bit(device):
    inputs, kwargs = make(C=33, COUT=24, H=9, W=19, N=1, device=device)
    results = []
    for _ in range(3):
        y = separable_conv2d(*inputs, **kwargs)
        results.append([y, *torch.autograd.grad(y, inputs[:3], torch.ones_like(y))])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_nothing_written_outside(form, device):
    if device != "cpu":
        pytest.skip("guard zones replace torch's allocating functions; the interpreter suffices")
    inputs, kwargs = make(C=5, COUT=7, training=True, residual=True)
    inputs = [None if t is None else guard(t) for t in inputs]
    with guarded():
        check_op(separable_conv2d, separable_conv2d_ref, inputs, terms=200, **kwargs)


def saved_bytes(fn) -> int:
    """Bytes of distinct storages kept for backward; parameters and the input among them."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fn()
    return sum(kept.values())


def test_keeps_at_most_half_of_what_eager_keeps(device):
    inputs, kwargs = make("aspp", C=16, COUT=16, H=16, W=16, training=True, device=device)
    x, dw, pw, *_ = inputs
    mid, post = (torch.nn.BatchNorm2d(16).to(device) for _ in range(2))

    def eager():
        u = torch.relu(mid(F.conv2d(x, dw, None, 1, 1, groups=16)))
        return torch.relu(post(F.conv2d(u, pw)))

    assert saved_bytes(lambda: separable_conv2d(*inputs, **kwargs)) <= saved_bytes(eager) / 2


def test_double_backward(device):
    """A gradient penalty beside a loss is that of the plain convolutions."""
    inputs, kwargs = make(device=device)
    found = []
    for context in (nullcontext(), fastseg.reference()):
        with context:
            (dx,) = torch.autograd.grad(separable_conv2d(*inputs, **kwargs).pow(3).sum(), inputs[:1], create_graph=True)
            found.append(torch.autograd.grad(dx.square().sum() + inputs[1].sum(), inputs[1])[0])
    assert (found[1] - 1).abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3 * float(found[1].abs().max()))


def test_changed_input_is_noticed(device):
    inputs, kwargs = make(device=device)
    x = inputs[0] * 1.0
    y = separable_conv2d(x, *inputs[1:], **kwargs)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_empty_batch(device):
    inputs, kwargs = make(N=0, device=device)
    y = separable_conv2d(*inputs, **kwargs)
    assert y.shape == (0, 7, 9, 11)
    grads = torch.autograd.grad(y.sum(), inputs[:3])
    assert grads[0].shape == (0, 5, 9, 11) and all((g == 0).all() for g in grads[1:])


def test_autocast_takes_the_autocast_dtype(device):
    inputs, kwargs = make(C=16, COUT=16, training=True, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = separable_conv2d(*inputs, **kwargs)
        with fastseg.reference():
            want = separable_conv2d(*inputs, **kwargs)
    assert y.dtype == want.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, inputs[:3], torch.ones_like(y))
    assert [g.dtype for g in grads] == [torch.float32] * 3
    assert (y.float() - want.float()).abs().max() <= 2**-6 * want.float().abs().max()


ERRORS = {
    "unknown activation": ({"post_act": "gelu"}, ValueError, "post_act is 'gelu'"),
    "3-D input": ({"x": torch.zeros(5, 9, 11)}, ValueError, r"x is \(5, 9, 11\); it must be \(N, C, H, W\)"),
    "integer input": ({"x": torch.zeros(2, 5, 9, 11, dtype=torch.int32)}, TypeError, "x is torch.int32"),
    "channels": ({"x": torch.zeros(2, 4, 9, 11)}, ValueError, "x has 4 channels"),
    "pointwise": ({"pw": torch.zeros(7, 4, 1, 1)}, ValueError, r"must be \(COUT, 5, 1, 1\)"),
    "mixed dtypes": ({"dw": torch.zeros(5, 1, 3, 3, dtype=torch.float16)}, TypeError, "should be the same"),
    "too small": ({"x": torch.zeros(2, 5, 2, 2), "padding": 0}, ValueError, "smaller than the 3x3 taps"),
    "stride": ({"stride": 0}, ValueError, "stride 0"),
    "bias": ({"dw_bias": torch.zeros(4)}, ValueError, r"depthwise_bias is \(4,\)"),
    "residual": ({"residual": torch.zeros(2, 7, 9, 10)}, ValueError, "residual is"),
    "norm size": ({"mid_norm": BatchNormArgs(torch.zeros(4), torch.ones(4))}, ValueError, "mid_norm.running_mean is"),
    "no statistics": ({"mid_norm": BatchNormArgs(None, None)}, ValueError, "set training=True"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case, device):
    changes, kind, text = ERRORS[case]
    args = {
        "x": torch.zeros(2, 5, 9, 11),
        "dw": torch.zeros(5, 1, 3, 3),
        "pw": torch.zeros(7, 5, 1, 1),
        "dw_bias": None,
    }
    args |= {name: value for name, value in changes.items() if name in args}
    options = {name: value for name, value in changes.items() if name not in args}
    to = lambda v: v.to(device) if isinstance(v, Tensor) else v
    with pytest.raises(kind, match=text):
        separable_conv2d(*(to(v) for v in args.values()), **{name: to(v) for name, v in options.items()})


def test_one_value_per_channel_raises(device):
    inputs, kwargs = make("smp", N=1, H=1, W=1, training=True, device=device)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        separable_conv2d(*inputs, **kwargs)


def test_explain_names_path_and_form(device):
    inputs, kwargs = make(device=device)
    with fastseg.explain() as report:
        separable_conv2d(*inputs, **kwargs)
        with fastseg.reference():
            separable_conv2d(*inputs, **kwargs)
        separable_conv2d(*make(K=9, device=device)[0])
    paths = [(d.path, d.why) for d in report]
    assert paths[0][0] == "triton" and paths[0][1].startswith(("fused", "split"))
    assert paths[1:] == [("reference", "inside fastseg.reference()"), ("reference", "kernel size 9 > 7")]
    assert "separable_conv2d" in str(report)
