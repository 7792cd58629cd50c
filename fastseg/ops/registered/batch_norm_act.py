"""The registered ops behind ``batch_norm_act``: statistics, forward, and the two passes of the backward.

They are separate ops so that processes can exchange statistics and sums of gradients between them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastseg.ops.core.dispatch import HAS_TRITON
from fastseg.ops.core.forms import Forms
from fastseg.ops.core.layout import like, memory_format_of
from fastseg.ops.core.norm import ACTIVATION_GRADS, ACTIVATIONS, PlainNorm, plain_norm_bwd, plain_stats, stats_dtype_of
from fastseg.ops.core.register import of_sizes, one_kernel, register

if HAS_TRITON:
    from fastseg.kernels.batch_norm.bwd import batch_norm_act_bwd_input, batch_norm_act_bwd_reduce
    from fastseg.kernels.batch_norm.fwd import batch_norm_act_fwd
    from fastseg.kernels.batch_norm.stats import batch_norm_stats
    from fastseg.kernels.common.norm_args import Norm


# --- with kernels


def _norm(mean, var, weight, bias, eps: float, batch: bool):
    affine = (None, None) if weight is None else (weight.contiguous(), bias.contiguous())
    return Norm(mean.contiguous(), var.contiguous(), *affine, eps, batch)


def _launch_stats(x):
    return batch_norm_stats(like(x, x))


def _launch_fwd(x, mean, var, weight, bias, residual, batch, eps, act):
    layout = memory_format_of(x)
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    affine = (None, None) if weight is None else (weight.contiguous(), bias.contiguous())
    norm = Norm(mean.contiguous(), var.contiguous(), *affine, eps, batch)
    return batch_norm_act_fwd(x.contiguous(memory_format=layout), norm, act, residual)


def _launch_bwd_reduce(dy, x, mean, var, weight, bias, y, eps, act, fixed):
    y = None if y is None else like(x, y)
    norm = _norm(mean, var, weight, bias, eps, not fixed)
    sums, g, dx = batch_norm_act_bwd_reduce(like(x, dy), like(x, x), norm, act, y, with_dz=fixed)
    return sums, x.new_empty(0) if g is None else g, x.new_empty(0) if dx is None else dx


def _launch_bwd_input(g, x, mean, var, weight, bias, sums, means, eps, act):
    pixels = max(x.numel() // x.shape[1], 1)
    norm = _norm(mean, var, weight, bias, eps, True)
    return batch_norm_act_bwd_input(like(x, g), like(x, x), norm, act, sums, 1.0 if means else 1 / pixels)


# --- in plain PyTorch


def _plain_fwd(x, mean, var, weight, bias, residual, batch, eps, act):
    y = PlainNorm("running", mean, var, weight, bias, eps, x)(like(x, x).to(stats_dtype_of(x)))
    y = y if residual is None else y + residual
    return like(x, ACTIVATIONS[act](y).to(x.dtype))


def _plain_bwd_reduce(dy, x, mean, var, weight, bias, y, eps, act, fixed):
    wide, norm = stats_dtype_of(x), PlainNorm("running", mean, var, weight, bias, eps, x)
    g, masked = like(x, dy).to(wide), x.new_empty(0)
    if y is not None:
        g, act = ACTIVATION_GRADS[act](g, y.to(wide)), "none"
        masked = like(x, g.to(x.dtype))
    dx, dweight, dbias = plain_norm_bwd(g, like(x, x).to(wide), norm, False, act)
    return torch.stack((dbias, dweight)), masked, like(x, dx.to(x.dtype)) if fixed else x.new_empty(0)


def _plain_bwd_input(g, x, mean, var, weight, bias, sums, means, eps, act):
    wide, norm = stats_dtype_of(x), PlainNorm("running", mean, var, weight, bias, eps, x)
    z = like(x, x).to(wide)
    dx, _, _ = plain_norm_bwd(like(x, g).to(wide), z, norm, False, act)
    column = lambda t: t.to(wide)[None, :, None, None]
    rstd = torch.rsqrt(column(var) + eps)
    scale = rstd if weight is None else rstd * column(weight)
    mean_g, mean_gz = sums if means else sums / max(x.numel() // x.shape[1], 1)
    return like(x, (dx - (column(mean_g) + (z - column(mean)) * rstd * column(mean_gz)) * scale).to(x.dtype))


# --- shapes, registration


def _map(x):
    return torch.empty_like(like(x, x))


def _fake_bwd_reduce(dy, x, mean, var, weight, bias, y, eps, act, fixed):
    none = lambda: x.new_empty(0)
    sums = x.new_empty((2, x.shape[1]), dtype=stats_dtype_of(x))
    return sums, none() if y is None else _map(x), _map(x) if fixed else none()


MOST_CHANNELS = 65535  # blocks lie along a grid axis of CUDA, one channel to a block


def _unsupported(
    shape: torch.Size, dtype: torch.dtype, residual: torch.dtype | None = None, grouped: bool = False
) -> str:
    """Why the kernels cannot take a map of this shape and dtype, or a residual of that dtype, or "".

    ``grouped``: among processes that share statistics; the map of one of them may be empty.
    """
    if residual is not None and residual != dtype:
        return f"a residual of {residual} beside x of {dtype}"
    if shape[1] > MOST_CHANNELS:
        return f"{shape[1]} channels > {MOST_CHANNELS}"
    return "empty input" if 0 in shape and not grouped else ""


def _sizes_fwd(x: Tensor, mean, var, weight, bias, residual: Tensor | None, *_) -> tuple:
    return x.shape, x.dtype, None if residual is None else residual.dtype, False


def _listed(launch: Callable, plain: Callable, backward: bool = True) -> Forms:
    return one_kernel("batch_norm_act", launch, plain, _unsupported, backward=backward)


FORMS = _listed(_launch_fwd, _plain_fwd, backward=False)
_first = lambda x, *_: (x.shape, x.dtype)
_second = lambda dy, x, *_: (x.shape, x.dtype)

_NORM = "Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias"
# Eager callers have asked FORMS before the statistics, and hold the map of the forward in its backward.
stats_op = register(
    "batch_norm_stats(Tensor x) -> Tensor", _launch_stats, plain_stats,
    lambda x: x.new_empty((3, x.shape[1]), dtype=stats_dtype_of(x)),
    forms=_listed(_launch_stats, plain_stats), request=of_sizes(_first), asked=True,
)  # fmt: skip
fwd_op = register(
    f"batch_norm_act({_NORM}, Tensor? residual, bool batch, float eps, str act) -> Tensor", _launch_fwd, _plain_fwd,
    lambda x, *_: _map(x),
    forms=FORMS, request=of_sizes(_sizes_fwd), asked=True,
)  # fmt: skip
bwd_reduce_op = register(
    f"batch_norm_act_bwd_reduce(Tensor dy, {_NORM}, Tensor? y, float eps, str act, bool fixed) "
    "-> (Tensor, Tensor, Tensor)", _launch_bwd_reduce, _plain_bwd_reduce, _fake_bwd_reduce,
    forms=_listed(_launch_bwd_reduce, _plain_bwd_reduce), request=of_sizes(_second), asked=True,
)  # fmt: skip
bwd_input_op = register(
    f"batch_norm_act_bwd_input(Tensor g, {_NORM}, Tensor sums, bool means, float eps, str act) -> Tensor",
    _launch_bwd_input, _plain_bwd_input, lambda g, x, *_: _map(x),
    forms=_listed(_launch_bwd_input, _plain_bwd_input), request=of_sizes(_second), asked=True,
)  # fmt: skip
