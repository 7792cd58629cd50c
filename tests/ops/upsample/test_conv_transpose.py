"""The bilinear transposed convolution against ``conv_transpose2d`` with the dense weight: borders, crops, skips."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

import fastseg
from fastseg.ops import bilinear_conv_transpose2d, bilinear_kernel, upsample_bilinear
from fastseg.ops.bilinear_conv_transpose import FORMS, bilinear_conv_transpose2d_ref
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.cpu.bilinear_taps import Request
from fastseg.testing import check_op, guard, guarded

if INTERPRETED:
    from fastseg.kernels.runtime import config

CL, NCHW = torch.channels_last, torch.contiguous_format
LAYOUT = pytest.mark.parametrize("layout", [NCHW, CL], ids=["nchw", "nhwc"])

# stride, kernel size, padding
TAPS = [
    (2, None, None),  # k4 s2 p1, the usual one
    (2, 4, 0),  # FCN's, uncropped
    (3, None, None),  # odd: k5 s3 p1
    (3, 6, 1),  # even kernel, odd stride: the output is not 3 times the input
    (4, 7, 3),  # odd, 2s - 1: interpolation with align_corners
    (4, 5, 0),  # shorter than 2s - 1: some outputs have one tap
    (5, 3, 0),  # shorter than the stride: some have none
    (8, 13, 3),  # two taps of one sign, whose sum is not 1
    (8, 16, 11),  # more is cut off than one input pixel reaches
    (1, None, None),  # the identity
    (16, None, None),  # more outputs an input than are unrolled
    (32, None, None),  # FCN-32s: k64; forward only, its backward takes the interpreter 10 s
]


@pytest.fixture(autouse=True)
def _strips(request):
    """Strips of 8 rows, as large maps get them."""
    if not INTERPRETED or "one_row_a_strip" in request.node.name:
        yield
        return
    with config.override("bilinear_fwd", ROWS=8), config.override("bilinear_bwd", ROWS=4):
        yield


def dense(x, stride, kernel_size=None, padding=None, *, bias=None, skip=None, skip_offset=0, output_size=None):
    """What the op stands for, written with torch's own convolution."""
    C, K = x.shape[1], 2 * stride - stride % 2 if kernel_size is None else kernel_size
    p = (K - stride) // 2 if padding is None else padding
    weight = bilinear_kernel(C, C, K, dtype=x.dtype, device=x.device)
    if output_size is None:
        y = F.conv_transpose2d(x, weight, None, stride, p)
    else:
        y = F.pad(F.conv_transpose2d(x, weight, None, stride), (0, 50, 0, 50))
        y = y[:, :, p : p + output_size[0], p : p + output_size[1]]
    y = y if bias is None else y + bias[:, None, None]
    if skip is not None:
        y = y + skip[:, :, skip_offset:, skip_offset:][:, :, : y.shape[2], : y.shape[3]]
    return y


def draw(shape, layout=NCHW, dtype=torch.float32, device="cpu"):
    x = torch.randn(shape, dtype=torch.float64).to(dtype).to(device)
    return (x.to(memory_format=layout) if x.dim() == 4 else x).requires_grad_()


@LAYOUT
@pytest.mark.parametrize("taps", TAPS, ids=str)
def test_matches_the_dense_convolution(taps, layout, device):
    """Channels: 3 are runs of elements in NHWC."""
    shape = (1, 3, 1, 2) if taps[0] > 8 else (2, 3, 3, 4)
    x = draw(shape, layout, device=device)
    check_op(bilinear_conv_transpose2d, dense, [x, *taps], terms=4, grad=taps[0] != 32)


@LAYOUT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bias_and_skip(dtype, layout, device):
    """8 channels are vectors in NHWC; the skip is cropped as FCN crops score_pool4, and larger than its window."""
    x, skip, bias = (draw(s, layout, dtype, device) for s in ((2, 8, 3, 4), (2, 8, 15, 16), (8,)))
    check_op(bilinear_conv_transpose2d, dense, [x, 2, 4, 0], bias=bias, skip=skip, skip_offset=5, terms=4)


def test_skip_in_another_layout_and_of_the_same_size(device):
    x, skip = draw((2, 5, 3, 4), CL, device=device), draw((2, 5, 6, 8), NCHW, device=device)
    check_op(bilinear_conv_transpose2d, dense, [x, 2], skip=skip, terms=4)


