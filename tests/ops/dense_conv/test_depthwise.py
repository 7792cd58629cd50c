"""Depthwise convolutions with far taps on a CPU, tap by tap; and what small maps cost the host beside torch's calls."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastseg
from benchmarks.studies import host_cost
from fastseg import nn as fnn
from fastseg.ops import atrous_conv2d, max_unpool2d
from fastseg.ops.core import dispatch
from fastseg.ops.cpu import depthwise
from fastseg.ops.cpu.packed import conv2d
from fastseg.ops.registered import fold_norm

LAYOUTS = [torch.contiguous_format, torch.channels_last]


class Ops(TorchDispatchMode):
    """Names of torch's calls."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


@pytest.fixture
def plain(monkeypatch):
    """As on a machine without Triton's interpreter, and outside the deterministic mode that fills new memory."""
    for module in (dispatch, fold_norm):
        monkeypatch.setattr(module, "INTERPRETED", False)
    torch.use_deterministic_algorithms(False)  # the fixture that set it puts it back


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("K", "dilation"), [(3, (5, 5)), (3, (12, 7)), (5, (6, 6)), (3, (40, 9))])
@pytest.mark.parametrize("shared", [2**15, 2**18], ids=["shared", "alone"])
def test_far_taps(K, dilation, layout, shared, monkeypatch):
    """Odd sizes, taps that never lie in the map, a batch, a bias, two threads; small maps and, as it were, large."""
    monkeypatch.setattr(depthwise, "_SHARED", shared)
    x = torch.randn(2, 24, 27, 31).to(memory_format=layout)
    weight, bias = torch.randn(24, 1, K, K), torch.randn(24)
    padding = tuple(d * (K // 2) for d in dilation)
    threads = torch.get_num_threads()
    for b in (None, bias):
        want = F.conv2d(x.double(), weight.double(), None if b is None else b.double(), 1, padding, dilation, 24)
        for n in (1, 2):
            torch.set_num_threads(n)
            try:
                with torch.no_grad():
                    y = depthwise.by_taps(x, weight, b, dilation)
            finally:
                torch.set_num_threads(threads)
            torch.testing.assert_close(y.double(), want, rtol=0, atol=1e-5)
            assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("channels", "side", "layout", "threads", "taps"), [
    (64, 32, torch.channels_last, 1, True),
    (64, 32, torch.channels_last, 2, False),  # 1.1 of eager's time
    (64, 32, torch.contiguous_format, 1, False),  # 1.1
    (256, 32, torch.channels_last, 2, True),
    (256, 32, torch.contiguous_format, 1, True),
    (256, 32, torch.contiguous_format, 2, False),  # 1.1
    (16, 32, torch.channels_last, 1, False),
])  # fmt: skip
def test_far_taps_where_they_pay(channels, side, layout, threads, taps):
    x, weight = torch.randn(1, channels, side, side).to(memory_format=layout), torch.randn(channels, 1, 3, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), Ops() as ops:
            y = conv2d(x, weight, None, (1, 1), (6, 6), (6, 6), channels, "relu")
    finally:
        torch.set_num_threads(before)
    assert any("convolution" in name for name in ops.names) != taps
    torch.testing.assert_close(y, F.conv2d(x, weight, None, 1, 6, 6, channels).relu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["gradient", "near", "valid padding", "stride", "two filters", "half", "small"])
def test_others_are_torchs(change):
    x, weight = torch.randn(1, 24, 40, 40).to(memory_format=torch.channels_last), torch.randn(24, 1, 3, 3)
    stride, padding, dilation = (1, 1), (6, 6), (6, 6)
    if change == "gradient":
        weight.requires_grad_()
    elif change == "near":
        padding = dilation = (4, 4)
    elif change == "valid padding":
        padding = (0, 0)
    elif change == "stride":
        stride = (2, 2)
    elif change == "two filters":
        weight = torch.randn(48, 1, 3, 3)
    elif change == "half":
        x, weight = x.bfloat16(), weight.bfloat16()
    elif change == "small":
        x = x[:, :, :8, :8].contiguous(memory_format=torch.channels_last)
    want = F.conv2d(x, weight, None, stride, padding, dilation, 24)
    with Ops() as ops:
        assert torch.equal(conv2d(x, weight, None, stride, padding, dilation, 24), want)
    assert sum("convolution" in name for name in ops.names) == 1


def test_far_taps_carry_nan():
    x, weight = torch.randn(1, 32, 40, 40).to(memory_format=torch.channels_last), torch.rand(32, 1, 3, 3) + 0.1
    x[0, 3, 20, 20] = float("nan")
    with torch.no_grad():
        wrong = conv2d(x, weight, None, (1, 1), (6, 6), (6, 6), 32).isnan()
    where = {(3, 20 + i, 20 + j) for i in (-6, 0, 6) for j in (-6, 0, 6)}
    assert {tuple(at[1:]) for at in wrong.nonzero().tolist()} == where


# --- calls of Python functions, beside eager's


def pairs() -> dict[str, tuple]:
    values, index = F.max_pool2d(torch.randn(1, 8, 8, 8), 2, return_indices=True)
    x, weight = torch.randn(1, 8, 8, 8), torch.randn(8, 8, 3, 3)
    separable = fnn.SeparableConv2d(8, 8, mid_norm=True, mid_act="relu").eval()
    ours, eager = (m(2, return_indices=True) for m in (fnn.MaxPool2d, nn.MaxPool2d))
    unpool, eager_unpool = fnn.MaxUnpool2d(2), nn.MaxUnpool2d(2)
    return {
        "pooling": (lambda: ours(x), lambda: eager(x), 1),
        "unpooling": (lambda: unpool(values, index), lambda: eager_unpool(values, index), 0),
        "unpooling to a size": (
            lambda: unpool(values, index, output_size=(1, 8, 9, 9)),
            lambda: eager_unpool(values, index, output_size=(1, 8, 9, 9)),
            0,
        ),
        "atrous": (lambda: atrous_conv2d(x, weight, act="relu"), lambda: F.conv2d(x, weight).relu_(), 12),
        "separable": (lambda: separable(x), lambda: None, 140),
    }


@pytest.mark.parametrize("name", ["pooling", "unpooling", "unpooling to a size", "atrous", "separable"])
def test_calls_on_a_cpu(name, plain):
    ours, eager, more = pairs()[name]
    with torch.no_grad():
        assert host_cost.python_calls(ours) <= host_cost.python_calls(eager) + more


def test_small_norms_are_not_folded(plain):
    """A dozen calls on the weights would cost more than one on the map; inside ``frozen`` they are made once."""
    module = fnn.SeparableConv2d(8, 8, mid_norm=True, mid_act="relu").eval()
    small, large = torch.randn(1, 8, 6, 6), torch.randn(1, 8, 160, 160)
    with torch.no_grad():
        for x, norms in ((small, 2), (large, 0)):
            want = module.post_norm(module.pointwise(module.mid_norm(module.depthwise(x)).relu())).relu()
            with Ops() as ops:
                y = module(x)
            torch.testing.assert_close(y, want, rtol=0, atol=1e-5)
            assert sum("batch_norm" in op for op in ops.names) == norms
        with fastseg.frozen(module), Ops() as ops:
            module(small)
        assert not any("batch_norm" in op for op in ops.names)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 4, 4), (2, 5, 1, 1), (1, 1, 1, 3)])
