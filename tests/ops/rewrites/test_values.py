"""Less arithmetic for the same answer: each rewrite against torch's own lines, values and gradients, in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastseg
from fastseg import ops
from fastseg.ops import resize_concat_conv
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.nearest_conv import upsample_nearest_conv2d_ref
from fastseg.ops.resize_concat_conv import resize_concat_conv2d_ref
from fastseg.ops.upsample_sum import upsample_sum_ref

TOLERANCE = 1e-13


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def same(got, want, tensors: list[Tensor], tolerance: float = TOLERANCE) -> None:
    """Values without gradients, values with them, and gradients, relative to the largest."""
    for grad in (False, True):
        inputs = [t.detach().clone().requires_grad_(grad) for t in tensors]
        with torch.set_grad_enabled(grad):
            a, b = got(*inputs), want(*inputs)
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()
        if grad:
            dy = torch.randn_like(b)
            pairs = zip(torch.autograd.grad(a, inputs, dy), torch.autograd.grad(b, inputs, dy), strict=True)
            assert all((p - q).abs().max() <= tolerance * q.abs().max() for p, q in pairs)


SIZES = [(2, 3), (4, 5), (1, 1), (6, 7)]
plain_cpu = pytest.mark.skipif(INTERPRETED, reason="of the form for a CPU")


@pytest.mark.parametrize(
    ("kernel", "mode", "corners", "form"),
    [
        *itertools.product((1, 3), ("bilinear",), (False, True), (None, "small", "resized")),
        (1, "nearest", False, None),
        (3, "nearest", False, None),
    ],
)
def test_convolution_of_resized_maps(kernel, mode, corners, form):
    maps = [draw(1, 1 + i, *size) for i, size in enumerate(SIZES)]
    weight, bias = draw(3, sum(m.shape[1] for m in maps), kernel, kernel), draw(3)
    options = {"size": (4, 5), "mode": mode, "align_corners": corners, "act": "leaky_relu"}
    same(
        lambda *t: ops.resize_concat_conv2d(t[:4], t[4], t[5], form=form, **options),
        lambda *t: resize_concat_conv2d_ref(t[:4], t[4], t[5], **options),
        [*maps, weight, bias],
    )


@plain_cpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("few", [(0, 1), (0, 3)])
def test_maps_of_few_pixels_are_added_as_one_product(few, layout, monkeypatch):
    ran = []
    add = resize_concat_conv.add_few_pixels
    monkeypatch.setattr(
        resize_concat_conv, "add_few_pixels", lambda base, maps, *a: ran.append(maps) or add(base, maps, *a)
    )
    sizes = [(1, 1) if i == few[0] else (3, 2) if i == few[1] else (7, 8) for i in range(4)]
    maps = [draw(2, 3 + i, *size).contiguous(memory_format=layout) for i, size in enumerate([*sizes, (60, 48)])]
    weight, bias = draw(6, sum(m.shape[1] for m in maps), 1, 1), draw(6)
    before = [m.clone() for m in maps]
    options = {"size": (60, 48), "align_corners": True, "act": "relu"}
    with torch.no_grad():
        got = ops.resize_concat_conv2d(maps, weight, bias, **options)
        torch.testing.assert_close(got, resize_concat_conv2d_ref(maps, weight, bias, **options), rtol=1e-13, atol=1e-13)
    assert got.is_contiguous(memory_format=layout)
    assert [tuple(m.shape[2:]) for m in ran[0]] == [(1, 1), (3, 2)]
    assert all(map(torch.equal, maps, before))
    maps[few[1]][0, 0, 0, 0] = torch.nan
    got = ops.resize_concat_conv2d(maps, weight, bias, **options)
    assert torch.equal(got.isnan(), resize_concat_conv2d_ref(maps, weight, bias, **options).isnan())
    assert len(ran[1]) == 1  # a product would spread the NaN over the image


@pytest.mark.parametrize("kernel", [1, 3])
def test_no_map_has_the_size_and_there_is_no_bias(kernel):
    maps, weight = [draw(1, 3, 2, 3), draw(1, 2, 1, 2)], draw(4, 5, kernel, kernel)
    same(
        lambda *t: ops.resize_concat_conv2d(t[:2], t[2], size=(5, 8), form="small"),
        lambda *t: resize_concat_conv2d_ref(t[:2], t[2], size=(5, 8)),
        [*maps, weight],
    )


@plain_cpu
def test_small_maps_take_fewer_products():
    """Of a 3x3 over levels at ratios 1, 2, 4 and 8, each of the same width: 9 * (1 + 1/4 + 1/16 + 1/64) of 9 * 4."""
    from fastseg.measure.counting import products_and_bytes

    maps = [torch.randn(1, 64, 32 >> i, 32 >> i) for i in range(4)]
    weight = torch.randn(64, 256, 3, 3)
    run = lambda form: products_and_bytes(lambda: ops.resize_concat_conv2d(maps, weight, size=(32, 32), form=form))[0]
    plain = 9 * 32 * 32 * 256 * 64
    assert run("resized") == plain
    taps = plain * (1 + 1 / 4 + 1 / 16 + 1 / 64) / 4
    assert taps <= run("small") < 1.25 * taps  # what lies above is the interpolation, as matrix products


@plain_cpu
def test_a_small_map_that_is_not_finite_stays_where_it_is():
    """A GEMM over a strip would spread it."""
    deep, weight = torch.zeros(1, 64, 4, 4), torch.ones(64, 64, 3, 3)
    deep[0, 0, 0, 0] = torch.inf
    got = ops.resize_concat_conv2d([deep], weight, size=(32, 32))
    want = resize_concat_conv2d_ref([deep], weight, size=(32, 32))
    assert torch.equal(got.isfinite(), want.isfinite()) and got.isfinite().any()


@pytest.mark.parametrize("form", [None, "transposed", "phases", "upsampled"])
@pytest.mark.parametrize(("size", "skip", "up_first"), [((3, 5), 2, True), ((1, 1), 3, False), ((4, 2), 0, True)])
def test_nearest_doubling_before_a_3x3(form, size, skip, up_first):
    x, big = draw(2, 3, *size), [2 * n for n in size]
    more = [draw(2, skip, *big)] if skip else []
    tensors = [x, *more, draw(4, 3 + skip, 3, 3), draw(4)]
    call = lambda op, **k: lambda x, *t: op(x, t[0] if skip else None, *t[-2:], act="relu", up_first=up_first, **k)
    same(call(ops.upsample_nearest_conv2d, form=form), call(upsample_nearest_conv2d_ref), tensors)


@pytest.mark.parametrize("size", [(7, 10), (6, 11), (3, 5), (9, 15)])
def test_what_does_not_double_is_interpolated(size):
    x, weight = draw(1, 2, 3, 5), draw(4, 2, 3, 3)
    same(
        lambda x, w: ops.upsample_nearest_conv2d(x, None, w, size=size),
        lambda x, w: upsample_nearest_conv2d_ref(x, None, w, size=size),
        [x, weight],
    )
    with fastseg.explain() as report:
        ops.upsample_nearest_conv2d(x, None, weight, size=size)
    assert "no doubling" in report.decisions[0].why
    with pytest.raises(ValueError, match="no doubling"):
        ops.upsample_nearest_conv2d(x, None, weight, size=size, form="transposed")


def test_doubling_takes_4_products_in_place_of_9():
    from fastseg.measure.counting import products_and_bytes

    x, weight = torch.randn(1, 8, 4, 4), torch.randn(16, 8, 3, 3)
    count = lambda form: products_and_bytes(lambda: ops.upsample_nearest_conv2d(x, None, weight, form=form))[0]
    assert count("upsampled") == 9 * 8 * 16 * 64
    assert count("transposed") == 16 * 8 * 16 * 16 == 4 * 8 * 16 * 64
    assert count("phases") == 16 * 8 * 16 * 25  # of the border too


def test_of_a_few_pixels_the_filters_are_not_summed():
    weight = torch.randn(4, 4, 3, 3)
    forms = []
    for size in (8, 24):
        with fastseg.explain() as report:
            ops.upsample_nearest_conv2d(torch.randn(1, 4, size, size), None, weight)
        forms.append(report.decisions[0].form)
    assert forms == ["upsampled", "transposed"]
    conv = torch.nn.Conv2d(4, 4, 3)
    with torch.no_grad(), fastseg.frozen(conv), fastseg.explain() as report:
        ops.upsample_nearest_conv2d(torch.randn(1, 4, 16, 16), None, conv.weight)
    assert report.decisions[0].form == "transposed"


def test_filters_are_summed_in_fp32_under_autocast():
    """256 + 1 in bf16 is 256: summed there, the taps of a 1 beside a 256 would be lost."""
    x = torch.ones(1, 1, 4, 4)
    weight = torch.tensor([[[[0.0, 0.0, 0.0], [0.0, 257.0, -256.0], [0.0, 0.0, 0.0]]]], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.upsample_nearest_conv2d(x, None, weight, form="transposed")
    assert y.dtype == torch.bfloat16
    assert float(y[0, 0, 2, 2].detach()) == 1.0  # even columns sum 257 and -256 on one pixel
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.abs().min() > 0


def test_two_matrices_are_one():
    outer, inner = draw(4, 6, 1, 1), draw(6, 3)
    b, c, x = draw(6), draw(4), draw(2, 3, 5, 4)

    def composed(x, outer, inner, b, c):
        return F.conv2d(x, *ops.compose_pointwise(outer, inner, b, c))

    def both(x, outer, inner, b, c):
        return F.conv2d(F.conv2d(x, inner[:, :, None, None], b), outer, c)

    same(composed, both, [x, outer, inner, b, c])
    with torch.autocast("cpu", torch.bfloat16):
        weight, bias = ops.compose_pointwise(outer.float(), inner.float())
    assert weight.dtype == torch.float32 and bias is None
    assert torch.allclose(weight.flatten(1), (outer.flatten(1) @ inner).float(), atol=1e-6)


@pytest.mark.parametrize("corners", [False, True])
def test_sum_of_upsampled_maps(corners):
    tensors = [draw(2, 3, 7, 8), draw(2, 3, 3, 4), draw(2, 3, 1, 1), draw(2, 3, 9, 5), draw(3)]
    options = {"act": "relu", "align_corners": corners}
    same(
        lambda *t: ops.upsample_sum(t[0], t[1:4], t[4], **options),
        lambda *t: upsample_sum_ref(t[0], t[1:4], t[4], **options),
        tensors,
    )
    base = tensors[0].clone()
    assert torch.equal(ops.upsample_sum(base, [], act="relu"), base.relu()) and torch.equal(base, tensors[0])


W3, W1 = torch.ones(2, 5, 3, 3), torch.ones(2, 5, 1, 1)
X, SKIP = torch.ones(1, 3, 2, 2), torch.ones(1, 2, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ops.resize_concat_conv2d([], W1, size=(4, 4)), ValueError, "no map"),
        (lambda: ops.resize_concat_conv2d([X, SKIP[0]], W1, size=(4, 4)), ValueError, r"maps\[1\] is \(2, 4, 4\)"),
        (lambda: ops.resize_concat_conv2d([X, SKIP], torch.ones(2, 5, 5, 5), size=(4, 4)), ValueError, "weight is"),
        (lambda: ops.resize_concat_conv2d([X, SKIP], W1, torch.ones(3), size=(4, 4)), ValueError, r"must be \(2,\)"),
        (lambda: ops.resize_concat_conv2d([X, SKIP], W1, size=(4, 4), mode="area"), ValueError, "'area'"),
        (lambda: ops.resize_concat_conv2d([X.long(), SKIP], W1, size=(4, 4)), TypeError, "int64"),
        (
            lambda: ops.resize_concat_conv2d([X, SKIP], W3, size=(4, 4), mode="nearest", form="small"),
            ValueError,
            "near",
        ),
        (lambda: ops.resize_concat_conv2d([X, SKIP], W1, size=(4, 4), act="gelu"), ValueError, "'gelu'"),
        (lambda: ops.upsample_nearest_conv2d(X, SKIP, W1), ValueError, "weight is"),
        (lambda: ops.upsample_nearest_conv2d(X, SKIP, W3, size=(5, 4)), ValueError, "skip is"),
        (lambda: ops.upsample_nearest_conv2d(X, SKIP, W3, form="fast"), ValueError, "'fast'"),
        (lambda: ops.compose_pointwise(W3, W1), ValueError, "outer is"),
        (lambda: ops.compose_pointwise(W1, torch.ones(4, 2)), ValueError, "M must be the same"),
        (lambda: ops.upsample_sum(X, [SKIP]), ValueError, r"maps\[0\] is"),
        (lambda: ops.upsample_sum(X, [X], torch.ones(2)), ValueError, r"must be \(3,\)"),
    ],
)
def test_bad_input_is_refused_with_its_values(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_maps_that_would_be_resized_much_wider_are_resized_first(mode):
    maps = [torch.randn(2, C, n, n) for C, n in ((2, 3), (6, 8), (1, 1), (5, 4))]
    weight, bias = torch.randn(64, 14, 1, 1), torch.randn(64)
    call = lambda **more: ops.resize_concat_conv2d(maps, weight, bias, size=(8, 8), mode=mode, act="relu", **more)
    want = resize_concat_conv2d_ref(maps, weight, bias, size=(8, 8), mode=mode, act="relu")
    with torch.no_grad(), fastseg.explain() as report:
        torch.testing.assert_close(call(), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(call(form="small"), want, atol=1e-5, rtol=1e-5)
    told = [each.why for each in report if each.op == "resize_concat_conv2d"]
    assert ["narrow" in each for each in told] == [True, False]


def test_one_image_of_an_odd_batch_stride_gives_channels_last():
    tokens = torch.randn(1, 9, 4)  # as a transformer's stage gives them
    map_ = tokens.transpose(1, 2).reshape(1, 4, 3, 3)
    assert map_.is_contiguous(memory_format=torch.channels_last) and not map_.is_contiguous()
    y = ops.resize_concat_conv2d([map_, torch.randn(1, 4, 6, 6)], torch.randn(5, 8, 1, 1), size=(6, 6))
    assert y.is_contiguous(memory_format=torch.channels_last)
