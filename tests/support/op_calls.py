"""Small calls of the ops in every layout and mix of dtypes: what opcheck and torch.compile are tested on.

A row names the registered ops that it reaches where kernels run, and draws a function with its tensors. Tensors of maps
come in one layout a time, from ``LAYOUTS``; a second map of a call may lie the other way round.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.ops import (
    BatchNormArgs,
    batch_norm_act,
    batch_norm_act_max_pool2d,
    bilinear_conv_transpose2d,
    masks_to_classes,
    masks_to_queries,
    max_pool1d,
    max_pool2d,
    max_pool3d,
    max_unpool1d,
    max_unpool2d,
    max_unpool3d,
    max_unpool_conv2d,
    separable_conv2d,
    upsample_argmax,
    upsample_bilinear,
    upsample_concat,
    upsample_concat_conv2d,
    upsample_confidence,
    upsample_cross_entropy,
    upsample_sum,
    upsample_trilinear,
)
from fastseg.ops.atrous_conv2d import atrous_branches
from fastseg.ops.core.loss_columns import Column
from fastseg.ops.inverted_residual import inverted_residual
from fastseg.ops.registered.fold_norm import fold_norm
from fastseg.ops.registered.pointwise_conv import pointwise_conv2d
from fastseg.ops.registered.stem_conv import stem_conv2d
from fastseg.ops.registered.upsample_taps import upsample_taps
from fastseg.ops.upsample_concat_conv import decided_op
from fastseg.ops.upsample_loss_sums import upsample_loss_sums

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Layout(NamedTuple):
    """How a call's maps lie in memory, and of which dtypes its tensors are."""

    last: bool = False  # channels innermost
    cut: str = ""  # maps are "channels" of larger ones, or their every other one of "pixels"
    dtype: torch.dtype = torch.float32  # of maps
    params: torch.dtype = torch.float32  # of weights, biases, norms; another one than of maps: under autocast


LAYOUTS = {
    "contiguous": Layout(),
    "channels_last": Layout(last=True),
    "slice of channels": Layout(last=True, cut="channels"),
    "every other pixel": Layout(cut="pixels"),
    "half beside float": Layout(last=True, dtype=torch.float16),
    "bfloat16": Layout(cut="channels", dtype=torch.bfloat16, params=torch.bfloat16),
}


class Draw:
    """Random tensors in one layout; ``times`` the spatial sizes that are asked for, of two images or more one more."""

    def __init__(self, layout: Layout, grad: bool = True, times: int = 1, device: str = "cpu"):
        self.layout, self.grad, self.times, self.device = layout, grad, times, device

    def images(self, N: int) -> int:
        return N + self.times - 1 if N > 1 else N

    def map(self, N: int, C: int, *size: int, other: bool = False, grad: bool = True) -> Tensor:
        """(N, C, *size); ``other`` makes it contiguous among channels_last ones, and the other way round."""
        last, cut, dtype, _ = self.layout
        wide = [n * self.times * (1 + (cut == "pixels")) for n in size]
        x = torch.randn(self.images(N), C + 2 * (cut == "channels"), *wide, dtype=dtype, device=self.device)
        if last != other and x.dim() in FORMATS:
            x = x.contiguous(memory_format=FORMATS[x.dim()])
        x = x[:, :C]
        if cut == "pixels":
            x = x[(..., *[slice(None, None, 2)] * len(size))]
        return x.requires_grad_(self.grad and grad)

    def rows(self, *shape: int) -> Tensor:
        """In the dtype of maps, of any number of dimensions; the last one is cut as the channels of maps."""
        wide = shape[-1] + 2 * bool(self.layout.cut)
        x = torch.randn(*shape[:-1], wide, dtype=self.layout.dtype, device=self.device)
        return x[..., : shape[-1]].requires_grad_(self.grad)

    def weight(self, *shape: int, grad: bool = True) -> Tensor:
        w = torch.randn(shape, dtype=self.layout.params, device=self.device) / shape[-1]
        w = w.contiguous(memory_format=torch.channels_last) if self.layout.last else w
        return w.requires_grad_(self.grad and grad)

    def vector(self, C: int, grad: bool = True) -> Tensor:
        """(C,), positive: weights and biases, and without ``grad`` statistics."""
        step = 1 + (self.layout.cut == "pixels")
        v = torch.rand(C * step, dtype=self.layout.params, device=self.device)[::step] + 0.5
        return v.requires_grad_(self.grad and grad)

    def norm(self, C: int) -> list[Tensor]:
        """Mean, variance, weight, bias."""
        return [self.vector(C, grad=i > 1) for i in range(4)]

    def classes(self, count: int, N: int, *size: int) -> Tensor:
        return torch.randint(count, (self.images(N), *(n * self.times for n in size)), device=self.device)

    def gradient(self, y: Tensor) -> Tensor:
        """Of ``y``: a slice of a larger one, as ``cat`` gives it, expanded, as ``sum`` does, or dense."""
        if self.layout.cut == "pixels":
            return y.new_ones(()).expand(y.shape)
        if self.layout.cut == "channels" and y.dim() == 4:
            return torch.cat([y.detach(), y.detach()[:, :1]], 1).normal_()[:, 1:]
        return torch.randn_like(y)

    def autocast(self) -> torch.autocast:
        mixed = self.layout.dtype != self.layout.params
        return torch.autocast(self.device, self.layout.dtype if mixed else torch.bfloat16, enabled=mixed)


