"""Helpers for autograd Functions."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastseg.ops.core.dispatch import needs_grad, what_follows
from fastseg.ops.core.register import DECOMPOSITIONS
from fastseg.ops.core.torch_private import forward_ad_level, is_batched, is_tracing, transforms_active


def run(function: type[torch.autograd.Function], op: Callable, *args):
    """A linear op of Functions: its Function where a gradient is recorded, its plain form where something follows."""
    if torch.compiler.is_dynamo_compiling():  # first: it follows none of the next questions
        return op(*args)
    if not (torch.is_grad_enabled() or transforms_active() or forward_ad_level() >= 0 or is_tracing()):
        return op(*args)
    tensors = [a for a in args if isinstance(a, Tensor)]
    if what_follows(*tensors):
        return DECOMPOSITIONS[op.op](*args)
    return function.apply(*args) if needs_grad(*tensors) else op(*args)


def differentiable(gradients: Callable, again: Callable) -> Callable:
    """Make the backward of a Function differentiable.

    Args:
        gradients: ``(ctx, saved, *grad_outputs) -> gradients``, computed by kernels; not differentiable.
        again: the same in torch's own ops, for ``create_graph=True``, forward-mode AD and ``vmap``.

    Saved tensors are read here, once, because activation checkpointing hands out each of them a single time.
    """

    def backward(ctx, *grad_outputs):
        saved = ctx.saved_tensors
        tensors = [t for t in grad_outputs if isinstance(t, Tensor)]
        if torch.is_grad_enabled() or what_follows(*tensors) or any(map(is_batched, tensors)):
            return again(ctx, saved, *grad_outputs)
        return gradients(ctx, saved, *grad_outputs)

    return backward


def derived(function: Callable, tensors: Sequence[Tensor | None], wanted: Sequence[bool], *grad_outputs: Tensor):
    """Gradients of ``function(*tensors)``, differentiable in tensors and ``grad_outputs``; None where not ``wanted``.

    Args:
        function: made of torch's own ops; returns as many tensors as there are ``grad_outputs``.
        tensors: its arguments.
        wanted: one flag per tensor: True to compute its gradient.
    """
    wanted = [want and t is not None for t, want in zip(tensors, wanted, strict=True)]
    with torch.enable_grad():  # aliases: one tensor may have been computed from another
        aliases = [t.view_as(t) if want else t for t, want in zip(tensors, wanted, strict=True)]
        outputs = function(*aliases)
    asked = [t for t, want in zip(aliases, wanted, strict=True) if want]
    grads = iter(())
    if asked:
        grads = iter(torch.autograd.grad(outputs, asked, grad_outputs, create_graph=torch.is_grad_enabled()))
    return [next(grads) if want else None for want in wanted]


class _Refusal(torch.autograd.Function):
    """Pass gradients through; differentiating them, towards any input of the op, raises."""

    @staticmethod
    def forward(ctx, name: str, why: str, count: int, *tensors: Tensor | None):
        ctx.message = f"{name}: {why} its gradients are first order; a second derivative was asked for"
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.message)


def refused(name: str, why: str, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> tuple:
    """Make ``grads`` of an op with these ``inputs`` raise when they are differentiated."""
    return _Refusal.apply(name, why, len(grads), *grads, *inputs)
