"""Packed convolutions: what runs, that it is the convolution, and that nothing stale is read."""

import threading

import pytest
import torch
from torch.nn import functional as F

import fastseg
from fastseg.ops import BatchNormArgs, separable_conv2d
from fastseg.ops.core.kept import Kept, keeping, made_once
from fastseg.ops.cpu import packed as _cpu_conv
from fastseg.ops.cpu.matrix import PLAIN, Matrix, pays
from fastseg.ops.cpu.onednn import pack, why_not
from fastseg.ops.cpu.packed import PackedWeights, conv2d, packed_weights

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
CL = torch.channels_last
POINTWISE = "matrix" if torch.backends.mkl.is_available() else "packed"  # how a 1x1 of few pixels runs


@pytest.fixture(autouse=True)
def _one_thread_without_gradients():
    """What a layer takes depends on the threads: these are one thread's choices, whatever the environment says."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """Which convolutions ran packed."""
    names = []
    pack, transform, product = _cpu_conv.pack, _cpu_conv.transform, _cpu_conv.Matrix
    monkeypatch.setattr(_cpu_conv, "pack", lambda *a: names.append("packed") or pack(*a))
    monkeypatch.setattr(_cpu_conv, "Matrix", lambda *a: names.append("matrix") or product(*a))
    monkeypatch.setattr(_cpu_conv, "transform", lambda *a: names.append("winograd") or transform(*a))
    return names


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("COUT, padded", [(5, 8), (21, 24), (24, None), (4, None), (33, None)])
def test_a_rest_of_channels_is_filled_up_to_eight(COUT, padded, bias):
    x = torch.randn(2, 32, 9, 10).contiguous(memory_format=CL)
    weight, bias = torch.randn(COUT, 32, 3, 3), torch.randn(COUT) if bias else None
    run = pack(weight, bias, (1, 1), (1, 1), (1, 1), 1, x.shape)
    assert (run.weight.shape[0], run.channels) == (padded or COUT, padded and COUT)
    for each, act in ((run, lambda v: v), (run.activated("swish"), F.silu)):
        y = each(x)
        torch.testing.assert_close(y, act(F.conv2d(x, weight, bias, 1, 1)), atol=1e-4, rtol=1e-4)
        assert y.is_contiguous(memory_format=CL)


@pytest.mark.parametrize("act", [None, "relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize(
    "C, COUT, K, geometry",
    [
        (8, 12, 1, ((1, 1), (0, 0), (1, 1), 1)),
        (8, 12, 1, ((2, 2), (0, 0), (1, 1), 1)),
        (8, 12, 3, ((2, 2), (1, 1), (1, 1), 1)),
        (8, 8, 3, ((1, 1), (4, 4), (4, 4), 8)),  # depthwise, dilated
        (8, 12, 3, ((1, 1), (1, 1), (1, 1), 2)),
        (64, 160, 3, ((1, 1), (1, 1), (1, 1), 1)),
    ],
)
def test_equals_torch(C, COUT, K, geometry, act, taken):
    x = torch.randn(2, C, 24, 25).contiguous(memory_format=CL)
    weight, bias = torch.randn(COUT, C // geometry[3], K, K), torch.randn(COUT)
    want = F.conv2d(x.double(), weight.double(), bias.double(), *geometry)
    scale = want.abs().max().item()
    want = {None: lambda v: v, "relu": F.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu}[act](want)
    packed = PackedWeights(Kept([weight, bias]))
    for _ in range(2):
        with packed_weights(packed):
            y = conv2d(x, weight, bias, *geometry, act=act)
        torch.testing.assert_close(y.double(), want, rtol=0, atol=4e-6 * scale)
    assert taken == [
        "winograd" if C == 64 else "matrix" if pays(x.shape, weight, geometry) else "packed"
    ]  # once for both calls


@pytest.mark.parametrize("layout", [CL, torch.contiguous_format])
def test_a_product_for_few_pixels(layout, monkeypatch):
    """With and without bias, of maps in either order, of one pixel, and with a large matrix for that alone."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for shape, COUT in (((2, 130, 3, 4), 7), ((2, 130, 1, 1), 140), ((1, 512, 1, 1), 512)):
        x, weight, bias = (
            torch.randn(shape).contiguous(memory_format=layout),
            *map(torch.randn, ((COUT, shape[1], 1, 1), COUT)),
        )
        assert pays(shape, weight, PLAIN)
        for b in (bias, None):
            y = Matrix(weight, b)(x)
            want = F.conv2d(x.double(), weight.double(), None if b is None else b.double())
            torch.testing.assert_close(y.double(), want, rtol=0, atol=4e-6 * want.abs().max().item())
            assert y.is_contiguous(memory_format=CL)
    assert not pays((1, 512, 2, 2), weight, PLAIN) and not pays((1, 512, 1, 1), weight.bfloat16(), PLAIN)
    assert not pays((1, 512, 1, 1), weight, ((2, 2), *PLAIN[1:]))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not pays((1, 512, 1, 1), weight, PLAIN)