@pytest.mark.parametrize("larger", [None, 0, 1])
def test_unpooling_is_torchs(shape, layout, larger, plain):
    x = torch.randn(shape[0], shape[1], 2 * shape[2], 2 * shape[3]).to(memory_format=layout)
    values, index = F.max_pool2d(x, 2, return_indices=True)
    values.requires_grad_()
    size = None if larger is None else (x.shape[2] + larger, x.shape[3])
    want, got = F.max_unpool2d(values, index, 2, output_size=size), max_unpool2d(values, index, 2, output_size=size)
    assert torch.equal(got, want) and got.stride() == want.stride()
    seed = torch.randn_like(want)
    assert torch.equal(*(torch.autograd.grad(y, values, seed)[0] for y in (got, want)))


def test_unpooling_keeps_its_guarantees(plain):
    values, index = F.max_pool2d(torch.randn(1, 2, 8, 8), 2, return_indices=True)
    want = F.max_unpool2d(values, index, 2)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(max_unpool2d(values, index, 2), want)
    finally:
        torch.use_deterministic_algorithms(False)
    with pytest.raises(RuntimeError, match="invalid max index"):
        max_unpool2d(values, index + 64, 2)
    with pytest.raises(RuntimeError, match="int64 but got"):
        max_unpool2d(values, index.int(), 2)
    with pytest.raises(ValueError, match="invalid output_size"):
        max_unpool2d(values, index, 2, output_size=(10, 10))
    with pytest.raises(ValueError, match="check_indices"):
        max_unpool2d(values, index, 2, check_indices="never")
    with fastseg.explain() as report:
        max_unpool2d(values, index, 2)
        fnn.MaxPool2d(2)(values)
        atrous_conv2d(values, torch.randn(2, 2, 3, 3))
    assert {d.op for d in report} >= {"max_unpool2d", "max_pool2d", "atrous_conv2d"}
    got = torch.func.vmap(lambda v, i: max_unpool2d(v, i, 2))(values[None], index[None])[0]
    assert torch.equal(got, want)