Drawn = tuple[Callable[..., Tensor | tuple[Tensor, ...]], list[Tensor]]


class Row(NamedTuple):
    reaches: str  # names of registered ops, where kernels run
    draw: Callable[[Draw], Drawn]
    grad: bool = True
    layouts: tuple[str, ...] = tuple(LAYOUTS)


DENSE, CUT = ("contiguous", "channels_last"), ("slice of channels", "every other pixel")
SINGLE = tuple(name for name in LAYOUTS if name != "half beside float")  # one dtype: no parameters beside the maps


def _unpool2d(index_format: str) -> Callable[[Draw], Drawn]:
    def run(x, v):
        _, indices = max_pool2d(x, 2, return_indices=True, index_format=index_format)
        return max_unpool2d(v, indices, 2, output_size=x.shape[2:])

    return lambda d: (run, [d.map(2, 3, 4, 6, other=index_format == "int64", grad=False), d.map(2, 3, 2, 3)])


def _unpool_of(pool, unpool, *size: int) -> Callable[[Draw], Drawn]:
    def run(x):
        v, indices = pool(x, 2, return_indices=True)
        return unpool(v * 2, indices, 2)

    return lambda d: (run, [d.map(2, 3, *size)])


def _batch_norm(training: bool, residual: bool, act: str) -> Callable[[Draw], Drawn]:
    def run(x, mean, var, weight, bias, residual=None):
        return batch_norm_act(x, BatchNormArgs(mean, var, weight, bias, training), act, residual)

    return lambda d: (run, [d.map(2, 5, 3, 4), *d.norm(5), *([d.map(2, 5, 3, 4, other=True)] if residual else [])])


def _norm_pool(training: bool, C: int = 5) -> Callable[[Draw], Drawn]:
    def run(x, *norm):
        return batch_norm_act_max_pool2d(x, BatchNormArgs(*norm, training), "relu", 2)

    return lambda d: (run, [d.map(2, C, 4, 6), *d.norm(C)])


def _no_norm_pool(d: Draw) -> Drawn:
    def run(x):
        return batch_norm_act_max_pool2d(x, None, "relu6", 3, 2, return_indices=True, index_format="int64")

    return run, [d.map(2, 3, 5, 7)]


def _separable_norms(mid_training: bool, training: bool) -> Callable[[Draw], Drawn]:
    def run(x, dw, pw, dw_bias, pw_bias, *norms):
        mid, post = BatchNormArgs(*norms[:4], mid_training), BatchNormArgs(*norms[4:], training)
        return separable_conv2d(x, dw, pw, dw_bias, pw_bias, mid_norm=mid, mid_act="relu6", post_norm=post,
                                post_act="leaky_relu")  # fmt: skip

    return lambda d: (run, [d.map(2, 3, 4, 4), d.weight(3, 1, 3, 3), d.weight(4, 3, 1, 1), d.vector(3), d.vector(4),
                            *d.norm(3), *d.norm(4)])  # fmt: skip


def _separable_residual(d: Draw) -> Drawn:
    def run(x, dw, pw, residual):
        return separable_conv2d(x, dw, pw, stride=2, pre_act="relu", residual=residual)

    return run, [d.map(2, 3, 4, 4), d.weight(3, 1, 3, 3), d.weight(4, 3, 1, 1), d.map(2, 4, 2, 2, other=True)]


