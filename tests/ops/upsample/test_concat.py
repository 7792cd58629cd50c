"""Interpolation beside skip maps, against ``interpolate`` and ``cat``."""

import pytest
import torch
from torch.autograd import forward_ad

import fastseg
from fastseg.ops import upsample_concat
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.upsample_concat import upsample_concat_ref
from fastseg.testing import check_op, guard, guarded

CL, NCHW = torch.channels_last, torch.contiguous_format
LAYOUT = pytest.mark.parametrize("layout", [NCHW, CL], ids=["nchw", "nhwc"])

# Shapes of x and of the skips. Vectors of channels; single elements beside a map of an odd width; smaller than x; one
# pixel, and one image; an empty batch.
SHAPES = [
    ((2, 8, 3, 4), [(2, 16, 6, 8)]),
    ((2, 3, 3, 5), [(2, 2, 7, 11), (2, 1, 7, 11)]),
    ((1, 4, 6, 5), [(1, 4, 3, 2)]),
    ((3, 2, 1, 1), [(3, 1, 1, 1), (3, 2, 1, 1)]),
    ((0, 4, 2, 2), [(0, 4, 4, 4)]),
]


def draw(shape, layout=NCHW, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, dtype=torch.float64).to(device, dtype).to(memory_format=layout).requires_grad_()


def with_options(op, **options):
    return lambda x, *skips: op(x, skips, **options)


@LAYOUT
@pytest.mark.parametrize("up_first", [False, True], ids=["skips first", "up first"])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_matches_reference(shapes, up_first, layout, device):
    maps = [draw(shape, layout, device=device) for shape in (shapes[0], *shapes[1])]
    options = {"align_corners": up_first, "up_first": up_first}
    check_op(with_options(upsample_concat, **options), with_options(upsample_concat_ref, **options), maps, terms=9)
    y = upsample_concat(maps[0], maps[1:], **options)
    assert y.numel() == 0 or y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half(dtype, device):
    maps = [draw(shape, CL, dtype, device) for shape in ((2, 8, 3, 4), (2, 8, 6, 8))]
    check_op(with_options(upsample_concat), with_options(upsample_concat_ref), maps, terms=9)
    assert upsample_concat(maps[0], [maps[1].float()]).dtype == torch.float32


@LAYOUT
def test_windows_and_other_layouts(layout, device):
    """A skip cropped as the valid U-Net crops, and one in the other layout."""
    x, whole = draw((2, 4, 3, 4), layout, device=device), draw((2, 4, 10, 12), layout, device=device)
    other = draw((2, 3, 6, 8), CL if layout == NCHW else NCHW, device=device)
    op = lambda f: lambda x, whole, other: f(x, [whole[:, :, 2:-2, 2:-2], other])
    check_op(op(upsample_concat), op(upsample_concat_ref), [x, whole, other], terms=9)


@LAYOUT
def test_derivatives(layout):
    """Of second order and forward mode, the gradient of a part of the inputs, tangents of a part."""
    dtype = torch.float64 if INTERPRETED else torch.float32
    x, skip = draw((1, 2, 2, 3), layout, dtype), draw((1, 3, 4, 5), layout, dtype)
    op = lambda x, skip: upsample_concat(x, [skip])
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(op, (x, skip), check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda x, skip: op(x, skip).pow(2), (x, skip), fast_mode=True)
    (only,) = torch.autograd.grad(op(x, skip.detach()).sum(), x)
    torch.testing.assert_close(only, torch.autograd.grad(upsample_concat_ref(x, [skip]).sum(), x)[0])
    (only,) = torch.autograd.grad(op(x.detach(), skip).sum(), skip)
    assert (only == 1).all()
    with forward_ad.dual_level():
        y = op(forward_ad.make_dual(x.detach(), torch.ones_like(x)), skip.detach())
        tangent = forward_ad.unpack_dual(y).tangent
    assert (tangent[:, :3] == 0).all()
    torch.testing.assert_close(tangent[:, 3:], torch.ones_like(tangent[:, 3:]))


@LAYOUT
@pytest.mark.parametrize("C", [3, 8])
def test_every_byte_once(C, layout):
    """The floor: x and the skips read, the result written; of its gradient the channels of x read where they lie."""
    if not INTERPRETED:
        pytest.skip("traffic is counted under the interpreter")
    from traffic import count_traffic

    from fastseg.kernels.runtime import config

    x, skip = draw((2, C, 3, 4), layout), draw((2, C, 6, 8), layout)
    with config.override("bilinear_fwd", ROWS=8), config.override("bilinear_bwd", ROWS=8), count_traffic() as traffic:
        y = upsample_concat(x, [skip])
        y.backward(torch.randn(y.shape).contiguous(memory_format=layout))
    (_, forward), (_, backward) = traffic.launches
    assert (forward.read_bytes, forward.written_bytes) == (4 * x.numel(), 4 * skip.numel())
    assert (backward.read_bytes, backward.written_bytes) == (4 * skip.numel(), 4 * x.numel())


def test_stays_inside_its_buffers(device):
    for layout in (NCHW, CL):
        with guarded():
            x, skip = (guard(draw(shape, layout, device=device).detach()) for shape in ((2, 3, 3, 5), (2, 2, 7, 11)))
            y = upsample_concat(x, [skip], up_first=True)
        torch.testing.assert_close(y, upsample_concat_ref(x, [skip], up_first=True))


def test_path_is_recorded():
    x, skip = torch.randn(1, 2, 2, 2), torch.randn(1, 2, 4, 4)
    with fastseg.explain() as report:
        upsample_concat(x, [skip])
        with fastseg.reference():
            upsample_concat(x, [skip])
    assert [d.path for d in report] == ["triton" if INTERPRETED else "reference", "reference"]


def test_bad_arguments():
    x, skip = torch.randn(2, 2, 2, 2), torch.randn(2, 3, 4, 4)
    for message, args in {
        "no skip": (x, []),
        r"x is \(2, 2, 2\)": (x[0], [skip]),
        r"skips\[1\] is \(2, 3, 4, 0\)": (x, [skip, skip[..., :0]]),
        r"skips\[0\] is \(1, 3, 4, 4\); it must have the batch of x, 2": (x, [skip[:1]]),
        r"skips\[1\] is \(2, 3, 4, 3\).*the size of the first skip, \(4, 4\)": (x, [skip, skip[..., :3]]),
    }.items():
        with pytest.raises(ValueError, match=message):
            upsample_concat(*args)
    with pytest.raises(TypeError, match=r"skips\[0\] is torch\.int64"):
        upsample_concat(x, [skip.long()])
