"""A convolution of an upsampled map beside another, from nine taps at low resolution, against upsampling first."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastseg
from fastseg.ops import upsample_concat_conv
from fastseg.ops import upsample_concat_conv2d as op
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.registered import upsample_taps as _upsample_taps
from fastseg.ops.registered.upsample_taps import add_upsampled, strips
from fastseg.ops.upsample_concat_conv import upsample_concat_conv2d_ref as ref
from fastseg.testing import check_op, guard, guarded

CL, NCHW = torch.channels_last, torch.contiguous_format
CORNERS = pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])

# deep, channels and size of low, COUT: vectors of channels at factor 4; nothing a multiple of anything, odd ratios;
# one axis up and one down; one pixel to many; one pixel to one.
SHAPES = [
    ((2, 8, 2, 3), (4, 8, 12), 16),
    ((2, 5, 3, 4), (3, 7, 9), 7),
    ((1, 3, 6, 2), (2, 4, 9), 3),
    ((2, 4, 1, 1), (3, 5, 4), 4),
    ((1, 4, 1, 1), (2, 1, 1), 2),
]


def draw(shapes, dtype=torch.float32, device="cpu", layout=CL, grad=True):
    (N, C, h, w), (CL_, H, W), COUT = shapes
    made = [(N, C, h, w), (N, CL_, H, W), (COUT, C + CL_, 3, 3), (COUT,)]
    tensors = [torch.randn(s, dtype=torch.float64).to(device, dtype) for s in made]
    tensors[:2] = [t.to(memory_format=layout) for t in tensors[:2]]
    return [t.requires_grad_(grad) for t in tensors]


def bound(fn, **options):
    return lambda *tensors: fn(*tensors, **options)


def on_cpu(*tensors, act=None, align_corners=False, up_first=True):
    return upsample_concat_conv.at_low_resolution(*tensors, act, align_corners, up_first)


@pytest.fixture
def low_resolution():
    """Nine taps, whatever the cost models say; interpreted, in few programs."""
    if INTERPRETED:
        from fastseg.kernels.runtime.config import override

        with override("upsample_conv_fwd", ROWS=8):
            yield from _low_resolution()
    else:
        yield from _low_resolution()


def _low_resolution():
    name = "upsample_concat_conv2d"
    with fastseg.force(name, "low_resolution"), fastseg.force(name, "taps"):  # of CPU tensors; where kernels run
        yield


@CORNERS
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_kernel_matches_reference(shapes, align_corners, low_resolution, device):
    tensors = draw(shapes, device=device, grad=False)
    options = {"align_corners": align_corners, "up_first": not align_corners, "act": "relu" if align_corners else None}
    with fastseg.explain() as report:
        check_op(bound(op, **options), bound(ref, **options), tensors, terms=9 * 12, grad=False)
    assert next(d.path for d in report if d.op == "upsample_concat_conv2d") == "triton"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernel_in_half(dtype, low_resolution, device):
    """Taps and the other half of the convolution are rounded to 16 bits: two roundings more, of smaller sums."""
    tensors = draw(SHAPES[1], dtype, device, NCHW, grad=False)
    check_op(bound(op, act="leaky_relu"), bound(ref, act="leaky_relu"), tensors, terms=72, grad=False)


def test_kernel_in_strips(low_resolution, device):
    """Rows that begin a strip, end one, and several columns of tiles."""
    if not upsample_concat_conv.HAS_TRITON:
        pytest.skip("no Triton")
    from fastseg.kernels.runtime import config

    tensors = draw(((1, 4, 3, 2), (2, 7, 6), 4), device=device, grad=False)
    for rows, width in ((4, 4), (2, 8)):
        with config.override("upsample_conv_fwd", ROWS=rows, BLOCK_W=width, BLOCK_C=4, num_warps=1):
            check_op(op, ref, tensors, terms=54, grad=False)


@CORNERS
@pytest.mark.parametrize("shapes", [*SHAPES, ((1, 3, 10, 9), (2, 40, 36), 4)], ids=str)
def test_cpu_matches_reference(shapes, align_corners, monkeypatch):
    """With gradients and without; the last in several strips of both axes."""
    plain_ops(monkeypatch)
    tensors = draw(shapes)
    options = {"align_corners": align_corners, "up_first": align_corners, "act": "relu"}
    check_op(bound(on_cpu, **options), bound(ref, **options), tensors, terms=9 * 12)
    check_op(bound(on_cpu, **options), bound(ref, **options), tensors, terms=9 * 12, grad=False)


def plain_ops(monkeypatch):
    """The registered ops as a CPU runs them, not interpreted."""
    monkeypatch.setattr(_upsample_taps, "_fwd", _upsample_taps.plain)
    monkeypatch.setattr(_upsample_taps, "_bwd", _upsample_taps.plain_bwd)


@CORNERS
def test_traced_forms(align_corners):
    """What an exported program without custom ops gets, there and back, against the strips."""
    taps, base, bias = torch.randn(3, 2, 3, 4, 3, 5), torch.randn(2, 5, 7, 9).to(memory_format=CL), torch.randn(5)
    args = (taps, base, bias, "relu", [7, 9], align_corners)
    torch.testing.assert_close(_upsample_taps.traced(*args), _upsample_taps.plain(*args), atol=2e-5, rtol=1e-5)
    args = (base, [3, 4], align_corners)
    torch.testing.assert_close(_upsample_taps.traced_bwd(*args), _upsample_taps.plain_bwd(*args), atol=2e-5, rtol=1e-5)


def test_derivatives(monkeypatch):
    """Of second order and forward mode, and of a part of the inputs."""
    plain_ops(monkeypatch)
    tensors = draw(((1, 2, 2, 2), (1, 3, 4), 2), torch.float64)
    assert torch.autograd.gradcheck(on_cpu, tensors, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(on_cpu, tensors, fast_mode=True)
    deep, low, weight, _ = tensors
    with forward_ad.dual_level():
        y = on_cpu(forward_ad.make_dual(deep.detach(), torch.ones_like(deep)), low.detach(), weight.detach(), None)
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, ref(torch.ones_like(deep), torch.zeros_like(low), weight.detach(), None))


@CORNERS
def test_reference_is_torchs(align_corners):
    deep, low, weight, bias = draw(SHAPES[1], grad=False)
    up = F.interpolate(deep, low.shape[2:], mode="bilinear", align_corners=align_corners)
    want = F.relu(F.conv2d(torch.cat([up, low], 1), weight, bias, padding=1))
    assert torch.equal(ref(deep, low, weight, bias, act="relu", align_corners=align_corners), want)


def macs(fn) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops() // 2


def test_products():
    """DeepLabV3+'s decoder at 512^2: 19.3 GFLOP of the upsampled channels become at most 2.6, counted as they run."""
    C, COUT = 256, 256
    x, weight = torch.randn(1, C, 32, 32).to(memory_format=CL), torch.randn(COUT, C, 3, 3)
    large = torch.zeros(1, COUT, 128, 128).to(memory_format=CL)
    taps = lambda: add_upsampled(large, _upsample_taps.low_resolution_taps(x, weight), True)
    plain = macs(lambda: F.conv2d(torch.zeros(1, C, 128, 128), weight, padding=1))
    assert plain == 128 * 128 * 9 * C * COUT and 2 * plain == pytest.approx(19.3e9, rel=1e-2)
    assert 32 * 32 * 9 * C * COUT <= macs(taps) <= 1.3e9
    assert 2 * macs(taps) < 0.09 * 2 * plain


