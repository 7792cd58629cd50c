"""The registered ops behind ``upsample_cross_entropy``, each with its implementations, and their autograd Function."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.autograd import derived, differentiable
from fastseg.ops.core.dispatch import HAS_TRITON
from fastseg.ops.core.labels import check_targets
from fastseg.ops.core.layout import like, memory_format_of, new_map
from fastseg.ops.core.register import one_launch, qualified, register
from fastseg.ops.core.torch_private import assert_async
from fastseg.ops.core.upsample import cross_entropy, interpolate, unsupported, upsampling

if HAS_TRITON:
    from fastseg.kernels.upsample.cross_entropy import upsample_cross_entropy_bwd, upsample_cross_entropy_fwd
    from fastseg.kernels.upsample.sizes import Loss

LOG2E = 1.4426950408889634
TENSORS = 3  # tensor fields of Call; the rest are options


class Call(NamedTuple):
    """The arguments of the registered ops, in the order of their schemas."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    align_corners: bool
    wide: bool  # the loss is fp32 for all logits, because autocast asks for it
    save_lse: bool

    @property
    def sums(self) -> torch.dtype:
        return torch.float64 if self.logits.dtype == torch.float64 else torch.float32

    @property
    def out(self) -> torch.dtype:
        return self.sums if self.wide else self.logits.dtype


_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", str: "str", float: "float", bool: "bool"}
_SCHEMA = ", ".join(f"{_TYPES[annotation]} {name}" for name, annotation in Call.__annotations__.items())


def per_weight(dloss: Tensor, total: Tensor, reduction: str) -> Tensor:
    """Gradient of each pixel's loss, for a mean that divides by ``total``; NaN if that is 0, as in torch.

    Ignored pixels must not be multiplied by it: where all are ignored, the gradient is 0.
    """
    return torch.where(total == 0, torch.nan, dloss.to(total.dtype) / total) if reduction == "mean" else dloss


def _mean(sum_: Tensor, total: Tensor, a: Call) -> Tensor:
    """The mean. With smoothing torch adds two means, the first of which is 0 / 0 for weights of 0."""
    mean = sum_ / total
    return torch.where(total == 0, torch.nan, mean) if a.label_smoothing > 0 else mean


# --- with kernels


def launch_fwd(*args) -> tuple[Tensor, Tensor, Tensor]:
    a = Call(*args)
    x, target = a.logits.contiguous(), a.target.contiguous()  # neighbouring pixels are read together
    weight = None if a.weight is None else a.weight.contiguous()
    none = a.reduction == "none"
    up = upsampling(x, *target.shape[1:], (0.0, 0.0), a.align_corners)
    losses, lse, sums = upsample_cross_entropy_fwd(
        x, target, weight, up, Loss(a.ignore_index, a.label_smoothing),
        losses=torch.empty(target.shape, dtype=a.out, device=x.device) if none else None, save_lse=a.save_lse,
    )  # fmt: skip
    if x.device.type == "cuda":
        assert_async(sums[2] == 0, "upsample_cross_entropy: a target names no class and is not ignore_index")
    elif x.device.type == "cpu" and sums[2] > 0:
        check_targets(target, x.shape[1], a.ignore_index)
    loss = losses if none else (_mean(sums[0], sums[1], a) if a.reduction == "mean" else sums[0]).to(a.out, copy=True)
    return loss, x.new_empty(0, dtype=a.sums) if lse is None else lse, sums[1].clone()


def launch_bwd(dloss: Tensor, lse: Tensor, total: Tensor, *args) -> Tensor:
    a = Call(*args)
    x = a.logits.contiguous(memory_format=memory_format_of(a.logits))
    dy = per_weight(dloss, total, a.reduction).contiguous()
    weight = None if a.weight is None else a.weight.contiguous()
    up = upsampling(x, *a.target.shape[1:], (0.0, 0.0), a.align_corners)
    loss = Loss(a.ignore_index, a.label_smoothing)
    return upsample_cross_entropy_bwd(dy, x, a.target.contiguous(), weight, lse, up, loss)


# --- in plain PyTorch: traceable, at full resolution


