"""Bilinear interpolation: torch's numbers for every way to say the size, both layouts, and derivatives of any order."""

import pytest
import torch
from samples import op_info, samples
from torch.autograd import forward_ad
from torch.nn import functional as F

import fastseg
from fastseg.ops import upsample_bilinear
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.upsample_bilinear import upsample_bilinear_ref
from fastseg.testing import check_op, guard, guarded

if INTERPRETED:
    from fastseg.kernels.runtime import config

CL, NCHW = torch.channels_last, torch.contiguous_format
AC = pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])
LAYOUT = pytest.mark.parametrize("layout", [NCHW, CL], ids=["nchw", "nhwc"])

# (N, C, H, W) and how the output is asked for. Channels: 3 and 5 are runs of elements in NHWC, 8 and 16 are vectors.
CASES = [
    ((2, 3, 5, 7), {"scale_factor": 2}),  # the usual factors
    ((2, 8, 4, 3), {"scale_factor": 4}),
    ((1, 5, 3, 4), {"scale_factor": (8, 2)}),  # different in H and W; 16 outputs an input along H
    ((2, 16, 7, 5), {"size": (11, 13)}),  # primes: no common factor
    ((2, 3, 9, 8), {"size": (4, 3)}),  # smaller: inputs between outputs get no gradient
    ((2, 8, 6, 5), {"size": (9, 2)}),  # larger in H, smaller in W
    ((1, 3, 4, 6), {"scale_factor": (1.3, 5.1)}),  # the factor is honoured: positions are not those of the sizes
    ((2, 8, 5, 7), {"scale_factor": 0.5}),
    ((2, 3, 1, 1), {"size": (3, 4)}),  # from one pixel
    ((2, 3, 1, 5), {"size": 7}),  # from one row
    ((1, 8, 5, 4), {"size": 1}),  # to one pixel
    ((2, 5, 4, 6), {"size": (4, 6)}),  # to itself
    ((1, 3, 5, 4), {"scale_factor": (1.1, 1.6)}),  # a factor that leaves 5 rows 5: they are not moved
]


@pytest.fixture(autouse=True)
def _strips(request):
    """Strips of 4 rows, as large maps get them: tiny ones get one row, which `test_one_row_a_strip` wants."""
    if not INTERPRETED or "one_row_a_strip" in request.node.name:
        yield
        return
    with config.override("bilinear_fwd", ROWS=4), config.override("bilinear_bwd", ROWS=4):
        yield


def draw(shape, layout=NCHW, dtype=torch.float32, device="cpu"):
    x = torch.randn(shape, dtype=torch.float64).to(dtype).to(device, memory_format=layout)
    return x.requires_grad_()


# Both layouts for the first three, then in turn: what a size does to one axis does not depend on the layout.
ROWS = [(*case, layout) for n, case in enumerate(CASES) for layout in (NCHW, CL) if n < 3 or n % 2 == (layout == CL)]


@AC
@pytest.mark.parametrize(("shape", "kwargs", "layout"), ROWS, ids=str)
def test_matches_torch(shape, kwargs, layout, align_corners, device):
    x = draw(shape, layout, torch.float64 if INTERPRETED else torch.float32, device)
    check_op(upsample_bilinear, upsample_bilinear_ref, [x], align_corners=align_corners, **kwargs)
    assert upsample_bilinear(x, align_corners=align_corners, **kwargs).stride() == (
        F.interpolate(x, mode="bilinear", align_corners=align_corners, **kwargs).stride()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("C", "layout", "align_corners"),
    [(3, NCHW, False), (3, CL, True), (8, CL, False)],
    ids=["nchw", "elements", "vectors"],
)
def test_dtypes(C, dtype, layout, align_corners, device):
    """Positions are fp32 also for half types, as torch's; the reference's are fp64: a few roundings of position 7."""
    x = draw((2, C, 5, 7), layout, dtype, device)
    check_op(upsample_bilinear, upsample_bilinear_ref, [x], size=(8, 15), align_corners=align_corners, terms=9)