@LAYOUT
@pytest.mark.parametrize(("padding", "size"), [(31, (7, 5)), (0, (30, 33)), (3, (5, 26))], ids=str)
def test_output_size(padding, size, layout, device):
    """FCN-8s's crop at 31 to the image; larger than the kernel reaches; cut in one direction and grown in the other."""
    x = draw((1, 3, 6, 5) if padding == 31 else (1, 3, 2, 3), layout, device=device)
    bias = draw((3,), device=device)
    check_op(bilinear_conv_transpose2d, dense, [x, 8 if padding == 31 else 4, 16 if padding == 31 else 8, padding],
             output_size=size, bias=bias, terms=4)  # fmt: skip


@pytest.mark.parametrize("C", [3, 24], ids=["elements", "vectors"])
def test_more_than_one_block(C, device):
    if not INTERPRETED:
        check_op(bilinear_conv_transpose2d, dense, [draw((2, C, 33, 65), CL, device=device), 4], terms=4)
        return
    tile = {"ROWS": 4, "BLOCK_W": 16, "BLOCK_C": 16}
    with config.override("bilinear_fwd", **tile), config.override("bilinear_bwd", ROWS=2, BLOCK_W=4, BLOCK_C=16):
        check_op(bilinear_conv_transpose2d, dense, [draw((2, C, 3, 5), CL), 4], terms=4)


def test_one_row_a_strip(device):
    check_op(bilinear_conv_transpose2d, dense, [draw((1, 2, 3, 3), device=device), 2], terms=4)


@LAYOUT
def test_reference(layout):
    """The one CPU users run, against the dense weight; also with more than four taps."""
    for taps in (*TAPS, (2, 7, 2), (2, 8, 3)):
        x, bias = draw((2, 3, 3, 4), layout), draw((3,))
        skip = draw((2, 3, *(n + 2 for n in dense(x, *taps).shape[2:])), layout)
        check_op(bilinear_conv_transpose2d_ref, dense, [x, *taps], bias=bias, skip=skip, skip_offset=1, terms=4)
    half = draw((1, 3, 3, 4), layout, torch.bfloat16)
    check_op(bilinear_conv_transpose2d_ref, dense, [half, 2], terms=4)


def can(form, stride, K):
    """Whether the form computes these taps; a grouped convolution and matrices compute all."""
    K = 2 * stride - stride % 2 if K is None else K
    if form == "interpolated":
        return 2 * stride == K and stride in (2, 4, 8, 16, 32)
    return form in ("grouped", "matrices") or stride <= K <= 2 * stride


@LAYOUT
@pytest.mark.parametrize("form", ["grouped", "interpolated", "matrices", "two_passes"])
def test_each_cpu_form(form, layout):
    """What a CPU runs where no gradient is wanted: small and large strides, sizes past the kernel's reach, 16 bits."""
    sizes = [(None, *taps) for taps in TAPS] + [((7, 5), 8, 16, 31), ((50, 53), 8, 16, 0), ((5, 46), 8, 16, 3)]
    sizes += [((6, 60), 8, 13, 9), ((9, 3), 8, 15, 40), ((9, 3), 8, 16, 60)]
    for size, *taps in (row for row in sizes if can(form, *row[1:3])):
        for shape in ((2, 3, 3, 4), (1, 1, 6, 5), (0, 3, 2, 2)):
            x, bias = draw(shape, layout).detach(), draw(shape[1:2]).detach()
            skip = draw((*shape[:2], *(n + 2 for n in dense(x, *taps, output_size=size).shape[2:])), layout).detach()
            options = {"bias": bias, "skip": skip, "skip_offset": 1, "output_size": size}
            with fastseg.force("bilinear_conv_transpose2d", form), fastseg.explain() as report:
                y = bilinear_conv_transpose2d(x, *taps, **options)
            assert report.decisions[0].form == form or (shape[0] == 0 and form in ("interpolated", "matrices"))
            torch.testing.assert_close(y, dense(x, *taps, **options), atol=1e-6, rtol=1e-6)
            assert y.numel() == 0 or y.is_contiguous(memory_format=layout)
    half = draw((1, 3, 3, 4), layout, torch.bfloat16).detach()
    want = dense(half.double(), 8).to(torch.bfloat16)
    with fastseg.force("bilinear_conv_transpose2d", form):
        torch.testing.assert_close(bilinear_conv_transpose2d(half, 8), want)