@pytest.mark.parametrize("low, full", [(32, 128), (33, 129), (5, 3), (1, 4), (4, 1)])
@CORNERS
def test_strips(low, full, align_corners):
    """Put together again, the strips are torch's interpolation of one-hot rows, shifted by a filter's taps."""
    eye = torch.eye(low, dtype=torch.float64)[None, :, :, None]  # a channel for each input
    want = F.interpolate(eye, (full, 1), mode="bilinear", align_corners=align_corners)[0, :, :, 0].T
    want = F.pad(want, (0, 0, 1, 1))
    for k in range(3):
        got = torch.zeros(full, low, dtype=torch.float64)
        for s in strips(low, full, align_corners, torch.float64, 4):
            got[s.start : s.stop, s.first : s.last] = s.weights[k]
        torch.testing.assert_close(got, want[k : k + full])


def test_the_cost_models_decide():
    decoder = (1, 256, 48, 256, 32, 32, 128, 128)
    assert upsample_concat_conv.plan_cpu(*decoder).pays
    assert not upsample_concat_conv.plan_cpu(1, 8, 8, 8, 16, 16, 32, 32).pays
    assert not upsample_concat_conv.plan_cpu(1, 256, 48, 256, 32, 32, 16, 16).pays
    for threads in (1, 2):  # which share the convolution, and not the short products of strips
        assert upsample_concat_conv.plan_cpu(1, 128, 0, 128, 16, 16, 32, 32, threads=threads).pays == (threads == 1)
    if upsample_concat_conv.HAS_TRITON:
        plan = upsample_concat_conv.plan
        for N in (1, 16):
            assert plan(N, *decoder[1:], torch.bfloat16).pays
        assert plan(1, 256, 48, 256, 64, 128, 256, 512, torch.bfloat16).pays
        assert not plan(16, 8, 8, 8, 128, 128, 256, 256, torch.bfloat16).pays
        assert "plain" in str(plan(16, 8, 8, 8, 128, 128, 256, 256, torch.bfloat16))