@pytest.mark.parametrize("K, reached", [(1, 1), (3, 9)])
def test_nan_stays_nan(K, reached, taken):
    """oneDNN's own ReLU would make it 0."""
    x = torch.randn(1, 8, 4, 4).contiguous(memory_format=CL)
    x[0, 3, 1, 2] = torch.nan
    weight = torch.randn(5, 8, K, K)
    with packed_weights(PackedWeights(Kept([weight]))):
        y = conv2d(x, weight, None, padding=(K // 2, K // 2), act="relu")
    assert taken == [POINTWISE if K == 1 else "packed"]
    assert y[0, :, 1, 2].isnan().all() and y.isnan().sum() == 5 * reached


def test_what_torch_runs(taken):
    x, w = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 1, 1)
    run = lambda *args, **options: conv2d(*args, **options)
    half = w.bfloat16()
    run(x, w)
    with packed_weights(PackedWeights(Kept([w, half]))):
        run(x.double(), w.double())
        run(x, w, padding="same")
        run(x[:0], w)
        with torch.enable_grad():
            assert run(x, w.clone().requires_grad_()).requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            assert run(x, w).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="type"):  # in torch's words
            run(x, w.double())
        assert taken == []
        run(x, w, None, (2, 2))
        assert run(x.bfloat16(), half).dtype == torch.bfloat16
    assert taken == ["packed"] * (1 if why_not(torch.bfloat16) else 2)


def _map(channels: int, side: int) -> torch.Tensor:
    return torch.randn(1, channels, side, side).to(memory_format=torch.channels_last)


def test_bytes_are_bounded(taken):
    weights = [torch.randn(64, 128, 3, 3) for _ in range(3)]
    x, packed = _map(128, 24), PackedWeights(Kept(weights), most_bytes=8 * weights[0].nbytes)
    with packed_weights(packed):
        for weight in weights:
            conv2d(x, weight, padding=(1, 1))
    assert taken == ["winograd", "winograd", "packed"] and packed.transformed == 8 * weights[0].nbytes


def test_exactness_can_be_asked_for(taken):
    weight = torch.randn(64, 128, 3, 3)
    with packed_weights(PackedWeights(Kept([weight]), winograd=False)):
        conv2d(_map(128, 24), weight, padding=(1, 1))
    assert taken == ["packed"]


@pytest.mark.parametrize(("channels", "taken_in_nchw"), [(64, []), (96, ["winograd"])])
def test_few_channels_in_nchw_are_torchs(channels, taken_in_nchw, taken):
    """To copy them to channels_last costs more than is saved; slices of a channels_last map need no such copy."""
    weight, x = torch.randn(channels, channels, 3, 3), _map(channels + 1, 24)[:, :-1]
    want = F.conv2d(x, weight, padding=1)
    with packed_weights(PackedWeights(Kept([weight]))):
        y = conv2d(x.contiguous(), weight, padding=(1, 1))
        assert taken == taken_in_nchw
        torch.testing.assert_close(y, want, rtol=0, atol=1e-3)
        torch.testing.assert_close(conv2d(x, weight, padding=(1, 1)), want, rtol=0, atol=1e-3)
    assert taken == ["winograd"]  # made once