def test_more_than_one_block(device):
    """Tiles cut at both ends: 2 rows a strip, 16 columns and 16 channels a block."""
    if INTERPRETED:
        tile = {"ROWS": 2, "BLOCK_W": 16, "BLOCK_C": 16}
        with config.override("bilinear_fwd", **tile), config.override("bilinear_bwd", ROWS=2, BLOCK_W=8, BLOCK_C=16):
            for C, layout in ((24, CL), (5, CL), (9, NCHW)):
                x = draw((2, C, 5, 11), layout, device=device)
                check_op(upsample_bilinear, upsample_bilinear_ref, [x], size=(9, 21), terms=9)
    else:
        check_op(upsample_bilinear, upsample_bilinear_ref, [draw((2, 304, 67, 131), CL, device=device)], scale_factor=2)


@LAYOUT
def test_one_row_a_strip(layout, device):
    check_op(
        upsample_bilinear, upsample_bilinear_ref, [draw((1, 3, 3, 4), layout, device=device)], size=(7, 5), terms=9
    )


def test_a_given_factor_is_not_computed_from_the_sizes(device):
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], device=device)
    given = upsample_bilinear(x, scale_factor=1.7)
    recomputed = upsample_bilinear(x, scale_factor=1.7, recompute_scale_factor=True)
    assert (given - recomputed).abs().max() > 0.3
    for recompute, got in ((None, given), (True, recomputed)):
        want = F.interpolate(x, scale_factor=1.7, mode="bilinear", recompute_scale_factor=recompute)
        torch.testing.assert_close(got, want)


def test_printed_examples(device):
    """torch's documentation of Upsample: 2x2 with both align_corners, and 3x3 that begins with the same 2x2."""
    x = torch.arange(1.0, 5, device=device).view(1, 1, 2, 2)
    centres = [[1, 1.25, 1.75, 2], [1.5, 1.75, 2.25, 2.5], [2.5, 2.75, 3.25, 3.5], [3, 3.25, 3.75, 4]]
    assert upsample_bilinear(x, scale_factor=2)[0, 0].tolist() == centres
    corners = torch.tensor(
        [[1, 4 / 3, 5 / 3, 2], [5 / 3, 2, 7 / 3, 8 / 3], [7 / 3, 8 / 3, 3, 10 / 3], [3, 10 / 3, 11 / 3, 4]]
    )
    torch.testing.assert_close(upsample_bilinear(x, scale_factor=2, align_corners=True)[0, 0].cpu(), corners)
    padded = F.pad(x, (0, 1, 0, 1))
    got = upsample_bilinear(padded, scale_factor=2)[0, 0].tolist()
    assert got[0] == [1, 1.25, 1.75, 1.5, 0.5, 0]
    assert got[2] == [2.5, 2.75, 3.25, 2.625, 0.875, 0]
    assert got[4] == [0.75, 0.8125, 0.9375, 0.75, 0.25, 0]
    got = upsample_bilinear(padded, scale_factor=2, align_corners=True)[0, 0].cpu()
    torch.testing.assert_close(got[0], torch.tensor([1, 1.4, 1.8, 1.6, 0.8, 0]))
    torch.testing.assert_close(got[1], torch.tensor([1.8, 2.2, 2.6, 2.24, 1.12, 0]))
    torch.testing.assert_close(got[4], torch.tensor([1.2, 1.36, 1.52, 1.28, 0.64, 0]))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_zero_times_infinity(device):
    """All four taps are multiplied: where torch has a NaN there is one, and where torch is finite and far from one."""
    inf, nan = float("inf"), float("nan")
    for values, kwargs in (
        ([1.0, inf], {"scale_factor": (1, 2)}),
        ([1.0, inf], {"size": (1, 5), "align_corners": True}),
        ([1.0, inf], {"scale_factor": 1}),
        ([1.0, nan, 3.0, 4.0], {"scale_factor": (1, 2)}),
        ([1.0, nan, 3.0, 4.0], {"size": (1, 4), "align_corners": True}),
    ):
        x = torch.tensor(values, device=device).view(1, 1, 1, -1)
        got, want = upsample_bilinear(x, **kwargs).cpu(), F.interpolate(x.cpu(), mode="bilinear", **kwargs)
        assert got.isnan()[want.isnan()].all()
        torch.testing.assert_close(got[~got.isnan()], want[~got.isnan()])
        assert got.isnan().sum() <= want.isnan().sum() + 1


