"""Batch norm and activations as arguments of fused ops: checks, running statistics, and plain-PyTorch forms."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg.ops.core.dispatch import followed

Activation = Literal["relu", "relu6", "leaky_relu"]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda v: v,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
}
ACTIVATION_GRADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # torch's own: each treats NaN in its own way
    "none": lambda g, v: g,
    "relu": lambda g, v: torch.ops.aten.threshold_backward(g, v, 0),
    "relu6": lambda g, v: torch.ops.aten.hardtanh_backward(g, v, 0, 6),
    "leaky_relu": lambda g, v: torch.ops.aten.leaky_relu_backward(g, v, 0.01, False),
}


def activate(v: Tensor, act: str | None, *, inplace: bool = False) -> Tensor:
    """Apply the activation named ``act``; ``inplace`` lets a ReLU or ReLU6 overwrite ``v``."""
    if inplace and act in ("relu", "relu6"):
        return F.relu_(v) if act == "relu" else F.relu6(v, inplace=True)
    return ACTIVATIONS[act or "none"](v)


def add_residual(y: Tensor, residual: Tensor | None) -> Tensor:
    """Add ``residual`` into ``y`` if dtypes allow it; no backward may need ``y``."""
    if residual is None:
        return y
    # vmap may have to widen the sum
    return y.add_(residual) if residual.dtype == y.dtype and not followed(y, residual) else y + residual


class BatchNormArgs(NamedTuple):
    """Tensors and options of one batch norm, in the order of ``torch.nn.functional.batch_norm``.

    With ``training``, the op normalises by the statistics of the batch and updates the running statistics in place if
    they are given. ``running_mean`` and ``running_var`` come together or not at all, and so do ``weight`` and ``bias``.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


def with_both(norm: BatchNormArgs) -> BatchNormArgs:
    """Replace a missing weight by ones, or a missing bias by zeros, if the other one is given."""
    if norm.weight is None and norm.bias is not None:
        return norm._replace(weight=torch.ones_like(norm.bias, requires_grad=False))
    if norm.weight is not None and norm.bias is None:
        return norm._replace(bias=torch.zeros_like(norm.weight, requires_grad=False))
    return norm


def check_norm(label: str, norm: BatchNormArgs | None, channels: int, x: Tensor, out: tuple[int, ...]) -> None:
    if norm is None:
        return
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(f"{label}: give running_mean and running_var both or neither")
    if norm.running_mean is None and not norm.training:
        raise ValueError(f"{label}: without running statistics, set training=True")
    for field, t in zip(norm._fields[:4], norm[:4], strict=True):
        if t is not None and (t.shape != (channels,) or t.device != x.device):
            raise ValueError(
                f"{label}.{field} is {tuple(t.shape)} on {t.device}; it must be ({channels},) on {x.device}"
            )
    if norm.training and out[0] * out[2] * out[3] == 1:
        raise ValueError(f"{label}: expected more than 1 value per channel when training, got an output of {out}")


def norm_tensors(norm: BatchNormArgs | None) -> tuple[Tensor | None, ...]:
    """As kernels take them: running statistics, None where the batch's are used; weight and bias, both or neither."""
    if norm is None:
        return (None, None, None, None)
    if (norm.weight is None) != (norm.bias is None):
        norm = with_both(norm)
    running = (None, None) if norm.training else (norm.running_mean, norm.running_var)
    return (*running, norm.weight, norm.bias)


def norm_options(norm: BatchNormArgs | None) -> tuple[str, float]:
    if norm is None:
        return "none", 0.0
    return "batch" if norm.training else "running", norm.eps


def update_running(norm: BatchNormArgs | None, stats: Tensor) -> None:
    """Update running statistics as torch does: with the unbiased variance, weighted by momentum."""
    if norm is None or not norm.training or norm.running_mean is None:
        return
    for buffer, batch in ((norm.running_mean, stats[0]), (norm.running_var, stats[2])):
        # .data: torch's batch norm does not count its update as a change that another graph's backward must notice
        buffer = buffer if followed() else buffer.data
        with torch.no_grad():
            buffer.lerp_(batch.to(buffer.dtype), norm.momentum)


def stats_dtype_of(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def torch_norm(v: Tensor, norm: BatchNormArgs | None) -> Tensor:
    if norm is None:
        return v
    mean, var, *affine, training, momentum, eps = norm
    # contiguous: on a CPU the channels_last backward of torch 2.13 reads a strided weight as if dense
    weight, bias = (None if t is None else t.contiguous() for t in affine)
    return F.batch_norm(v, mean, var, weight, bias, training, momentum, eps)


def plain_stats(v: Tensor) -> Tensor:
    """Mean, biased and unbiased variance of a batch, (3, C); zeros for an empty batch."""
    values = v.detach().to(stats_dtype_of(v))
    if values.numel() == 0:
        return values.new_zeros(3, v.shape[1])
    var, mean = torch.var_mean(values, (0, 2, 3), correction=0)
    return torch.stack((mean, var, torch.var(values, (0, 2, 3), correction=1)))


class PlainNorm:
    """``norm(v)`` with the batch or running statistics; keeps the batch statistics for the caller."""

    def __init__(self, kind: str, mean, var, weight, bias, eps: float, x: Tensor):
        self.kind, self.mean, self.var, self.weight, self.bias, self.eps = kind, mean, var, weight, bias, eps
        self.stats = x.new_empty(0, dtype=stats_dtype_of(x))

    def __call__(self, v: Tensor) -> Tensor:
        if self.kind == "none":
            return v
        wide = lambda t: (
            None if t is None else t.to(self.stats.dtype).contiguous()
        )  # torch wants statistics and affine parameters in one dtype
        affine = wide(self.weight), wide(self.bias)
        if self.kind == "batch":
            self.stats = plain_stats(v)
            return F.batch_norm(v, None, None, *affine, True, 0.0, self.eps)  # differentiable once decomposed
        return F.batch_norm(v, wide(self.mean), wide(self.var), *affine, False, 0.0, self.eps)


def plain_norm_bwd(dy: Tensor, v: Tensor, norm: PlainNorm, batch: bool, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at v, at weight and at bias, by the formula in the header of kernels/common/norm_act.py."""
    if norm.kind == "none":
        none = dy.new_empty(0)
        return (ACTIVATION_GRADS[act](dy, v) if act != "none" else dy), none, none
    column = lambda t: t.to(dy.dtype)[None, :, None, None]
    rstd = torch.rsqrt(column(norm.var) + norm.eps)
    vhat = (v - column(norm.mean)) * rstd
    weight = 1.0 if norm.weight is None else column(norm.weight)
    g = ACTIVATION_GRADS[act](dy, vhat * weight + (0.0 if norm.bias is None else column(norm.bias)))
    dbias, dweight = g.sum((0, 2, 3)), (g * vhat).sum((0, 2, 3))
    if batch:
        count = v.numel() // v.shape[1]
        g = g - column(dbias) / count - vhat * column(dweight) / count
    return g * weight * rstd, dweight, dbias
