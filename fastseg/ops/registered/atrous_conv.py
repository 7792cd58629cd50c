"""Convolutions of one map side by side, some of them dilated: the registered ops and their autograd Function.

``atrous_branches`` is the base of ``atrous_conv2d`` and of ASPP. Its gradients are two more ops: one at the input, and
one at all weights, a flat tensor of the weights one after the other, each in (COUT, K, K, C) order.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg.ops.core.autograd import derived, differentiable
from fastseg.ops.core.dispatch import HAS_TRITON, autocasts, no_kernel
from fastseg.ops.core.forms import Form, Forms, Reference, Verdict, forced_blocks, forcing
from fastseg.ops.core.layout import channels_last, like, memory_format_of
from fastseg.ops.core.norm import ACTIVATION_GRADS, ACTIVATIONS, Activation, activate, stats_dtype_of
from fastseg.ops.core.register import qualified, register

if HAS_TRITON:
    from fastseg.kernels.atrous_conv.bwd import atrous_conv_bwd_weight
    from fastseg.kernels.atrous_conv.cost import plan
    from fastseg.kernels.atrous_conv.fwd import atrous_conv_bwd_input, atrous_conv_fwd
    from fastseg.kernels.atrous_conv.regions import Branch
    from fastseg.kernels.runtime.tensors import tf32

NAME = "atrous_branches"
_KERNELS = {1, 3}
MOST_BRANCHES = 8  # pointers that the kernel chooses from


def atrous_branches_ref(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    dilations: Sequence[int],
    act: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``atrous_branches`` in plain PyTorch."""
    autocast = autocasts(x)  # torch casts the weights, and saves the casts
    cast = lambda t: t if t is None or autocast else t.to(x.dtype)
    maps = [
        F.conv2d(x, cast(w), cast(b), padding=d * (w.shape[-1] // 2), dilation=d)
        for w, b, d in zip(weights, biases or [None] * len(weights), dilations, strict=True)
    ]
    y = maps[0] if len(maps) == 1 else torch.cat(maps, 1)
    return activate(y if residual is None else y + residual, act, inplace=True)


class Request(NamedTuple):
    """What decides between the forms; of the gradients, which read dy, too."""

    shape: tuple[int, ...]  # of x; () in a graph, whose op asks when it runs
    dtype: torch.dtype
    COUT: int  # of a branch
    kernels: tuple[int, ...]
    dilations: tuple[int, ...]
    passes: int  # over the output, of activation and residual, that a library needs
    ieee: bool  # fp32 that is not rounded to tf32
    no_kernel: str  # why no kernel can run on such tensors, or what follows the call; or ""


def request_of(
    shape: Sequence[int], dtype: torch.dtype, COUT: int, kernels: Sequence[int], dilations: Sequence[int],
    passes: int = 0, why: str = "",
) -> Request:  # fmt: skip
    ieee = bool(shape) and not why and dtype == torch.float32 and not tf32(dtype)
    return Request(tuple(shape), dtype, COUT, tuple(kernels), tuple(dilations), passes, ieee, why)


def not_taken(kernels: Sequence[int]) -> str:
    """Why the kernel takes no branches of these sizes, or ""."""
    if not _KERNELS.issuperset(kernels):
        return f"kernel size {max(kernels)}: the kernel takes 1 and 3"
    return f"{len(kernels)} branches: the kernel takes {MOST_BRANCHES}" if len(kernels) > MOST_BRANCHES else ""


class KernelForm(Form):
    """Our kernel, which skips the taps that lie in the padding; ``run`` launches the forward or a gradient."""

    name = "kernel"

    def __init__(self, run: Callable):
        self.run = run

    def refuses(self, r: Request) -> str:
        if why := r.no_kernel or not_taken(r.kernels):
            return why
        if not r.shape:
            return ""
        N, C, H, W = r.shape
        if 0 in r.shape or not r.COUT:
            return "empty tensors"
        largest = H * W * max(C, r.COUT * len(r.kernels))
        if largest >= 2**31 or N * H * W >= 2**31 - 2**10:
            return (
                f"one image has {largest} elements, the batch {N * H * W} pixels; kernels address fewer than 2^31 of "
                "each"
            )
        return ""

    def cost(self, r: Request) -> Verdict | None:
        if not r.shape:
            return None
        branches = tuple(map(Branch, r.kernels, r.dilations))
        return plan(*r.shape, r.COUT, branches, r.dtype, r.passes, r.ieee)


def _forms(kernel: Callable, plain: Callable, *, backward: bool = False) -> Forms:
    aliases = () if backward else ("atrous_conv2d",)
    return Forms(NAME, [KernelForm(kernel), Reference(plain)], aliases=aliases, backward=backward)


# --- the registered ops


def settled(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """As the kernel reads them: dense, channels innermost, aligned (a slice of a larger buffer may not be)."""
    made = []
    for w in weights:
        w = w.to(dtype).contiguous(memory_format=torch.channels_last)
        made.append(w.clone() if w.data_ptr() % 16 else w)
    return made


def _request_fwd(x, weights, biases, residual, dilations, act) -> Request:
    passes, kernels = (act != "none") + (residual is not None), [w.shape[-1] for w in weights]
    return request_of(x.shape, x.dtype, weights[0].shape[0], kernels, dilations, passes, no_kernel(x))


def _kernel_fwd(x, weights, biases, residual, dilations, act) -> Tensor:
    residual = None if residual is None else channels_last(residual)
    biases = list(map(Tensor.contiguous, biases))
    return atrous_conv_fwd(channels_last(x), settled(weights, x.dtype), biases, residual, dilations, act)


def _plain_fwd(x, weights, biases, residual, dilations, act) -> Tensor:
    y = ACTIVATIONS[act](atrous_branches_ref(x, weights, biases, dilations, None, residual))  # out of place: exported
    return channels_last(y.to(x.dtype))


def _nhwc(x: Tensor, channels: int) -> Tensor:
    N, _, H, W = x.shape
    return x.new_empty(N, H, W, channels).permute(0, 3, 1, 2)


def _fake_fwd(x, weights, biases, residual, dilations, act) -> Tensor:
    return _nhwc(x, weights[0].shape[0] * len(weights))


def _launch_input(dy, weights, dilations) -> Tensor:
    (COUT, C), (N, _, H, W) = weights[0].shape[:2], dy.shape
    request = request_of((N, C, H, W), dy.dtype, COUT, [w.shape[-1] for w in weights], dilations)
    return INPUT_FORMS(request, dy, weights, dilations)


def _kernel_input(dy, weights, dilations) -> Tensor:
    return atrous_conv_bwd_input(channels_last(dy), settled(weights, dy.dtype), dilations)


def _plain_input(dy, weights, dilations) -> Tensor:
    wide, (N, _, H, W) = stats_dtype_of(dy), dy.shape
    shape, COUT = (N, weights[0].shape[1], H, W), weights[0].shape[0]
    dx = sum(
        torch.nn.grad.conv2d_input(shape, w.to(wide), g.to(wide), 1, d * (w.shape[-1] // 2), d)
        for w, g, d in zip(weights, dy.split(COUT, 1), dilations, strict=True)
    )
    return channels_last(dx.to(dy.dtype))


def _fake_input(dy, weights, dilations) -> Tensor:
    return _nhwc(dy, weights[0].shape[1])


def _plain_weight(dy, x, kernels, dilations) -> Tensor:
    wide, COUT = stats_dtype_of(x), dy.shape[1] // len(kernels)
    grads = [
        torch.nn.grad.conv2d_weight(x.to(wide), (COUT, x.shape[1], K, K), g.to(wide), 1, d * (K // 2), d)
        for K, g, d in zip(kernels, dy.split(COUT, 1), dilations, strict=True)
    ]
    return torch.cat([g.permute(0, 2, 3, 1).reshape(-1) for g in grads])


def _launch_weight(dy, x, kernels, dilations) -> Tensor:
    request = request_of(x.shape, x.dtype, dy.shape[1] // len(kernels), kernels, dilations)
    return WEIGHT_FORMS(request, dy, x, kernels, dilations)


def _kernel_weight(dy, x, kernels, dilations) -> Tensor:
    return atrous_conv_bwd_weight(channels_last(dy), channels_last(x), kernels, dilations)


def _fake_weight(dy, x, kernels, dilations) -> Tensor:
    COUT = dy.shape[1] // len(kernels)
    return x.new_empty(sum(COUT * x.shape[1] * K * K for K in kernels), dtype=stats_dtype_of(x))


FORMS = _forms(_kernel_fwd, _plain_fwd)
INPUT_FORMS = _forms(_kernel_input, _plain_input, backward=True)
WEIGHT_FORMS = _forms(_kernel_weight, _plain_weight, backward=True)

fwd_op = register(
    f"{NAME}(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? residual, int[] dilations, str act) -> Tensor",
    _kernel_fwd,
    _plain_fwd,
    _fake_fwd,
    forms=FORMS,
    request=_request_fwd,
    asked=True,
)
input_op = register(
    f"{NAME}_input(Tensor dy, Tensor[] weights, int[] dilations) -> Tensor", _launch_input, _plain_input, _fake_input
)
weight_op = register(
    f"{NAME}_weight(Tensor dy, Tensor x, int[] kernels, int[] dilations) -> Tensor",
    _launch_weight,
    _plain_weight,
    _fake_weight,
)


# --- autograd


def _save(ctx, inputs, output) -> None:
    x, weights, biases, _, dilations, act = inputs
    ctx.save_for_backward(x, output if act != "none" else None, *weights)
    ctx.dilations, ctx.act, ctx.bias_dtypes = list(dilations), act, [b.dtype for b in biases]
    ctx.forced = forced_blocks()


def _gradients(ctx, saved, dy: Tensor, wants_x: bool, wants_weights: bool, wants_biases: bool):
    """Gradients at x, at the weights, at the biases, at the residual; None where not needed."""
    x, y, *weights = saved
    dy = dy if ctx.act == "none" else ACTIVATION_GRADS[ctx.act](dy, y)  # y has the sign of its argument
    COUT, dx = weights[0].shape[0], None
    dweights, dbiases = [None] * len(weights), [None] * len(ctx.bias_dtypes)
    with forcing(ctx.forced):
        if wants_x:
            dx = like(x, input_op(dy, weights, ctx.dilations))
        if wants_weights:
            flat = weight_op(dy, x, [w.shape[-1] for w in weights], ctx.dilations)
    if wants_weights:
        parts = flat.split([w.numel() for w in weights])
        dweights = [_as_weight(part, w) for part, w in zip(parts, weights, strict=True)]
    if wants_biases:
        dbiases = _bias_gradients(ctx, dy, COUT)
    return dx, dweights, dbiases, dy


def _bias_gradients(ctx, dy: Tensor, COUT: int) -> list[Tensor]:
    sums = dy.sum((0, 2, 3), dtype=stats_dtype_of(dy)).split(COUT)
    return [s.to(dtype) for s, dtype in zip(sums, ctx.bias_dtypes, strict=True)]


def _again(ctx, saved, dy: Tensor, wants_x: bool, wants_weights: bool, wants_biases: bool):
    """As ``_gradients``, but differentiable."""
    x, y, *weights = saved
    dy = dy if ctx.act == "none" else ACTIVATION_GRADS[ctx.act](dy, y.detach())
    forward = lambda x, *weights: atrous_branches_ref(x, weights, None, ctx.dilations)
    dx, *dweights = derived(forward, (x, *weights), (wants_x, *[wants_weights] * len(weights)), dy)
    dbiases = _bias_gradients(ctx, dy, weights[0].shape[0]) if wants_biases else [None] * len(ctx.bias_dtypes)
    return dx, dweights, dbiases, dy


def _as_weight(flat: Tensor, w: Tensor) -> Tensor:
    COUT, C, K, _ = w.shape
    return flat.view(COUT, K, K, C).permute(0, 3, 1, 2).to(w.dtype).contiguous(memory_format=memory_format_of(w))


_both = differentiable(_gradients, _again)


def _registered_backward(ctx, dy: Tensor):
    x, weights, biases, residual, *_ = ctx.needs_input_grad
    dx, dweights, dbiases, dresidual = _both(ctx, dy, x, any(weights), any(biases))
    return dx, dweights, dbiases, dresidual if residual else None, None, None


torch.library.register_autograd(qualified(NAME), _registered_backward, setup_context=_save)


class AtrousBranches(torch.autograd.Function):
    """The registered op with its tensors one by one: eager's Function."""

    @staticmethod
    def forward(ctx, act: str, dilations: list[int], x: Tensor, residual: Tensor | None, *tensors: Tensor):
        weights, biases = list(tensors[: len(dilations)]), list(tensors[len(dilations) :])
        y = fwd_op(x, weights, biases, residual, dilations, act)
        _save(ctx, (x, weights, biases, residual, dilations, act), y)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, residual, *tensors = ctx.needs_input_grad[2:]
        count = len(ctx.dilations)
        dx, dweights, dbiases, dresidual = _both(ctx, dy, x, any(tensors[:count]), any(tensors[count:]))
        return None, None, dx, dresidual if residual else None, *dweights, *dbiases