@LAYOUT
def test_strange_strides(layout, device):
    """Slices, a storage offset, transposed sides, an expanded input and gradient: what torch makes of them."""
    base = draw((3, 6, 5, 7), layout, device=device).detach()
    for x in (base[1:, 1:4], base[:, :, 1:, ::2], base.transpose(2, 3), base[:1, :1].expand(2, 3, 5, 7)):
        y = upsample_bilinear(x, size=(7, 9))
        want = F.interpolate(x, size=(7, 9), mode="bilinear")
        torch.testing.assert_close(y, want, atol=2e-6, rtol=1e-6)
        assert y.stride() == want.stride()
    for dy in (
        lambda y: torch.ones_like(y[:1, :1, :1, :1]).expand_as(y),
        lambda y: y.detach().transpose(2, 3).contiguous().transpose(2, 3),
    ):
        grads = []
        for op in (upsample_bilinear, upsample_bilinear_ref):
            x = base.clone().requires_grad_()
            y = op(x, size=(7, 9))
            grads += torch.autograd.grad(y, x, dy(y))
        torch.testing.assert_close(*grads, atol=5e-6, rtol=1e-6)


def test_one_pixel_stays_channels_last(device):
    """The image-pooling branch of an ASPP in a channels_last net."""
    x = torch.randn(2, 6, 1, 1, device=device).to(memory_format=CL)
    assert upsample_bilinear(x, size=(3, 4)).is_contiguous(memory_format=CL)
    assert upsample_bilinear(x.contiguous(), size=(3, 4)).stride() == F.interpolate(x.contiguous(), (3, 4)).stride()


@AC
def test_empty_batch(align_corners, device):
    x = torch.randn(0, 3, 4, 5, device=device, requires_grad=True)
    y = upsample_bilinear(x, scale_factor=2, align_corners=align_corners)
    assert y.shape == (0, 3, 8, 10)
    y.sum().backward()
    assert x.grad.shape == x.shape


INVALID = [
    (torch.zeros(1, 2, 3, 3), {}),
    (torch.zeros(1, 2, 3, 3), {"size": 4, "scale_factor": 2}),
    (torch.zeros(1, 2, 3, 3), {"size": (4, 4, 4)}),
    (torch.zeros(1, 2, 3, 3), {"size": 0}),
    (torch.zeros(1, 2, 3, 3), {"scale_factor": -1.0}),
    (torch.zeros(1, 2, 3, 3), {"size": 4, "recompute_scale_factor": True}),
    (torch.zeros(1, 0, 3, 3), {"size": 4}),
    (torch.zeros(2, 3, 3), {"size": 4}),
    (torch.zeros(1, 2, 3, 3, dtype=torch.int32), {"size": 4}),
]


@pytest.mark.parametrize(("x", "kwargs"), INVALID, ids=str)
def test_errors_are_torchs(x, kwargs):
    with pytest.raises(Exception) as want:
        F.interpolate(x, mode="bilinear", **kwargs)
    with pytest.raises(type(want.value)) as got:
        upsample_bilinear(x, **kwargs)
    assert str(got.value) == str(want.value)


def test_a_factor_without_end_is_refused():
    with pytest.raises(
        ValueError, match=r"scale_factor is \(2.0, inf\); it must be finite"
    ):  # torch: an int64 overflow
        upsample_bilinear(torch.zeros(1, 2, 3, 3), scale_factor=(2.0, float("inf")))


def test_uint8_goes_to_torch():
    x = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    assert upsample_bilinear(x, scale_factor=(1, 2)).flatten().tolist() == [0, 64, 191, 255]


@pytest.mark.parametrize(("layout", "align_corners"), [(NCHW, False), (CL, True)], ids=["centres", "corners"])
def test_second_derivatives(layout, align_corners, device):
    if not INTERPRETED:
        pytest.skip("kernels take fp64 under the interpreter only")
    x = draw((1, 2, 2, 2), layout, torch.float64)
    op = lambda x: upsample_bilinear(x, size=(3, 2), align_corners=align_corners)
    assert torch.autograd.gradcheck(op, x)
    assert torch.autograd.gradgradcheck(op, x)


def test_penalty_on_a_gradient(device):
    """A second derivative that is not 0: through the gradient of a nonlinear loss."""
    grads = []
    for op in (upsample_bilinear, upsample_bilinear_ref):
        torch.manual_seed(1)
        x = draw((2, 3, 3, 4), CL, device=device)
        (dx,) = torch.autograd.grad(op(x, scale_factor=2).pow(3).sum(), x, create_graph=True)
        grads += torch.autograd.grad(dx.pow(2).sum(), x)
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-5)