def test_what_is_upsampled_first(low_resolution, device):
    tensors = draw(SHAPES[1], device=device)
    with fastseg.explain() as report:
        y = op(*tensors, act="relu")
        with fastseg.reference():
            op(*tensors)
    ours = [d for d in report if d.op == "upsample_concat_conv2d"]
    assert [d.path for d in ours] == ["reference"] * 2 and ours[0].why.startswith("gradients are needed")
    check_op(bound(op, act="relu"), bound(ref, act="relu"), tensors, terms=72)
    torch.testing.assert_close(y, ref(*tensors, act="relu"), rtol=1e-4, atol=1e-4)


def test_on_a_cpu(low_resolution):
    if INTERPRETED:
        pytest.skip("kernels are interpreted")
    tensors = draw(SHAPES[1])
    deep, *others = tensors
    broken = deep.detach().clone()
    broken[0, 0, 0, 0] = float("nan")
    with fastseg.explain() as report:
        check_op(op, ref, tensors, terms=72)
        y = op(broken, *others)
        op(*(t.bfloat16() for t in tensors))
    ours = [(d.path, d.why) for d in report if d.op == "upsample_concat_conv2d"]
    assert [path for path, _ in ours] == ["torch", "reference", "reference"]
    assert "NaN" in ours[1][1] and "bfloat16" in ours[2][1]
    assert torch.equal(y.isnan(), ref(broken, *others).isnan())


def test_not_finite(low_resolution, device):
    """What the kernel gives NaN or infinity is what upsampling first gives it: no other pixel."""
    deep, low, weight, _ = draw(((1, 4, 3, 3), (2, 9, 9), 4), device=device, grad=False)
    for value in (float("nan"), float("inf")):
        deep[0, 1, 0, 2] = value
        torch.testing.assert_close(op(deep, low, weight).isfinite(), ref(deep, low, weight).isfinite())


def test_empty_batch(device):
    deep, low, weight, bias = draw(SHAPES[1], device=device)
    y = op(deep[:0], low[:0], weight, bias)
    assert y.shape == (0, 7, 7, 9)
    y.sum().backward()
    assert (weight.grad == 0).all()


def test_stays_inside_its_buffers(low_resolution, device):
    with guarded():
        tensors = [guard(t) for t in draw(SHAPES[2], device=device, grad=False)]
        y = op(*tensors)
    torch.testing.assert_close(y, ref(*tensors), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="traffic is counted under the interpreter")
def test_every_byte_once(low_resolution):
    """Nine taps and the other half's convolution read, the result written; and what L1 carries."""
    from traffic import count_traffic

    from fastseg.kernels.runtime import config

    deep, low, weight, bias = draw(((1, 4, 3, 3), (2, 12, 12), 8), grad=False)
    with config.override("upsample_conv_fwd", ROWS=16), count_traffic() as traffic:
        y = op(deep, low, weight, bias, act="relu")
    ((name, t),) = traffic.launches
    assert name == "_upsample_conv_fwd_kernel"
    assert t.read_bytes == 4 * (9 * 9 * 8 + y.numel() + 8) and t.written_bytes == 4 * y.numel()
    entering = 3 * 6 * (3 + 1)  # loads a column and channel: 3 input rows, and the last one as its own neighbour
    assert t.reads <= y.numel() + 8 * 16 + 12 * 8 * entering


def test_bad_arguments():
    deep, low, weight, bias = draw(SHAPES[1], grad=False)
    for message, args, options in (
        (r"act is 'tanh'", (deep, low, weight, bias), {"act": "tanh"}),
        (r"deep is \(5, 3, 4\)", (deep[0], low, weight), {}),
        (r"low is \(2, 3, 0, 9\)", (deep, low[:, :, :0], weight), {}),
        (r"must have the same batch size", (deep, low[:1], weight), {}),
        (r"weight is \(7, 7, 3, 3\); it must be \(COUT, 8, 3, 3\)", (deep, low, weight[:, 1:]), {}),
        (r"weight is \(7, 8, 1, 1\)", (deep, low, weight[..., :1, :1]), {}),
        (r"bias is \(6,\); it must be \(7,\)", (deep, low, weight, bias[1:]), {}),
    ):
        with pytest.raises(ValueError, match=message):
            op(*args, **options)
    with pytest.raises(TypeError, match=r"low is torch\.int64"):
        op(deep, low.long(), weight)