@pytest.mark.parametrize(("C", "side", "stride", "last", "one", "two"), [
    (1, 4, 32, False, "interpolated", "interpolated"),  # 0.15 of the time of two passes
    (1, 256, 2, True, "interpolated", "interpolated"),
    (2, 64, 8, False, "interpolated", "interpolated"),
    (2, 16, 8, True, "interpolated", "interpolated"),
    (2, 64, 8, True, "grouped", "grouped"),
    (2, 64, 2, True, "grouped", "grouped"),
    (3, 4, 32, True, "interpolated", "interpolated"),
    (3, 16, 8, False, "grouped", "grouped"),
    (21, 4, 32, False, "grouped", "grouped"),  # 0.6 of the time of two passes
    (21, 16, 32, False, "two_passes", "grouped"),
    (21, 16, 32, True, "grouped", "grouped"),
    (21, 256, 2, False, "grouped", "grouped"),
])  # fmt: skip
def test_choice_on_a_cpu(C, side, stride, last, one, two):
    """By shape, and by the number of threads, if there are NaNs or infinities."""
    values = C * (side * stride) ** 2

    def chosen(stride: int, K: int, threads: int) -> str:
        shape = (1, C, side, side)
        return FORMS.choose(Request("CPU tensor", "", True, shape, values, stride, K, last, threads)).form.name

    for threads, want in ((1, one), (2, two)):
        assert chosen(stride, 2 * stride, threads) == want
        assert chosen(stride, 2 * stride + 1, threads) == "grouped"
        assert chosen(3, 5, threads) == "grouped"


@pytest.mark.parametrize(("C", "side", "stride", "last", "pays"), [
    (1, 4, 32, False, True),  # 0.7 of eager's time, where interpolation took 1.15
    (21, 4, 32, False, True),
    (21, 4, 32, True, True),
    (21, 16, 8, False, True),
    (2, 16, 8, True, True),
    (21, 16, 8, True, False),  # more outputs than are copied, and too few a product
    (21, 64, 2, False, False),  # long rows of zeros
    (4, 32, 8, False, False),
])  # fmt: skip
def test_small_maps_of_a_large_stride_are_two_products(C, side, stride, last, pays):
    request = Request(
        "CPU tensor", "", True, (1, C, side, side), C * (side * stride) ** 2, stride, 2 * stride, last, 1, True
    )
    assert (FORMS.choose(request).form.name == "matrices") == pays
    assert FORMS.choose(request._replace(finite=False)).form.name != "matrices"


@pytest.mark.skipif(INTERPRETED, reason="CPU tensors take the kernel")
def test_values_are_looked_at_before_two_products():
    x = torch.randn(1, 2, 4, 4)
    with fastseg.explain() as report:
        bilinear_conv_transpose2d(x, 8)
        bilinear_conv_transpose2d(x, 8, bias=torch.zeros(2))
        x[0, 0, 1, 1] = float("inf")
        assert not bilinear_conv_transpose2d(x, 8).isnan().any()
    assert [d.form == "matrices" for d in report] == [True, True, False]
    assert not bilinear_conv_transpose2d(x, 8).isnan().any()


@LAYOUT
def test_a_bare_call_is_checked(layout, device):
    """The short way of small maps gives the same errors, dtypes and formats as the long one."""
    x = draw((1, 2, 4, 4), layout, device=device).detach()
    with pytest.raises(ValueError, match=r"the output would be \(0, 0\)"):
        bilinear_conv_transpose2d(x, 2, 4, 5)
    with pytest.raises(ValueError, match=r"none of C, H, W being 0"):
        bilinear_conv_transpose2d(x[:, :0], 2)
    y = bilinear_conv_transpose2d(x, 2)
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, bilinear_conv_transpose2d(x, 2, bias=x.new_zeros(2)))
    with fastseg.explain() as report:
        bilinear_conv_transpose2d(x, 2)
    assert len(report.decisions) == 1
    with fastseg.reference():
        torch.testing.assert_close(bilinear_conv_transpose2d(x, 2), y)


def test_infinity_stays_where_it_is():
    """A row at infinity reaches the outputs of its own taps, as one with neighbours at infinity does; none is NaN."""
    x = torch.zeros(1, 2, 4, 5)
    x[0, 0, 1:3] = torch.inf
    for taps in ((8,), (8, 15, 7), (9,), (2,), (32,)):
        y = bilinear_conv_transpose2d(x, *taps)
        assert torch.equal(y == torch.inf, bilinear_conv_transpose2d_ref(x, *taps) == torch.inf)
        assert not y.isnan().any()