def _pixel_factors(a: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return targets, mask of counting pixels, weights (both 0 if ignored), and smoothing per class (1, C, 1, 1)."""
    target = a.target.long()
    counts = target != a.ignore_index
    target = target.where(counts, 0)
    C = a.logits.shape[1]
    ones = torch.ones((C,), dtype=a.sums, device=a.logits.device)
    classes = ones if a.weight is None else a.weight.to(a.sums)
    weight = classes[target].where(counts, 0)
    return target, counts, weight, (classes * (a.label_smoothing / C))[None, :, None, None]


def _plain_fwd(*args) -> tuple[Tensor, Tensor, Tensor]:
    a = Call(*args)
    target, counts, weight, spread = _pixel_factors(a)
    v = interpolate(a.logits.to(a.sums), *target.shape[1:], (0.0, 0.0), a.align_corners)
    log_p = F.log_softmax(v, 1)
    loss = (1 - a.label_smoothing) * weight * -log_p.gather(1, target[:, None])[:, 0]
    if a.label_smoothing > 0:
        loss = loss - (log_p * spread).sum(1)
    loss = loss.where(counts, 0)
    total = weight.sum()
    lse = a.logits.new_empty(0, dtype=a.sums)
    if a.save_lse:
        lse = torch.logsumexp(v, 1) * LOG2E
    if a.reduction != "none":
        loss = _mean(loss.sum(), total, a) if a.reduction == "mean" else loss.sum()
    return loss.to(a.out, memory_format=torch.contiguous_format), lse.contiguous(), total


def _plain_bwd(dloss: Tensor, lse: Tensor, total: Tensor, *args) -> Tensor:
    a = Call(*args)
    target, counts, weight, spread = _pixel_factors(a)
    v = interpolate(a.logits.to(a.sums), *target.shape[1:], (0.0, 0.0), a.align_corners)
    named = ((1 - a.label_smoothing) * weight)[:, None]
    p = torch.exp(v - (lse / LOG2E)[:, None])
    g = (named + spread.sum()) * p - spread - torch.zeros_like(p).scatter(1, target[:, None], named)
    dy = per_weight(dloss, total, a.reduction).to(a.sums)
    g = torch.where(counts[:, None], g * (dy[:, None] if dy.dim() else dy), 0 * p)
    back = torch.ops.aten.upsample_bilinear2d_backward
    dx = back(g, g.shape[2:], a.logits.shape, a.align_corners, None, None)
    return like(a.logits, dx.to(a.logits.dtype))


# --- shapes, registration, autograd


def _fake_fwd(*args) -> tuple[Tensor, Tensor, Tensor]:
    a = Call(*args)
    new = lambda shape, dtype: a.logits.new_empty(shape, dtype=dtype)
    loss = new(a.target.shape if a.reduction == "none" else (), a.out)
    return loss, new(a.target.shape if a.save_lse else 0, a.sums), new((), a.sums)


def _fake_bwd(dloss: Tensor, lse: Tensor, total: Tensor, *args) -> Tensor:
    return new_map(Call(*args).logits, Call(*args).logits.shape)


def _refuses(*args) -> str:
    a = Call(*args)
    return unsupported(a.logits, *a.target.shape[1:])


fwd_op = register(
    f"upsample_cross_entropy({_SCHEMA}) -> (Tensor, Tensor, Tensor)", launch_fwd, _plain_fwd, _fake_fwd,
    **one_launch("upsample_cross_entropy", launch_fwd, _plain_fwd, _refuses), asked=True,
)  # fmt: skip
bwd_op = register(
    f"upsample_cross_entropy_bwd(Tensor dloss, Tensor lse, Tensor total, {_SCHEMA}) -> Tensor",
    launch_bwd, _plain_bwd, _fake_bwd,
    **one_launch("upsample_cross_entropy", launch_bwd, _plain_bwd, lambda dloss, lse, total, *args: _refuses(*args)),
)  # fmt: skip


class UpsampleCrossEntropy(torch.autograd.Function):
    """The forward op, with the backward op behind it; takes the fields of ``Call``."""

    @staticmethod
    def forward(ctx, *args):
        outputs = fwd_op(*args)
        UpsampleCrossEntropy.save(ctx, args, outputs)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def save(ctx, inputs, output) -> None:
        ctx.save_for_backward(*output[1:], *inputs[:TENSORS])
        ctx.options = inputs[TENSORS:]

    @staticmethod
    def gradients(ctx, saved, dloss: Tensor, *_):
        dx = bwd_op(dloss, *saved, *ctx.options) if ctx.needs_input_grad[0] else None
        return dx, *(None for _ in range(len(Call._fields) - 1))

    @staticmethod
    def again(ctx, saved, dloss: Tensor, *_):
        _, _, logits, *others = saved

        def forward(logits):
            a = Call(logits, *others, *ctx.options)
            return cross_entropy(a.logits.to(a.sums), *a[1:7]).to(a.out)

        (dx,) = derived(forward, (logits,), ctx.needs_input_grad[:1], dloss)
        return dx, *(None for _ in range(len(Call._fields) - 1))

    backward = staticmethod(differentiable(gradients, again))


torch.library.register_autograd(
    qualified("upsample_cross_entropy"),
    UpsampleCrossEntropy.backward,
    setup_context=UpsampleCrossEntropy.save,
)
