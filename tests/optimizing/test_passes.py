"""Each pass on a small planted net: what it matches, what it leaves, and equal values in fp64."""

import pytest
import torch
from nets import unsettle
from torch import nn
from torch.nn import functional as F

from fastseg.optimizing.graph import Constants, Work
from fastseg.optimizing.optimized import improved
from fastseg.optimizing.passes import (
    aspp,
    conv_act,
    fold_constants,
    fold_norm,
    in_place,
    layout,
    nearest_conv,
    padding,
    pointwise,
    pool_codes,
    resize_concat,
    separable,
    sums,
    tokens,
    upsample_argmax,
    upsample_sum,
)
from fastseg.optimizing.trace import trace


class Planted(nn.Module):
    """``body(self, x)`` with convolutions: stem 3 -> 8 at stride 2, and further ones by name."""

    def __init__(self, body, **convolutions):
        super().__init__()
        self.body, self.stem, self.norm = body, nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        for name, conv in convolutions.items():
            self.add_module(name, conv)

    def forward(self, x):
        return self.body(self, x)


def rows(passes, body, **convolutions):
    """What the passes did, one after another; each must keep the values."""
    model = unsettle(Planted(body, **convolutions)).double().eval().requires_grad_(False)
    x = torch.randn(2, 3, 12, 20, dtype=torch.float64)
    with torch.no_grad():
        _, found, why = improved(Work(trace(model, (x,), "given").module, Constants()), model, (x,), passes)
    assert not why and not any("undone" in row.note for row in found), (why, [row.note for row in found])
    return found


def resized(x, size, mode="bilinear", corners=None):
    return F.interpolate(x, size, mode=mode, align_corners=corners)


def test_norms_are_folded():
    (row,) = rows([fold_norm], lambda m, x: m.norm(m.stem(x)))
    assert len(row.matches) == 1 and row.after.launches < row.before.launches


def two_readers(m, x):
    y = m.stem(x)
    return m.norm(y) + y


def batch_statistics(m, x):
    return F.batch_norm(m.stem(x), None, None, training=True)


@pytest.mark.parametrize("body", [two_readers, batch_statistics, lambda m, x: m.norm(m.stem(x).relu())])
def test_norms_that_stay(body):
    assert rows([fold_norm], body)[0].matches == ()


@pytest.mark.parametrize(
    "body, fused",
    [
        (lambda m, x: F.relu(m.stem(x)), "+ relu"),
        (lambda m, x: F.relu6(m.stem(x) + m.short(x)), "+ residual + relu6"),
        (lambda m, x: F.leaky_relu(m.short(x), 0.01), "+ leaky_relu"),
        (lambda m, x: F.leaky_relu(m.short(x), 0.2), ""),
        (lambda m, x: F.hardtanh(m.short(x)), ""),
        (lambda m, x: F.relu(m.short(x) + m.short(x).mean((2, 3), keepdim=True)), ""),  # a sum of other sizes
        (lambda m, x: F.relu(torch.add(m.short(x), x.mean(), alpha=2)), ""),
    ],
)
def test_convolutions_take_residual_and_activation(body, fused):
    (row,) = rows([conv_act], body, short=nn.Conv2d(3, 8, 1, 2))
    assert row.matches and any(match.endswith(fused) for match in row.matches)
    assert fused or not any("+" in match for match in row.matches)


def joined(mode, corners):
    def body(m, x):
        y = m.stem(x)
        ups = [resized(m.small(y), y.shape[2:], mode, corners), resized(F.avg_pool2d(y, 2), y.shape[2:], mode, corners)]
        return F.relu(m.fuse(torch.cat([y, *ups], 1)))

    return body


SMALL = {"small": nn.Conv2d(8, 8, 3, 3)}