def test_forward_mode(device):
    x, tangent = (torch.randn(1, 3, 3, 4, device=device) for _ in range(2))
    for grad in (False, True):
        with forward_ad.dual_level():
            y = upsample_bilinear(forward_ad.make_dual(x.requires_grad_(grad), tangent), scale_factor=2)
            got = forward_ad.unpack_dual(y).tangent
        torch.testing.assert_close(got, F.interpolate(tangent, scale_factor=2, mode="bilinear"))


def test_backward_gives_the_same_bits_and_no_alert(device):
    x = draw((2, 5, 6, 7), CL, torch.float16, device)
    torch.use_deterministic_algorithms(True)  # an alert would raise; the poison fixture puts it back
    first = None
    for _ in range(3):
        y = upsample_bilinear(x, size=(13, 11))
        (dx,) = torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel(), device=device).half().view_as(y))
        first = dx if first is None else first
        assert torch.equal(dx, first)


@LAYOUT
def test_nothing_outside_the_buffers(layout, device):
    with guarded():
        x = guard(draw((2, 5, 3, 5), layout, device=device))
        y = upsample_bilinear(x, size=(7, 8))
        y.backward(guard(torch.randn_like(y)))
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


def test_autocast_on_a_cpu_follows_the_input(device):
    x = torch.randn(1, 3, 3, 4, device=device, dtype=torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        assert upsample_bilinear(x, scale_factor=2).dtype == F.interpolate(x, scale_factor=2, mode="bilinear").dtype


def test_large_sizes_take_the_reference(device):
    x = torch.empty(1, 1, 1, 2**22 + 1, device=device).expand(1, 1, 1, -1)
    with fastseg.explain() as report:
        upsample_bilinear(x, size=(1, 2))
    assert report.decisions[0].path == "reference"
    assert "pixels" in report.decisions[0].why


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "variant"),
    [("interpolate", "bilinear"), ("upsample_bilinear", "")],
    ids=["interpolate", "upsample_bilinear"],
)
def test_torch_samples(name, variant, dtype, device):
    if dtype == torch.float64 and not INTERPRETED:
        pytest.skip("kernels take fp64 under the interpreter only")
    op, found = op_info(name, variant), samples(name, variant, dtype=dtype, requires_grad=True)
    assert found
    close = {"atol": 2e-2, "rtol": 2e-3} if dtype == torch.float16 else {}
    for n, sample in enumerate(found):
        s = sample.noncontiguous() if n % 2 else sample
        kwargs = {key: value for key, value in s.kwargs.items() if key != "mode"}
        kwargs["align_corners"] = bool(kwargs.get("align_corners", variant == ""))  # F.upsample_bilinear's is True
        x = s.input.detach().to(device).requires_grad_()
        got, want = upsample_bilinear(x, *s.args, **kwargs), op(s.input, *s.args, **s.kwargs)
        torch.testing.assert_close(got.cpu(), want, **close)
        dy = torch.randn_like(want)
        (dx,), (want_dx,) = torch.autograd.grad(got, x, dy.to(device)), torch.autograd.grad(want, s.input, dy)
        torch.testing.assert_close(dx.cpu(), want_dx, **close)


@pytest.mark.parametrize("kwargs", [{"size": (4, 9)}, {"size": (7, 3)}, {"size": (4, 3)},
                                    {"scale_factor": (1.1, 2.1), "recompute_scale_factor": False}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("align_corners", [False, True])
def test_nan_on_an_axis_that_keeps_its_size(align_corners, kwargs, device):
    """It is copied, as torch copies it: the next row's or column's NaN has weight 0 and does not come in."""
    x = torch.randn(1, 2, 4, 3, device=device)
    x[0, 1, 2, 1] = float("nan")
    x.requires_grad_()
    got, want = upsample_bilinear(x, align_corners=align_corners, **kwargs), F.interpolate(
        x, mode="bilinear", align_corners=align_corners, **kwargs)  # fmt: skip
    assert torch.equal(got.isnan(), want.isnan())
    dy = torch.randn_like(want)
    dy[0, 0, 1, 1] = float("nan")
    ours, theirs = (torch.autograd.grad(y, x, dy)[0] for y in (got, want))
    assert not (ours.isnan() & ~theirs.isnan()).any() and ours.isnan().any()