def test_more_than_four_taps_take_the_reference(device):
    x = draw((1, 3, 4, 4), device=device)
    with fastseg.explain() as report:
        check_op(bilinear_conv_transpose2d, dense, [x, 2, 7, 2], terms=16)
    assert report.decisions[0].path == "reference"
    assert "more than four taps" in report.decisions[0].why


def test_relation_to_interpolation(device):
    """architectures.md 5.4: even kernels are `interpolate` inside, and darker at the border; 2s - 1 with p = s - 1 is
    align_corners everywhere."""
    x = draw((1, 2, 4, 5), device=device).detach()
    y, z = bilinear_conv_transpose2d(x, 4), upsample_bilinear(x, scale_factor=4)
    torch.testing.assert_close(y[:, :, 2:-2, 2:-2], z[:, :, 2:-2, 2:-2])
    assert (y - z).abs().max() > 0.05
    odd = bilinear_conv_transpose2d(x, 4, 7, 3)
    torch.testing.assert_close(odd, upsample_bilinear(x, size=odd.shape[2:], align_corners=True), atol=2e-6, rtol=1e-5)


def test_bilinear_kernel():
    """The articles' rows; a kernel of 64 taps sums to stride squared; the filler of FCN's surgery.py, written out."""
    assert bilinear_kernel(1, 1, 4)[0, 0, 0].tolist() == [0.0625, 0.1875, 0.1875, 0.0625]
    assert bilinear_kernel(1, 1, 3)[0, 0, 0].tolist() == [0.25, 0.5, 0.25]
    assert bilinear_kernel(1, 1, 64).sum() == 1024
    for K in (1, 2, 3, 4, 5, 16):
        f = (K + 1) // 2
        c = f - 1 if K % 2 else f - 0.5
        line = torch.tensor([1 - abs(i - c) / f for i in range(K)])
        weight = bilinear_kernel(3, 3, K)
        torch.testing.assert_close(weight[1, 1], line[:, None] * line, atol=1e-7, rtol=1e-6)
        assert weight.count_nonzero() == 3 * K * K
    with pytest.raises(IndexError):
        bilinear_kernel(3, 2, 4)
    assert bilinear_kernel(3, 1, 2).shape == (3, 1, 2, 2)
    assert bilinear_kernel(2, 2, 64, dtype=torch.float16).dtype == torch.float16


def test_no_channel_leaks_and_zeros_lie_around(device):
    """A NaN stays in its channel and its outputs, where a dense weight would spread it: 0 * NaN."""
    x = torch.ones(1, 2, 3, 3, device=device)
    x[0, 0, 1, 1] = float("nan")
    y = bilinear_conv_transpose2d(x, 2)
    assert not y[0, 1].isnan().any()
    assert y[0, 0].isnan().sum() == 16
    assert y[0, 1, 0, 0] == 0.75 * 0.75


def test_second_derivatives(device):
    if not INTERPRETED:
        pytest.skip("kernels take fp64 under the interpreter only")
    x, skip, bias = (draw(s, CL, torch.float64) for s in ((1, 2, 2, 1), (1, 2, 5, 3), (2,)))
    op = lambda x, skip, bias: bilinear_conv_transpose2d(x, 2, skip=skip, bias=bias, skip_offset=1)
    assert torch.autograd.gradcheck(op, (x, skip, bias))
    assert torch.autograd.gradgradcheck(lambda x: bilinear_conv_transpose2d(x, 2), x)


def test_forward_mode(device):
    tensors = [draw(s, device=device).detach() for s in ((1, 3, 2, 3), (1, 3, 5, 7), (3,))]
    tangents = [torch.randn_like(t) for t in tensors]
    call = lambda op, x, skip, bias: op(x, 2, skip=skip, bias=bias, skip_offset=1)
    for used in ((0,), (1, 2), (0, 1, 2)):
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(t, d) if i in used else t
                for i, (t, d) in enumerate(zip(tensors, tangents, strict=True))
            ]
            got = forward_ad.unpack_dual(call(bilinear_conv_transpose2d, *duals)).tangent
            want = forward_ad.unpack_dual(call(dense, *duals)).tangent
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_backward_gives_the_same_bits(device):
    x = draw((2, 5, 3, 4), CL, torch.float16, device)
    torch.use_deterministic_algorithms(True)
    dy = torch.randn(2, 5, 12, 16, device=device).half()
    grads = [torch.autograd.grad(bilinear_conv_transpose2d(x, 4), x, dy)[0] for _ in range(3)]
    assert all(torch.equal(g, grads[0]) for g in grads)