def test_what_is_not_the_models_is_not_packed(taken):
    """A weight or bias that forward computes would be packed for each call, and kept."""
    x, weight, bias = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 1, 1), torch.randn(4)
    packed = PackedWeights(Kept([weight, bias]))
    with packed_weights(packed):
        for value in (1.0, 2.0, 3.0):
            y = conv2d(x, weight, torch.full((4,), value))
            torch.testing.assert_close(y, F.conv2d(x, weight) + value)
            torch.testing.assert_close(conv2d(x, weight * value, bias), F.conv2d(x, weight * value, bias))
        assert taken == [] and not packed._runs
        conv2d(x, weight, bias)
        conv2d(x, weight)
    assert taken == [POINTWISE, POINTWISE]


def test_a_written_weight_is_not_packed_again(taken):
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 1, 1)
    with packed_weights(PackedWeights(Kept([weight]))):
        for write in (lambda: None, lambda: weight.mul_(2), lambda: setattr(weight, "data", weight * 3)):
            write()
            torch.testing.assert_close(conv2d(x, weight), F.conv2d(x, weight))
    assert taken == [POINTWISE]


def test_shapes_of_a_weight_are_bounded(taken):
    weight = torch.randn(4, 4, 1, 1)
    with packed_weights(PackedWeights(Kept([weight]))):
        for width in range(1, _cpu_conv.MOST_SHAPES + 5):
            x = torch.randn(1, 4, 2, width)
            torch.testing.assert_close(conv2d(x, weight), F.conv2d(x, weight))
    assert len(taken) == _cpu_conv.MOST_SHAPES


def test_made_once():
    weight, calls = torch.randn(2), []
    make = lambda: calls.append(1) or len(calls)
    assert [made_once((weight,), ("n",), make) for _ in range(2)] == [1, 2]
    with packed_weights(PackedWeights(Kept([weight]))):
        assert [made_once((weight, None), ("n",), make) for _ in range(2)] == [3, 3]
        assert [made_once((weight, torch.ones(1)), ("n",), make) for _ in range(2)] == [4, 5]
        with keeping(Kept([torch.ones(1)])):
            assert made_once((weight, None), ("n",), make) == 3  # of the block outside
        weight += 1
        assert [made_once((weight, None), ("n",), make) for _ in range(2)] == [6, 7]
        other = []
        thread = threading.Thread(target=lambda: other.append(_cpu_conv.packing()))
        thread.start(), thread.join()
        assert other == [False] and _cpu_conv.packing()  # of this thread alone
    assert not _cpu_conv.packing()


def test_another_norm_is_not_the_first():
    """The same weights with other statistics, affine parameters or eps: nothing folded for one serves the other."""
    x, dw, pw = torch.randn(1, 4, 6, 6), torch.randn(4, 1, 3, 3), torch.randn(5, 4, 1, 1)
    draw = lambda: [torch.rand(5) + 0.5 for _ in range(4)]
    first = BatchNormArgs(*draw())
    norms = [first, *(first._replace(**{name: torch.rand(5) + 0.5}) for name in first._fields[:4]),
             first._replace(eps=0.3), BatchNormArgs(*draw())]  # fmt: skip
    with fastseg.reference():
        want = [separable_conv2d(x, dw, pw, post_norm=norm) for norm in norms]
        kept = Kept([dw, pw, *(t for norm in norms for t in norm[:4])])
        with keeping(kept), packed_weights(PackedWeights(kept)):
            got = [separable_conv2d(x, dw, pw, post_norm=norm) for norm in norms]
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