def _atrous(act: str | None) -> Callable[[Draw], Drawn]:
    def run(x, one, three, far, bias, other_bias, far_bias, residual):
        return atrous_branches(x, [one, three, far], [bias, other_bias, far_bias], [1, 1, 2], act, residual)

    return lambda d: (run, [d.map(2, 3, 2, 3), d.weight(4, 3, 1, 1), d.weight(4, 3, 3, 3), d.weight(4, 3, 3, 3),
                            d.vector(4), d.vector(4), d.vector(4), d.map(2, 12, 2, 3, other=True)])  # fmt: skip


def _max_unpool_conv(d: Draw) -> Drawn:
    def run(x, v, weight, bias):
        _, indices = max_pool2d(x, 2, return_indices=True, index_format="compact")
        return max_unpool_conv2d(v, indices, weight, bias, "relu")

    x = d.map(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    return run, [x, d.map(2, 3, 2, 2), d.weight(4, 3, 1, 1), d.vector(4)]


def _inverted_residual(d: Draw) -> Drawn:
    def run(x, *weights):
        return inverted_residual(x, *weights, stride=2)

    return run, [d.map(1, 4, 3, 4), d.weight(6, 4, 1, 1), d.vector(6), d.weight(6, 1, 3, 3), d.vector(6),
                 d.weight(5, 6, 1, 1), d.vector(5)]  # fmt: skip


def _pointwise(d: Draw) -> Drawn:
    def run(x, weight, bias, residual, image_bias):
        return pointwise_conv2d(x, weight, bias, act="relu6", residual=residual, image_bias=image_bias)

    return run, [d.map(2, 5, 2, 3), d.weight(4, 5, 1, 1), d.vector(4), d.map(2, 4, 2, 3, other=True), d.rows(2, 4)]


def _stem(d: Draw) -> Drawn:
    def run(x, weight, bias):
        return stem_conv2d(x, weight, bias, act="relu", stride=2, padding=1)

    return run, [d.map(2, 3, 5, 4), d.weight(4, 3, 3, 3), d.vector(4)]


def _fold(d: Draw) -> Drawn:
    def run(weight, bias, *norm):
        return fold_norm(weight, bias, *norm, 1e-3, d.layout.dtype, d.layout.last)

    return run, [d.weight(4, 3, 3, 3), d.vector(4), *d.norm(4)]


def _fold_slice(d: Draw) -> Drawn:
    def run(weight, *statistics):
        return fold_norm(weight[:, 1:3], None, *statistics, None, None, 1e-3, d.layout.dtype, d.layout.last)

    return run, [d.weight(4, 5, 1, 1), d.vector(4), d.vector(4)]


def _conv_transpose(d: Draw) -> Drawn:
    def run(x, skip, bias):
        return bilinear_conv_transpose2d(x, 2, skip=skip, skip_offset=1, bias=bias)

    return run, [d.map(2, 3, 2, 3), d.map(2, 3, 6, 8, other=True), d.vector(3)]


def _concat(d: Draw) -> Drawn:
    def run(x, *skips):
        return upsample_concat(x, skips, align_corners=True)

    return run, [d.map(2, 3, 2, 3), d.map(2, 2, 4, 6), d.map(2, 1, 4, 6, other=True)]


def _sum(act: str | None) -> Callable[[Draw], Drawn]:
    def run(base, *maps):
        return upsample_sum(base, maps[:2], maps[2] if act else None, act=act)

    return lambda d: (run, [d.map(2, 3, 4, 5), d.map(2, 3, 2, 2), d.map(2, 3, 3, 5, other=True),
                            *([d.vector(3)] if act else [])])  # fmt: skip


def _concat_conv(d: Draw) -> Drawn:
    def run(deep, low, weight, bias):
        return upsample_concat_conv2d(deep, low, weight, bias, act="relu", align_corners=True)

    return run, [d.map(1, 3, 2, 2), d.map(1, 2, 4, 4), d.weight(4, 5, 3, 3), d.vector(4)]


def _decided_concat_conv(d: Draw) -> Drawn:
    def run(deep, low, weight, bias):
        return decided_op(deep, low, weight, bias, "relu", True, False)

    return run, [d.map(1, 3, 2, 2), d.map(1, 2, 4, 4), d.weight(4, 5, 3, 3), d.vector(4)]


def _taps(d: Draw) -> Drawn:
    def run(taps, base):
        return upsample_taps(taps, base, base.shape[2:], False)

    return run, [d.rows(3, 1, 2, 3, 3, 4), d.map(1, 4, 3, 5)]


def _no_images(d: Draw) -> Drawn:
    def run(x, taps):
        y = upsample_taps(taps, upsample_bilinear(x, 5), (5, 5), True)
        return bilinear_conv_transpose2d(y, 2) + upsample_argmax(y, scale_factor=2)[:, None]

    return run, [d.map(0, 4, 2, 3), d.rows(3, 0, 2, 3, 3, 4)]


def _masks(d: Draw) -> Drawn:
    return lambda scores, masks: masks_to_classes(scores, masks, 5), [d.rows(1, 3, 5), d.map(1, 3, 2, 3)]


def _owners(d: Draw) -> Drawn:
    run = lambda scores, masks: masks_to_queries(scores, masks, 5, scores_size=4)
    return run, [d.rows(1, 3), d.map(1, 3, 2, 3)]


def _cross_entropy(reduction: str) -> Callable[[Draw], Drawn]:
    def run(logits, target, weight):
        return upsample_cross_entropy(logits, target, weight, 3, reduction, 0.1)

    return lambda d: (run, [d.map(1, 5, 2, 3), d.classes(5, 1, 4, 6), d.vector(5, grad=False)])


def _loss_sums(activation: str, *kinds: str, each: bool = False) -> Callable[[Draw], Drawn]:
    columns = [Column(kind, 2.0) for kind in kinds]

    def run(logits, target):
        target = (target == 1)[:, None].expand(-1, 5, -1, -1).long() if each else target
        return upsample_loss_sums(logits, target, columns, activation, ignore_index=3)

    return lambda d: (run, [d.map(1, 5, 2, 3), d.classes(5, 1, 4, 6)])


def _of(op: Callable[..., Tensor], *size: int, **options) -> Callable[[Draw], Drawn]:
    """An op of one map, (*size)."""
    return lambda d: (lambda x: op(x, **options), [d.map(*size)])


POOL, UNPOOL = "max_pool max_unpool", "max_pool max_unpool max_unpool_bwd"
NORM = "batch_norm_act batch_norm_act_bwd_reduce"
BATCH_NORM = f"{NORM} batch_norm_stats batch_norm_act_bwd_input"
NORM_POOL = "batch_norm_act_max_pool batch_norm_act_max_pool_bwd"
SEPARABLE = "separable_conv2d_train separable_conv2d_bwd"
ATROUS = "atrous_branches atrous_branches_input atrous_branches_weight"
BILINEAR = "upsample_bilinear upsample_bilinear_bwd"
TRANSPOSE = "bilinear_conv_transpose2d bilinear_conv_transpose2d_bwd"
TAPS = "upsample_taps upsample_taps_bwd"
SUMS = "upsample_loss_sums upsample_loss_sums_bwd"
ENTROPY = "upsample_cross_entropy upsample_cross_entropy_bwd"

ROWS: dict[str, Row] = {
    "max_pool1d, max_unpool1d": Row(UNPOOL, _unpool_of(max_pool1d, max_unpool1d, 6), layouts=DENSE[:1]),
    "max_pool2d": Row("max_pool", _of(max_pool2d, 2, 5, 5, 6, kernel_size=2, ceil_mode=True), False, SINGLE),
    "max_pool2d, training": Row(POOL, _of(max_pool2d, 2, 5, 4, 6, kernel_size=3, stride=2, padding=1), layouts=SINGLE),
    "max_pool3d, max_unpool3d": Row(UNPOOL, _unpool_of(max_pool3d, max_unpool3d, 4, 4, 4), layouts=DENSE),
    "max_unpool2d, int64": Row(UNPOOL, _unpool2d("int64"), layouts=SINGLE),
    "max_unpool2d, compact": Row(UNPOOL, _unpool2d("compact"), layouts=SINGLE),
    "max_unpool_conv2d": Row("max_pool max_unpool_conv2d", _max_unpool_conv, False),
    "batch_norm_act, batch": Row(BATCH_NORM, _batch_norm(True, False, "relu")),
    "batch_norm_act, batch and residual": Row(BATCH_NORM, _batch_norm(True, True, "relu6"), layouts=DENSE),
    "batch_norm_act, running": Row(NORM, _batch_norm(False, True, "leaky_relu")),
    "batch_norm_act_max_pool2d, batch": Row(NORM_POOL, _norm_pool(True)),
    "batch_norm_act_max_pool2d, running": Row(NORM_POOL, _norm_pool(False), layouts=DENSE),
    "batch_norm_act_max_pool2d, no norm": Row("batch_norm_act_max_pool", _no_norm_pool, False, DENSE),
    "batch_norm_act_max_pool2d, one channel": Row(NORM_POOL, _norm_pool(True, 1), layouts=DENSE[:1]),  # is both
    "separable_conv2d": Row("separable_conv2d", _separable_norms(False, False), False),
    "separable_conv2d, batch": Row(SEPARABLE, _separable_norms(True, True)),
    "separable_conv2d, running and batch": Row(SEPARABLE, _separable_norms(False, True), layouts=DENSE),
    "separable_conv2d, residual": Row(SEPARABLE, _separable_residual, layouts=DENSE),
    "atrous_branches": Row(ATROUS, _atrous("relu")),
    "atrous_branches, no activation": Row(ATROUS, _atrous(None), layouts=CUT),  # the gradient comes as it is
    "inverted_residual": Row("inverted_residual", _inverted_residual, False),
    "pointwise_conv2d": Row("pointwise_conv2d", _pointwise, False),
    "fold_norm": Row("fold_norm", _fold, False),
    "fold_norm, slice of a 1x1 without affine": Row("fold_norm", _fold_slice, False, DENSE),
    "stem_conv2d": Row("stem_conv2d", _stem, False),
    "upsample_bilinear": Row(BILINEAR, _of(upsample_bilinear, 2, 3, 2, 3, scale_factor=1.7), layouts=SINGLE),
    "upsample_trilinear": Row(BILINEAR, _of(upsample_trilinear, 1, 2, 2, 3, 2, scale_factor=1.7), layouts=DENSE),
    "bilinear_conv_transpose2d": Row(TRANSPOSE, _conv_transpose),
    "upsample_concat": Row("upsample_concat upsample_bilinear_bwd", _concat, layouts=SINGLE),
    "upsample_sum": Row("upsample_sum upsample_bilinear_bwd", _sum(None), layouts=SINGLE),
    "upsample_sum, bias and activation": Row("upsample_sum", _sum("relu"), False),
    "upsample_concat_conv2d": Row("upsample_taps", _concat_conv, False),
    "upsample_concat_conv2d, in a graph": Row("upsample_concat_conv2d", _decided_concat_conv, False, DENSE),
    "upsample_taps": Row(TAPS, _taps, layouts=SINGLE),
    "no images": Row(f"{BILINEAR} {TRANSPOSE} {TAPS} upsample_argmax", _no_images, layouts=DENSE),
    "upsample_argmax": Row("upsample_argmax", _of(upsample_argmax, 1, 5, 2, 3, scale_factor=2), False, SINGLE),
    "upsample_argmax, volume": Row(
        "upsample_argmax3d", _of(upsample_argmax, 1, 3, 2, 3, 2, scale_factor=2), False, DENSE
    ),
    "upsample_argmax, int64": Row(
        "upsample_argmax", _of(upsample_argmax, 1, 5, 2, 3, size=7, align_corners=True, dtype=torch.int64), False, DENSE
    ),
    "upsample_cross_entropy, mean": Row(ENTROPY, _cross_entropy("mean")),
    "upsample_cross_entropy, none": Row(ENTROPY, _cross_entropy("none"), layouts=DENSE),
    "upsample_loss_sums, softmax": Row(SUMS, _loss_sums("softmax", "nll", "inter", "prob", "target")),
    "upsample_loss_sums, softmax of each class": Row(
        SUMS, _loss_sums("softmax", "nll", "inter", each=True), layouts=DENSE[:1]
    ),
    "upsample_loss_sums, sigmoid": Row(SUMS, _loss_sums("sigmoid", "bce", "focal_pos", each=True), layouts=DENSE),
    "masks_to_classes": Row("masks_to_classes", _masks, False, SINGLE),
    "masks_to_queries": Row("masks_to_queries", _owners, False, SINGLE),
    "upsample_confidence": Row(
        "upsample_confidence", _of(upsample_confidence, 1, 5, 2, 3, size=7, measure="entropy"), False, DENSE
    ),
}