@pytest.mark.parametrize("taps, mode, corners", [(1, "bilinear", False), (1, "nearest", None), (3, "bilinear", True)])
def test_resized_maps_are_multiplied_small(taps, mode, corners):
    fuse = nn.Conv2d(24, 4, taps, padding=taps // 2)
    (row,) = rows([resize_concat], joined(mode, corners), fuse=fuse, **SMALL)
    assert len(row.matches) == 1 and "2 of 3 maps" in row.matches[0]
    if taps == 1:
        assert row.after.products < row.before.products


def mixed(m, x):
    y = m.stem(x)
    small = F.avg_pool2d(y, 2)
    return m.fuse(torch.cat([resized(small, y.shape[2:]), resized(small, y.shape[2:], corners=True)], 1))


def read_twice(m, x):
    up = resized(m.small(m.stem(x)), (6, 10))
    return m.fuse(up) + up.mean()


@pytest.mark.parametrize(
    "body, fuse",
    [
        (mixed, nn.Conv2d(16, 4, 1)),
        (read_twice, nn.Conv2d(8, 4, 1)),
        (lambda m, x: m.fuse(resized(m.small(m.stem(x)), (6, 10))), nn.Conv2d(8, 4, 3, stride=2, padding=1)),
        (lambda m, x: m.fuse(resized(m.small(m.stem(x)), (6, 10))), nn.Conv2d(8, 4, 3)),
        (lambda m, x: m.fuse(resized(m.stem(x), (3, 5))), nn.Conv2d(8, 4, 1)),  # it shrinks
        (lambda m, x: m.fuse(resized(m.stem(x), (12, 20), "nearest")), nn.Conv2d(8, 4, 3, padding=1)),
        (lambda m, x: m.fuse(F.interpolate(m.small(m.stem(x)), scale_factor=1.7, mode="bilinear")), nn.Conv2d(8, 4, 1)),
    ],
)
def test_resizes_that_stay(body, fuse):
    assert rows([resize_concat], body, fuse=fuse, **SMALL)[0].matches == ()


def doubled(m, x):
    y = m.stem(x)
    up = F.interpolate(F.avg_pool2d(y, 2), scale_factor=2.0, mode="nearest")
    return F.relu(m.fuse(torch.cat([y, up] if m.fuse.in_channels == 16 else [up], 1)))


@pytest.mark.parametrize("channels", [8, 16])
def test_doubled_maps(channels):
    (row,) = rows([nearest_conv], doubled, fuse=nn.Conv2d(channels, 4, 3, padding=1))
    assert len(row.matches) == 1


def test_doubled_maps_that_stay():
    for fuse in (nn.Conv2d(16, 4, 3), nn.Conv2d(16, 4, 5, padding=2), nn.Conv2d(16, 4, 3, padding=1, groups=2)):
        assert rows([nearest_conv], doubled, fuse=fuse)[0].matches == ()


def two_matrices(m, x):
    return m.outer(m.inner(m.stem(x)))


def test_two_matrices_are_one():
    (row,) = rows([pointwise], two_matrices, inner=nn.Conv2d(8, 32, 1), outer=nn.Conv2d(32, 4, 1, bias=False))
    assert len(row.matches) == 1 and row.after.products < row.before.products
    assert rows([pointwise], two_matrices, inner=nn.Conv2d(8, 1, 1), outer=nn.Conv2d(1, 32, 1))[0].matches == ()
    active = lambda m, x: m.outer(F.relu(m.inner(m.stem(x))))
    assert rows([pointwise], active, inner=nn.Conv2d(8, 32, 1), outer=nn.Conv2d(32, 4, 1))[0].matches == ()


def test_matrices_in_front_of_a_fusion_are_taken_in():
    fuse, small = nn.Conv2d(40, 4, 1), nn.Conv2d(8, 32, 1)
    body = lambda m, x: m.fuse(torch.cat([resized(m.small(F.avg_pool2d(m.stem(x), 2)), (6, 10)), m.stem(x)], 1))
    first, second = rows([resize_concat, pointwise], body, fuse=fuse, small=small)
    assert len(first.matches) == len(second.matches) == 1 and second.after.products < first.after.products


def pyramid(m, x):
    y = m.stem(x)
    return y + resized(F.avg_pool2d(y, 2), y.shape[2:]) + resized(m.small(y), y.shape[2:])


def test_sums_of_resized_maps():
    (row,) = rows([upsample_sum], pyramid, **SMALL)
    assert len(row.matches) == 1 and "2 maps" in row.matches[0]
    nearest = lambda m, x: m.stem(x) + resized(F.avg_pool2d(m.stem(x), 2), (6, 10), "nearest")
    assert rows([upsample_sum], nearest)[0].matches == ()


def test_class_maps():
    (row,) = rows([upsample_argmax], lambda m, x: resized(m.stem(x), (12, 20)).argmax(1))
    assert len(row.matches) == 1
    for body in (
        lambda m, x: resized(m.stem(x), (12, 20)).argmax(2),
        lambda m, x: resized(m.stem(x), (12, 20)).argmax(1, keepdim=True),
        lambda m, x: resized(m.stem(x), (12, 20), "nearest").argmax(1),
    ):
        assert rows([upsample_argmax], body)[0].matches == ()


def test_constants_are_computed_once():
    standardised = lambda m, x: F.conv2d(x, (m.stem.weight - m.stem.weight.mean()) / m.stem.weight.std(), m.stem.bias)
    (row,) = rows([fold_constants], standardised)
    assert len(row.matches) >= 3 and row.after.launches < row.before.launches
    assert rows([fold_constants], lambda m, x: m.stem(x) * 2)[0].matches == ()
    assert rows([fold_constants], lambda m, x: m.stem(x) + F.dropout(m.stem.weight.sum(), 0.5).relu() * 0)[0].matches


def test_channels_last():
    _, row = rows([conv_act, layout], lambda m, x: m.stem(x))
    assert len(row.matches) == 2  # the input and the weight


def head(m, x):
    """SegFormer's: a linear layer over the tokens of each map, then a fusion of all."""
    maps = [m.stem(x), F.avg_pool2d(m.stem(x), 2)]
    maps = [m.linear(y.flatten(2).transpose(1, 2)).permute(0, 2, 1).reshape(2, -1, *y.shape[2:]) for y in maps]
    return F.relu(m.fuse(torch.cat([resized(y, (6, 10)) for y in maps], 1)))


def test_linear_layers_over_tokens():
    linear, fuse = nn.Linear(8, 32), nn.Conv2d(64, 4, 1)
    first, second, third = rows([tokens, resize_concat, pointwise], head, linear=linear, fuse=fuse)
    assert len(first.matches) == 2 and len(second.matches) == 1 and third.after.products < first.before.products / 2

    def turned(m, x):  # tokens that do not become the map that they were
        y = m.stem(x)
        return m.linear(y.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(2, -1, *y.shape[:1:-1])

    assert rows([tokens], turned, linear=linear)[0].matches == ()


@pytest.fixture
def everywhere(monkeypatch):
    """Passes that pay on a GPU only run here too."""
    for each in (aspp, pool_codes, separable):
        monkeypatch.setattr(each, "DEVICES", ("cpu",))


def test_devices():
    assert rows([separable], lambda m, x: m.stem(x))[0].note == "pays on cuda only"


def pyramid_of(pool_first, act):
    def body(m, x):
        y = m.stem(x)
        parts = [act(m.one(y)), act(m.three(y)), act(m.far(y))]
        pool = resized(act(m.pool(F.adaptive_avg_pool2d(y, 1))), y.shape[2:])
        return F.relu(m.project(torch.cat([pool, *parts] if pool_first else [*parts, pool], 1)))

    return body


@pytest.mark.parametrize("pool_first, act, matches", [(True, F.relu, 1), (False, F.relu, 1), (False, F.relu6, 0)])
def test_atrous_pyramids(everywhere, pool_first, act, matches):
    convolutions = {
        "one": nn.Conv2d(8, 4, 1), "three": nn.Conv2d(8, 4, 3, padding=2, dilation=2), "pool": nn.Conv2d(8, 4, 1),
        "far": nn.Conv2d(8, 4, 3, padding=4, dilation=4), "project": nn.Conv2d(16, 4, 1),
    }  # fmt: skip
    (row,) = rows([aspp], pyramid_of(pool_first, act), **convolutions)
    assert len(row.matches) == matches


@pytest.mark.parametrize(
    "deep, matches",
    [
        (nn.Conv2d(8, 8, 3, 2, 1, groups=8), 1),
        (nn.Conv2d(8, 8, (3, 1), groups=8), 0),
        (nn.Conv2d(8, 8, 3, groups=4), 0),
        (nn.Conv2d(8, 16, 3, groups=8), 0),
    ],
)
def test_depthwise_and_pointwise(everywhere, deep, matches):
    body = lambda m, x: F.relu(m.flat(F.relu6(m.deep(m.stem(x)))) + m.flat(m.deep(m.stem(x))))
    flat = nn.Conv2d(deep.out_channels, 4, 1)
    row = rows([conv_act, separable], body, deep=deep, flat=flat)[-1]
    assert len(row.matches) == 2 * matches


def unpooled(size, stride, keep=False):
    def body(m, x):
        y, indices = F.max_pool2d(m.stem(x), size, stride, return_indices=True)
        out = F.max_unpool2d(y, indices, size, stride, output_size=(6, 10))
        return (out, indices) if keep else out

    return body


def test_pools_as_codes(everywhere):
    assert len(rows([pool_codes], unpooled(2, 2))[0].matches) == 1
    for body in (unpooled(2, 2, keep=True), unpooled(3, 2)):
        assert rows([pool_codes], body)[0].matches == ()


def test_writes_in_place():
    def views(m, x):
        y = m.stem(x)
        y[:, :2] += 1  # a view of what is read later
        return y

    rows([], views)
    rows([], lambda m, x: m.stem(x).relu_().add_(1).clamp_(max=2))


def transposed(m, x):
    return F.relu(m.norm(m.up(x)))


def test_norms_are_folded_into_transposed_convolutions():
    (row,) = rows([fold_norm], transposed, up=nn.ConvTranspose2d(3, 8, 4, 2, 1))
    assert len(row.matches) == 1 and row.after.launches < row.before.launches
    body = lambda m, x: m.norm(m.up(m.stem(x)))
    assert rows([fold_norm], body, up=nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=2))[0].matches == ()


def test_a_sum_of_a_stack():
    merged = lambda m, x: torch.stack([m.stem(x), m.stem(x).relu(), m.stem(x) * 2]).sum(dim=0)
    (row,) = rows([sums], merged)
    assert row.matches and row.after.launches == row.before.launches
    for other in (
        lambda m, x: torch.stack([m.stem(x), m.stem(x)]).sum(1),
        lambda m, x: torch.stack([m.stem(x), m.stem(x)]).sum((0, 1)),
        lambda m, x: torch.stack([m.stem(x), m.stem(x)]).sum(0, keepdim=True),
        lambda m, x: torch.stack([m.stem(x)]).sum(0),
    ):
        assert rows([sums], other)[0].matches == ()


def test_zeros_become_padding():
    for sides in ((1, 1, 2, 2), (2, 2)):
        assert rows([padding], lambda m, x, sides=sides: m.stem(F.pad(x, sides)))[0].matches
    for sides, value in (((0, 1, 0, 1), 0.0), ((1, 1, 1, 1), 2.0), ((-1, -1), 0.0)):
        body = lambda m, x, sides=sides, value=value: m.stem(F.pad(x, sides, value=value))
        assert rows([padding], body)[0].matches == ()
    assert rows([padding], lambda m, x: m.stem(F.pad(x, (1, 1, 1, 1), mode="reflect")))[0].matches == ()


def test_copies_keep_channels_innermost():
    def body(m, x):
        tokens = m.stem(x).permute(0, 2, 3, 1).contiguous()
        return m.short(tokens.permute(0, 3, 1, 2).contiguous()).view(2, -1).relu()

    row = rows([conv_act, layout], body, short=nn.Conv2d(8, 8, 1))[-1]
    assert sum("contiguous" in match for match in row.matches) == 1


def test_what_is_spent_is_written_to():
    gated = lambda m, x: F.silu(m.stem(x)) * m.stem(x).mean((2, 3), keepdim=True).sigmoid()
    assert len(rows([conv_act, in_place], gated)[-1].matches) == 2  # the activation and the product
    summed = lambda m, x: x[:, :1, ::2, ::2] + F.hardswish(m.stem(x))  # a sum into its second operand
    assert len(rows([in_place], summed)[0].matches) == 2
    assert (
        len(rows([in_place], excited, short=nn.Conv2d(8, 8, 1))[0].matches) == 2
    )  # the gate and the product, of what was pooled before
    for body in (
        lambda m, x: F.relu(x),  # the caller's
        lambda m, x: F.relu(m.stem(x).view(-1)),  # of memory that is another's
        twice_read,
    ):
        assert rows([in_place], body)[0].matches == ()


def twice_read(m, x):
    y = m.stem(x)
    return torch.cat([F.relu(y), y])


def excited(m, x):
    y = m.stem(x)
    return y * m.short(F.adaptive_avg_pool2d(y, 1)).sigmoid()