@LAYOUT
def test_nothing_outside_the_buffers(layout, device):
    with guarded():
        x, skip = guard(draw((2, 5, 3, 4), layout, device=device)), guard(draw((2, 5, 13, 14), layout, device=device))
        y = bilinear_conv_transpose2d(x, 3, skip=skip, skip_offset=1)
        y.backward(guard(torch.randn_like(y)))
    assert all(t.isfinite().all() for t in (y, x.grad, skip.grad))


def test_empty_batch(device):
    x = torch.randn(0, 3, 4, 5, device=device, requires_grad=True)
    y = bilinear_conv_transpose2d(x, 2)
    assert y.shape == (0, 3, 8, 10)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_autocast(device):
    x, skip = draw((1, 3, 2, 2), device=device), draw((1, 3, 4, 4), device=device)
    with torch.autocast(device, torch.bfloat16):
        y = bilinear_conv_transpose2d(x, 2, skip=skip)
        assert y.dtype == torch.bfloat16
        reference = bilinear_conv_transpose2d_ref(x.bfloat16(), 2, skip=skip.bfloat16())
    torch.testing.assert_close(y, reference, atol=2e-2, rtol=2e-2)
    y.float().sum().backward()
    assert x.grad.dtype == skip.grad.dtype == torch.float32


X = torch.zeros(1, 3, 4, 4)
INVALID = [
    (ValueError, "must be \\(N, C, H, W\\)", (X[0], 2), {}),
    (ValueError, "none of C, H, W", (X[:, :0], 2), {}),
    (TypeError, "floating-point", (X.long(), 2), {}),
    (ValueError, "stride is 0", (X, 0), {}),
    (ValueError, "kernel_size is 0", (X, 2, 0, 0), {}),
    (ValueError, "padding is -1", (X, 2, 4, -1), {}),
    (ValueError, "no padding makes", (X, 2, 3), {}),
    (ValueError, "output would be", (X, 2, 4, 6), {}),
    (ValueError, "output would be", (X, 2), {"output_size": (0, 4)}),
    (ValueError, "bias is \\(2,\\)", (X, 2), {"bias": torch.zeros(2)}),
    (ValueError, "skip is", (X, 2), {"skip": torch.zeros(1, 3, 8, 7)}),
    (ValueError, "from 1 on", (X, 2), {"skip": torch.zeros(1, 3, 8, 8), "skip_offset": 1}),
    (ValueError, "skip is", (X, 2), {"skip": torch.zeros(1, 2, 8, 8)}),
    (TypeError, "they should be the same", (X, 2), {"skip": torch.zeros(1, 3, 8, 8).half()}),
    (ValueError, "tensors on", (X, 2), {"bias": torch.zeros(3, device="meta")}),
]


@pytest.mark.parametrize(("error", "text", "args", "kwargs"), INVALID, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(error, text, args, kwargs):
    with pytest.raises(error, match=text):
        bilinear_conv_transpose2d(*args, **kwargs)


@pytest.mark.parametrize(("S", "K", "P", "size"), [(4, 4, 1, (34, 31)), (2, 3, 0, None), (3, 4, 1, (12, 9))], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
def test_nan_stays_where_the_taps_are(S, K, P, size, last, device):
    """Outputs that a pixel does not reach are as they are without it, forward and backward; the others are NaN."""
    x = torch.randn(1, 2, 4, 3, device=device)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    bad = x.clone()
    bad[0, 1, 2, 1] = float("nan")
    options = {"output_size": size}
    got, clean = (bilinear_conv_transpose2d(t, S, K, P, **options) for t in (bad, x))
    reached = bilinear_conv_transpose2d(bad.isnan().to(x.dtype), S, K, P, **options) > 0
    assert torch.equal(got.isnan(), reached)
    assert torch.equal(got[~reached], clean[~reached])
    with fastseg.reference():
        assert (~bilinear_conv_transpose2d(bad, S, K, P, **options).isfinite())[reached].all()
    leaf = x.clone().requires_grad_()
    y = bilinear_conv_transpose2d(leaf, S, K, P, **options)
    dy = torch.zeros_like(y)
    dy[0, 0, 5, 4] = float("nan")
    dx = torch.autograd.grad(y, leaf, dy)[0]
    taps = torch.autograd.grad(bilinear_conv_transpose2d(leaf, S, K, P, **options), leaf, dy.isnan().to(dy.dtype))[0]
    assert torch.equal(dx.isnan(), taps > 0)
