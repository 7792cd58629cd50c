"""The registered ops behind ``upsample_loss_sums``, each with its implementations, and their autograd Function."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.ops.core.autograd import derived, differentiable
from fastseg.ops.core.dispatch import HAS_TRITON
from fastseg.ops.core.layout import like, memory_format_of, new_map
from fastseg.ops.core.loss_columns import SIGMOID, Column, Sums
from fastseg.ops.core.loss_full import at_full_size, slope_at_full_size
from fastseg.ops.core.register import one_launch, qualified, register
from fastseg.ops.core.torch_private import assert_async
from fastseg.ops.core.upsample import unsupported, upsampling

if HAS_TRITON:
    from fastseg.kernels.upsample.cross_entropy_bwd import OfSums, upsample_cross_entropy_bwd
    from fastseg.kernels.upsample.cross_entropy_fwd import upsample_cross_entropy_fwd, upsample_log_sum
    from fastseg.kernels.upsample.loss_sums import upsample_loss_inner, upsample_loss_sums
    from fastseg.kernels.upsample.loss_terms import CODES, COLUMNS
    from fastseg.kernels.upsample.sizes import Loss

NAME = "upsample_loss_sums"
NOTHING = -(2**62)  # a label that no target has: none is ignored
TENSORS = 3  # tensor fields of Call; the rest are options


class Call(NamedTuple):
    """The arguments of the registered ops, in the order of their schemas."""

    logits: Tensor
    target: Tensor
    pixel_weight: Tensor | None
    kinds: list[str]
    gammas: list[float]
    thresholds: list[float]
    activation: str
    ignore_index: int  # NOTHING: none
    align_corners: bool

    @property
    def sums(self) -> Sums:
        columns = tuple(Column(*column) for column in zip(self.kinds, self.gammas, self.thresholds, strict=True))
        ignore_index = None if self.ignore_index == NOTHING else self.ignore_index
        return Sums(columns, self.activation, ignore_index, self.align_corners)

    @property
    def sigmoid(self) -> bool:
        return self.activation == SIGMOID

    @property
    def spec(self) -> tuple[tuple[int, float, float], ...]:
        codes = (CODES[kind] for kind in self.kinds)
        return tuple(zip(codes, self.gammas, self.thresholds, strict=True))

    @property
    def stats(self) -> torch.dtype:
        return torch.float64 if self.logits.dtype == torch.float64 else torch.float32


def call_of(logits: Tensor, target: Tensor, pixel_weight: Tensor | None, sums: Sums) -> Call:
    kinds, gammas, thresholds = map(list, zip(*sums.columns, strict=True))
    ignore_index = NOTHING if sums.ignore_index is None else sums.ignore_index
    return Call(logits, target, pixel_weight, kinds, gammas, thresholds, sums.activation, ignore_index,
                sums.align_corners)  # fmt: skip


def not_taken(logits: Tensor, target: Tensor, sums: Sums) -> str:
    """Why no kernel takes these arguments, or ""."""
    why = unsupported(logits, *target.shape[-2:])
    if not why and not isinstance(target.shape[-1], torch.SymInt) and target[:1].numel() >= 2**31:
        why = "an image of 2^31 labels or more"
    return why


_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", str: "str", bool: "bool", list[str]: "str[]",
          list[float]: "float[]"}  # fmt: skip
_SCHEMA = ", ".join(f"{_TYPES[annotation]} {name}" for name, annotation in Call.__annotations__.items())


def _dense(a: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits whose neighbouring pixels are read together, labels as the kernels read them, and factors of pixels."""
    target = a.target.view(torch.uint8) if a.target.dtype == torch.bool else a.target
    weight = None if a.pixel_weight is None else a.pixel_weight.contiguous()
    return a.logits.contiguous(), target.contiguous(), weight


def launch_fwd(*args) -> tuple[Tensor, Tensor]:
    a = Call(*args)
    if a.target.numel() == 0:
        return a.logits.new_zeros((*a.logits.shape[:2], len(a.kinds)), dtype=torch.float64), _fake_fwd(*args)[1]
    x, target, weight = _dense(a)
    up = upsampling(x, *target.shape[-2:], (0.0, 0.0), a.align_corners)
    lse, spec = None, a.spec
    if not a.sigmoid and target.dim() == 4:
        lse = upsample_log_sum(x, up)
    elif not a.sigmoid:
        loss = Loss(a.ignore_index, 0.0)
        _, lse, found = upsample_cross_entropy_fwd(x, target, None, up, loss, losses=None, save_lse=True)
        if x.device.type == "cuda":
            assert_async(found[2] == 0, "upsample_loss: a target names no class and is not ignore_index")
    parts = [
        upsample_loss_sums(x, target, weight, lse, up, spec[k : k + COLUMNS], a.ignore_index)
        for k in range(0, len(spec), COLUMNS)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2), x.new_empty(0, dtype=a.stats) if lse is None else lse


