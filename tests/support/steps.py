"""Small calls of every public op beside torch's own steps, in fp64: what transforms and tracers are tested on."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import ops
from fastseg.losses import BinaryCrossEntropy, CrossEntropy, Dice
from fastseg.ops import BatchNormArgs


class Steps(NamedTuple):
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    tensors: Callable[[], list[Tensor]]  # drawn anew, differentiable
    batched: tuple[int, ...] = (0,)  # which of them vmap maps over


def _draw(*shapes: tuple[int, ...]) -> Callable[[], list[Tensor]]:
    def draw() -> list[Tensor]:
        return [torch.rand(s, dtype=torch.double) + 0.5 if len(s) == 1 else torch.randn(s, dtype=torch.double)
                for s in shapes]  # fmt: skip

    return draw


def _last(shape: tuple[int, ...], *others: tuple[int, ...]) -> Callable[[], list[Tensor]]:
    draw = _draw(shape, *others)

    def drawn() -> list[Tensor]:
        x, *rest = draw()
        return [x.contiguous(memory_format=torch.channels_last), *rest]

    return drawn


def _resize(x: Tensor, size, align_corners: bool = False) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def _pool_rows() -> dict[str, Steps]:
    rows = {}
    for dims, size in ((1, (7,)), (2, (4, 5)), (3, (2, 3, 2))):
        ours, torchs = getattr(ops, f"max_pool{dims}d"), getattr(F, f"max_pool{dims}d")
        un, torchs_un = getattr(ops, f"max_unpool{dims}d"), getattr(F, f"max_unpool{dims}d")

        def run(pool, unpool, x, v, **options):
            y, index = pool(x, 2, return_indices=True, **options)
            return unpool(y * v, index, 2, output_size=x.shape[2:])

        windows = tuple(n // 2 for n in size)
        rows[f"max_pool{dims}d"] = Steps(
            lambda x, f=ours: f(x, 3, 2, 1), lambda x, f=torchs: f(x, 3, 2, 1), _draw((2, 2, *size))
        )
        for form in ("int64", "compact"):
            rows[f"max_unpool{dims}d, {form}"] = Steps(
                lambda x, v, p=ours, u=un, form=form: run(p, u, x, v, index_format=form),
                lambda x, v, p=torchs, u=torchs_un: run(p, u, x, v),
                _draw((2, 2, *size), (2, 2, *windows)),
                (0, 1),
            )
    return rows


def _norm(training: bool, act: str | None, residual: bool):
    def ours(x, weight, bias, residual=None):
        mean, var = x.new_full((3,), 0.1), x.new_full((3,), 1.3)
        return ops.batch_norm_act(x, BatchNormArgs(*(() if training else (mean, var)) or (None, None), weight, bias,
                                                   training), act, residual)  # fmt: skip

    def torchs(x, weight, bias, residual=None):
        mean, var = x.new_full((3,), 0.1), x.new_full((3,), 1.3)
        y = F.batch_norm(x, None if training else mean, None if training else var, weight, bias, training)
        y = y if residual is None else y + residual
        return y if act is None else getattr(F, act)(y)

    more = [(2, 3, 3, 4)] if residual else []
    return Steps(ours, torchs, _draw((2, 3, 3, 4), (3,), (3,), *more), (0, 3) if residual else (0,))


def _norm_pool(training: bool) -> Steps:
    def stats(x):
        return (None, None) if training else (x.new_full((3,), 0.1), x.new_full((3,), 1.3))

    def ours(x, weight, bias):
        return ops.batch_norm_act_max_pool2d(x, BatchNormArgs(*stats(x), weight, bias, training), "relu", 2)

    def torchs(x, weight, bias):
        return F.max_pool2d(F.relu(F.batch_norm(x, *stats(x), weight, bias, training)), 2)

    return Steps(ours, torchs, _last((2, 3, 4, 4), (3,), (3,)))


def _separable(training: bool) -> Steps:
    def stats(x, C):
        return (None, None) if training else (x.new_full((C,), 0.1), x.new_full((C,), 1.3))

    def ours(x, dw, pw, db, pb, w1, b1, w2, b2, residual):
        return ops.separable_conv2d(
            x, dw, pw, db, pb, pre_act="relu", mid_norm=BatchNormArgs(*stats(x, 2), w1, b1, training), mid_act="relu6",
            post_norm=BatchNormArgs(*stats(x, 3), w2, b2, training), post_act="leaky_relu", residual=residual,
        )  # fmt: skip

    def torchs(x, dw, pw, db, pb, w1, b1, w2, b2, residual):
        u = F.conv2d(F.relu(x), dw, db, padding=1, groups=2)
        u = F.relu6(F.batch_norm(u, *stats(x, 2), w1, b1, training))
        z = F.batch_norm(F.conv2d(u, pw, pb), *stats(x, 3), w2, b2, training)
        return F.leaky_relu(z) + residual

    shapes = ((2, 2, 3, 4), (2, 1, 3, 3), (3, 2, 1, 1), (2,), (3,), (2,), (2,), (3,), (3,), (2, 3, 3, 4))
    return Steps(ours, torchs, _draw(*shapes), (0, 9))


def _atrous() -> Steps:
    def ours(x, weight, bias, residual):
        return ops.atrous_conv2d(x, weight, bias, 2, act="relu", residual=residual)

    def torchs(x, weight, bias, residual):
        return F.relu(F.conv2d(x, weight, bias, padding=2, dilation=2) + residual)

    return Steps(ours, torchs, _draw((2, 2, 4, 3), (3, 2, 3, 3), (3,), (2, 3, 4, 3)), (0, 3))


def _aspp(fusion: str) -> Steps:
    def ours(x, one, three, *rest):
        if fusion == "sum":
            return ops.aspp(x, [one, three], [1, 2], fusion="sum")
        project, pool, bias = rest
        return ops.aspp(x, [one, three], [1, 2], project_weight=project, project_bias=bias, pool_weight=pool)

    def torchs(x, one, three, *rest):
        if fusion == "sum":
            return F.conv2d(x, one) + F.conv2d(x, three, padding=2, dilation=2)
        project, pool, bias = rest
        p = F.relu(F.conv2d(x.mean((2, 3), keepdim=True), pool)).expand(-1, -1, *x.shape[2:])
        branches = [F.relu(F.conv2d(x, one)), F.relu(F.conv2d(x, three, padding=2, dilation=2)), p]
        return F.relu(F.conv2d(torch.cat(branches, 1), project, bias))

    shapes = [(2, 2, 4, 3), (2, 2, 1, 1), (2, 2, 3, 3)]
    if fusion == "concat":
        shapes += [(3, 6, 1, 1), (2, 2, 1, 1), (3,)]
    return Steps(ours, torchs, _draw(*shapes))


def _transpose() -> Steps:
    def ours(x, skip, bias):
        return ops.bilinear_conv_transpose2d(x, 2, skip=skip, skip_offset=1, bias=bias)

    def torchs(x, skip, bias):
        line = x.new_tensor([0.25, 0.75, 0.75, 0.25])
        weight = (line[:, None] * line).expand(2, 1, 4, 4)
        return F.conv_transpose2d(x, weight, bias, 2, 1, groups=2) + skip[..., 1:7, 1:5]

    return Steps(ours, torchs, _draw((2, 2, 3, 2), (2, 2, 8, 7), (2,)), (0, 1))


def _concat() -> Steps:
    return Steps(
        lambda x, *skips: ops.upsample_concat(x, skips, align_corners=True),
        lambda x, *skips: torch.cat([*skips, _resize(x, skips[0].shape[2:], True)], 1),
        _draw((2, 2, 2, 3), (2, 1, 3, 5), (2, 2, 3, 5)),
        (0, 1, 2),
    )


def _concat_conv() -> Steps:
    def torchs(deep, low, weight, bias):
        x = torch.cat([_resize(deep, low.shape[2:]), low], 1)
        return F.relu(F.conv2d(x, weight, bias, padding=1))

    return Steps(
        lambda deep, low, weight, bias: ops.upsample_concat_conv2d(deep, low, weight, bias, act="relu"),
        torchs,
        _draw((1, 2, 2, 2), (1, 1, 5, 4), (2, 3, 3, 3), (2,)),
        (0, 1),
    )


def _unpool_conv() -> Steps:
    def ours(x, v, weight, bias):
        _, index = ops.max_pool2d(x, 2, return_indices=True, index_format="compact")
        return ops.max_unpool_conv2d(v, index, weight, bias, "relu")

    def torchs(x, v, weight, bias):
        _, index = F.max_pool2d(x, 2, return_indices=True)
        return F.relu(F.conv2d(F.max_unpool2d(v, index.contiguous(), 2), weight, bias))  # else no batched gradients

    return Steps(ours, torchs, _last((2, 2, 4, 4), (2, 2, 2, 2), (3, 2, 1, 1), (3,)), (0, 1))


def _cross_entropy(reduction: str) -> Steps:
    target = torch.tensor([[[0, 1, 2], [3, 1, 0], [2, 2, 1], [0, 3, 3]]]).expand(2, 4, 3)  # 3: ignored
    weight = torch.tensor([0.5, 1.5, 1.0], dtype=torch.double)
    return Steps(
        lambda x: ops.upsample_cross_entropy(x, target[: x.shape[0]], weight, 3, reduction, 0.1),
        lambda x: F.cross_entropy(_resize(x, (4, 3)), target[: x.shape[0]], weight, ignore_index=3, reduction=reduction,
                                  label_smoothing=0.1),
        _draw((2, 3, 2, 2)),
    )  # fmt: skip


def _volume_entropy() -> Steps:
    target = torch.tensor([[[[0, 1], [2, 3]], [[1, 1], [0, 2]], [[2, 0], [3, 1]]]])  # 3: ignored
    return Steps(
        lambda x: ops.upsample_cross_entropy(x, target, None, 3, "mean", 0.1),
        lambda x: F.cross_entropy(_volume(x, (3, 2, 2)), target, ignore_index=3, label_smoothing=0.1),
        _draw((1, 3, 2, 2, 1)),
    )


def _volume(x: Tensor, size) -> Tensor:
    return F.interpolate(x, size, mode="trilinear", align_corners=False)


def _loss(dims: int, activation: str) -> Steps:
    """Cross entropy and Dice, of one label a pixel or of labels for each class."""
    size = (4, 3, 2)[:dims]
    of_classes = activation == "sigmoid"
    target = (torch.arange(3 * 4 * 3 * 2)[: 3 * math.prod(size)] * 7 % 5 % 3).view(1, 3, *size)
    target = target.clamp(max=1) if of_classes else target[:, 0]
    entropy = BinaryCrossEntropy() if of_classes else CrossEntropy()
    terms = [(1.0, entropy), (0.5, Dice(activation=activation))]

    def torchs(x):
        wide = _resize(x, size) if dims == 2 else _volume(x, size)
        if of_classes:
            p, y = wide.sigmoid(), target.to(x.dtype)
            first = F.binary_cross_entropy_with_logits(wide, y)
        else:
            p, y = wide.softmax(1), F.one_hot(target, 3).movedim(-1, 1).to(x.dtype)
            first = F.cross_entropy(wide, target)
        both, each = (p * y).flatten(2).sum(2), (p + y).flatten(2).sum(2)
        return first + 0.5 * (1 - (2 * both + 1) / (each + 1)).mean()

    return Steps(lambda x: ops.upsample_loss(x, target, terms), torchs, _draw((1, 3, *(2, 2, 1)[:dims])))


def _sum() -> Steps:
    return Steps(
        lambda base, one, other, bias: ops.upsample_sum(base, [one, other], bias, act="leaky_relu"),
        lambda base, one, other, bias: F.leaky_relu(
            base + _resize(one, (4, 5)) + _resize(other, (4, 5)) + bias[:, None, None]
        ),
        _draw((2, 2, 4, 5), (2, 2, 2, 2), (2, 2, 3, 5), (2,)),
        (0, 1, 2),
    )


def _nearest_conv(form: str) -> Steps:
    return Steps(
        lambda x, skip, weight, bias: ops.upsample_nearest_conv2d(x, skip, weight, bias, act="relu", form=form),
        lambda x, skip, weight, bias: F.relu(
            F.conv2d(torch.cat([F.interpolate(x, scale_factor=2), skip], 1), weight, bias, padding=1)
        ),
        _draw((1, 2, 2, 2), (1, 1, 4, 4), (2, 3, 3, 3), (2,)),
        (0, 1),
    )


def _resized(K: int) -> Steps:
    return Steps(
        lambda a, b, weight, bias: ops.resize_concat_conv2d(
            [a, b], weight, bias, size=(5, 4), act="relu", form="small"
        ),
        lambda a, b, weight, bias: F.relu(
            F.conv2d(torch.cat([_resize(a, (5, 4)), _resize(b, (5, 4))], 1), weight, bias, padding=K // 2)
        ),
        _draw((1, 2, 2, 2), (1, 1, 5, 4), (2, 3, K, K), (2,)),
        (0, 1),
    )


STEPS: dict[str, Steps] = {
    **_pool_rows(),
    "batch_norm_act, batch": _norm(True, "relu", False),
    "batch_norm_act, batch and residual": _norm(True, "relu6", True),
    "batch_norm_act, running and residual": _norm(False, "leaky_relu", True),
    "batch_norm_act_max_pool2d, batch": _norm_pool(True),
    "batch_norm_act_max_pool2d, running": _norm_pool(False),
    "separable_conv2d, batch": _separable(True),
    "separable_conv2d, running": _separable(False),
    "atrous_conv2d": _atrous(),
    "aspp, concat": _aspp("concat"),
    "aspp, sum": _aspp("sum"),
    "bilinear_conv_transpose2d": _transpose(),
    "max_unpool_conv2d": _unpool_conv(),
    "upsample_bilinear": Steps(
        lambda x: ops.upsample_bilinear(x, (5, 4)), lambda x: _resize(x, (5, 4)), _draw((2, 2, 3, 2))
    ),
    "upsample_concat": _concat(),
    "upsample_concat_conv2d": _concat_conv(),
    "upsample_cross_entropy, mean": _cross_entropy("mean"),
    "upsample_cross_entropy, none": _cross_entropy("none"),
    "upsample_cross_entropy, volume": _volume_entropy(),
    "upsample_trilinear": Steps(
        lambda x: ops.upsample_trilinear(x, (3, 5, 2)), lambda x: _volume(x, (3, 5, 2)), _draw((1, 2, 2, 3, 2))
    ),
    "upsample_loss, classes": _loss(2, "softmax"),
    "upsample_loss, each": _loss(2, "sigmoid"),
    "upsample_loss, volume": _loss(3, "softmax"),
    "upsample_sum": _sum(),
    "upsample_nearest_conv2d, transposed": _nearest_conv("transposed"),
    "upsample_nearest_conv2d, phases": _nearest_conv("phases"),
    "resize_concat_conv2d, 1x1": _resized(1),
    "resize_concat_conv2d, 3x3": _resized(3),
}  # fmt: skip