def launch_bwd(slopes: Tensor, lse: Tensor, *args) -> Tensor:
    a = Call(*args)
    x, target, weight = _dense(a)
    up = upsampling(x, *target.shape[-2:], (0.0, 0.0), a.align_corners)
    layout = memory_format_of(a.logits)
    total = None
    for k in range(0, len(a.kinds), COLUMNS):
        spec, part = a.spec[k : k + COLUMNS], slopes[..., k : k + COLUMNS].to(a.stats).contiguous()
        inner = part
        if not a.sigmoid:
            inner = upsample_loss_inner(x, target, weight, lse, part, up, spec, a.ignore_index)
        dx = upsample_cross_entropy_bwd(
            inner, a.logits.contiguous(memory_format=layout), target, weight, lse, up, Loss(a.ignore_index, 0.0),
            OfSums(spec, part, a.sigmoid),
        )  # fmt: skip
        total = dx if total is None else total + dx
    return total


def _plain_fwd(*args) -> tuple[Tensor, Tensor]:
    a = Call(*args)
    sums = at_full_size(*a[:TENSORS], a.sums)
    lse = a.logits.new_empty(0 if a.sigmoid else (a.target.shape[0], *a.target.shape[-2:]), dtype=a.stats)
    return sums, lse.zero_()  # the plain backward needs none


def _plain_bwd(slopes: Tensor, lse: Tensor, *args) -> Tensor:
    a = Call(*args)
    return like(a.logits, slope_at_full_size(slopes, *a[:TENSORS], a.sums))


def _fake_fwd(*args) -> tuple[Tensor, Tensor]:
    a = Call(*args)
    shape = (0,) if a.sigmoid else (a.target.shape[0], *a.target.shape[-2:])
    sums = a.logits.new_empty((*a.logits.shape[:2], len(a.kinds)), dtype=torch.float64)
    return sums, a.logits.new_empty(shape, dtype=a.stats)


def _fake_bwd(slopes: Tensor, lse: Tensor, *args) -> Tensor:
    return new_map(Call(*args).logits, Call(*args).logits.shape)


def _refuses(*args) -> str:
    a = Call(*args)
    return not_taken(a.logits, a.target, a.sums)


fwd_op = register(
    f"{NAME}({_SCHEMA}) -> (Tensor, Tensor)", launch_fwd, _plain_fwd, _fake_fwd,
    **one_launch(NAME, launch_fwd, _plain_fwd, _refuses), asked=True,
)  # fmt: skip
bwd_op = register(
    f"{NAME}_bwd(Tensor slopes, Tensor lse, {_SCHEMA}) -> Tensor", launch_bwd, _plain_bwd, _fake_bwd,
    **one_launch(NAME, launch_bwd, _plain_bwd, lambda slopes, lse, *args: _refuses(*args)),
)  # fmt: skip


class UpsampleLossSums(torch.autograd.Function):
    """The forward op, with the backward op behind it; takes the fields of ``Call``."""

    @staticmethod
    def forward(ctx, *args):
        outputs = fwd_op(*args)
        UpsampleLossSums.save(ctx, args, outputs)
        ctx.mark_non_differentiable(outputs[1])
        return outputs

    @staticmethod
    def save(ctx, inputs, output) -> None:
        ctx.save_for_backward(output[1], *inputs[:TENSORS])
        ctx.options = inputs[TENSORS:]

    @staticmethod
    def gradients(ctx, saved, slopes: Tensor, *_):
        dx = bwd_op(slopes, *saved, *ctx.options) if ctx.needs_input_grad[0] else None
        return dx, *(None for _ in range(len(Call._fields) - 1))

    @staticmethod
    def again(ctx, saved, slopes: Tensor, *_):
        _, logits, *others = saved
        forward = lambda logits: at_full_size(logits, *others, Call(logits, *others, *ctx.options).sums)
        (dx,) = derived(forward, (logits,), ctx.needs_input_grad[:1], slopes)
        return dx, *(None for _ in range(len(Call._fields) - 1))

    backward = staticmethod(differentiable(gradients, again))


torch.library.register_autograd(qualified(NAME), UpsampleLossSums.backward, setup_context=UpsampleLossSums.save)
