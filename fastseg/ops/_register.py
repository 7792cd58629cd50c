"""Registering ops with ``torch.library``, and the layout rules that launcher, plain implementation and fake share."""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastseg.ops._dispatch import HAS_TRITON, INTERPRETED, followed, has_tangent, needs_grad, transforms_active

NAMESPACE = "fastseg"
DECOMPOSITIONS: dict = {}  # registered op -> the same result in plain PyTorch; for export (`run_decompositions`)


def qualified(name: str) -> str:
    """``fastseg::name``; the one place that spells the namespace."""
    return f"{NAMESPACE}::{name}"


def register(schema: str, launch: Callable, plain: Callable, fake: Callable):
    """Define one op.

    Args:
        schema: ``name(Tensor x, ...) -> Tensor``.
        launch: settles the layout and launches; runs for CUDA and ROCm tensors, and for CPU tensors when interpreted.
        plain: the same in plain PyTorch; runs for CPU tensors, and where an exported program must hold no custom op.
        fake: shapes, dtypes and strides only.

    Returns:
        The op, to be called. ``.op`` is its default overload, ``.direct`` its implementation by type of device.
    """
    name = schema.partition("(")[0]
    torch.library.define(qualified(name), schema.removeprefix(name))
    direct = {"cuda": launch if HAS_TRITON else plain, "cpu": launch if INTERPRETED else plain}
    for device, implementation in direct.items():
        torch.library.impl(qualified(name), device.upper(), _refusing_tangents(name, implementation))
    torch.library.register_fake(qualified(name), fake)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    DECOMPOSITIONS[op] = plain

    @functools.wraps(launch)
    def call(*args):
        if torch.compiler.is_dynamo_compiling() or not _is_bare(args):
            return plain(*args) if _have_tangents(args) else op(*args)
        return direct[args[0].device.type](*args)

    call.op, call.direct = op, direct
    return call


def _have_tangents(args: Iterable) -> bool:
    flat = itertools.chain.from_iterable(a if isinstance(a, (list, tuple)) else (a,) for a in args)
    return has_tangent(*(a for a in flat if isinstance(a, Tensor)))


def _refusing_tangents(name: str, implementation: Callable) -> Callable:
    """What the dispatcher calls, as an exported program does: it drops tangents without a word."""

    @functools.wraps(implementation)
    def call(*args):
        if forward_ad._current_level >= 0 and _have_tangents(args):
            raise NotImplementedError(f"{qualified(name)} has no forward-mode derivative; fastseg's functions have one")
        return implementation(*args)

    return call


def _keys(*names: str) -> int:
    sets = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return functools.reduce(operator.or_, sets).raw_repr()


# What the dispatcher sees of an ordinary call, outside and inside inference mode: of the thread, and of a tensor.
_THREAD = {_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect")}
_TENSOR = {
    _keys(device, f"Autocast{device}", *more)
    for device in ("CPU", "CUDA")
    for more in ((), ("ADInplaceOrView", f"Autograd{device}"))
}


def _is_bare(args: Iterable) -> bool:
    """Whether the dispatcher would pass a call on to the implementation as it is, which takes it 4 to 10 us.

    It would not where something stands between them: a mode, a tracer, a function transform, forward-mode AD, a
    subclass, a view that is to be negated first, a profiler that asks for names; nor where a gradient is recorded.
    """
    if (
        torch._C._dispatch_tls_local_include_set().raw_repr() not in _THREAD
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    ):
        return False
    grad, keys_of = torch.is_grad_enabled(), torch._C._dispatch_keys
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            if (grad and arg.requires_grad) or keys_of(arg).raw_repr() not in _TENSOR:
                return False
        elif kind is list or kind is tuple:
            if arg and type(arg[0]) is not int and not _is_bare(arg):
                return False
        elif isinstance(arg, Tensor):
            return False
    return True


def run(function: type[torch.autograd.Function], op: Callable, *args):
    """A linear op of Functions: its Function where a gradient is recorded, its plain form where something follows."""
    may_be_followed = torch.is_grad_enabled() or transforms_active() or forward_ad._current_level >= 0
    if not may_be_followed or torch.compiler.is_compiling():
        return op(*args)
    tensors = [a for a in args if isinstance(a, Tensor)]
    if followed(*tensors):
        return DECOMPOSITIONS[op.op](*args)
    return function.apply(*args) if needs_grad(*tensors) else op(*args)


def differentiable(gradients: Callable, again: Callable) -> Callable:
    """A Function's backward whose result has right derivatives itself.

    Args:
        gradients: ``(ctx, saved, *grad_outputs) -> gradients``, by kernels, with no derivative of their own.
        again: the same in torch's own ops, where something follows: ``create_graph=True``, forward-mode AD, ``vmap``.

    Saved tensors are read here, once: a checkpoint gives each of them a single time.
    """

    def backward(ctx, *grad_outputs):
        saved = ctx.saved_tensors
        tensors = [t for t in grad_outputs if isinstance(t, Tensor)]
        batched = followed(*tensors) or any(map(_is_batched, tensors))
        if torch.is_grad_enabled() or (batched and not torch.compiler.is_compiling()):
            return again(ctx, saved, *grad_outputs)
        return gradients(ctx, saved, *grad_outputs)

    return backward


# Of ``torch.autograd.grad(..., is_grads_batched=True)``, whose vmap is another than that of ``torch.func``.
_is_batched: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda t: False)


def derived(function: Callable, tensors: Sequence[Tensor | None], wanted: Sequence[bool], *grad_outputs: Tensor):
    """Gradients of ``function(*tensors)``, which are functions of tensors and ``grad_outputs``; None if not ``wanted``.

    Args:
        function: of torch's own ops; gives as many tensors as there are ``grad_outputs``.
        tensors: what it is called with.
        wanted: of which of them a gradient is.
    """
    wanted = [want and t is not None for t, want in zip(tensors, wanted, strict=True)]
    with torch.enable_grad():  # aliases: one of the tensors may have been made of another
        aliases = [t.view_as(t) if want else t for t, want in zip(tensors, wanted, strict=True)]
        outputs = function(*aliases)
    asked = [t for t, want in zip(aliases, wanted, strict=True) if want]
    grads = iter(())
    if asked:
        grads = iter(torch.autograd.grad(outputs, asked, grad_outputs, create_graph=torch.is_grad_enabled()))
    return [next(grads) if want else None for want in wanted]


class _Refusal(torch.autograd.Function):
    """Gradients as they are, whose own derivative raises, at whichever of the op's inputs it is asked for."""

    @staticmethod
    def forward(ctx, name: str, why: str, count: int, *tensors: Tensor | None):
        ctx.message = f"{name}: {why} its gradients are first order; a second derivative was asked for"
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.message)


def refused(name: str, why: str, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> tuple:
    """``grads``, of an op's ``inputs``: to differentiate them raises."""
    return _Refusal.apply(name, why, len(grads), *grads, *inputs)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_OUTWARDS = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The format that torch's own kernels answer ``x`` with: channels_last(_3d) where the strides say so, dense or not.

    Strides tell the two apart at one pixel and at one channel, where a map is dense in both: it stays what it was.
    Contiguous for what is neither 4-D nor 5-D.
    """
    last = _CHANNELS_LAST.get(x.dim())
    if last is None or transforms_active():  # vmap knows no other format
        return torch.contiguous_format
    shape, strides = x.shape, x.stride()
    channel = strides[1]
    if channel == 0:
        return torch.contiguous_format
    least = 0  # strides ascend from the channels outwards, in a slice of a channels_last map too
    for d in _OUTWARDS[len(shape)]:
        size, stride = shape[d], strides[d]
        if size == 0 or stride < least or (d == 0 and least == channel):
            return torch.contiguous_format
        least = stride * size
    return last


def channels_last(t: Tensor) -> Tensor:
    """(N, C, H, W), dense with the channels innermost: the only copy a kernel's input goes through, if any."""
    return t if transforms_active() else t.contiguous(memory_format=torch.channels_last)


def like(x: Tensor, y: Tensor) -> Tensor:
    """``y`` in the memory format of ``x``: what comes out is laid out as what went in."""
    return y.contiguous(memory_format=memory_format_of(x))


def settle(x: Tensor) -> tuple[Tensor, bool]:
    """``x`` dense in its memory format, copied only where it is not, and whether that is channels_last."""
    layout = memory_format_of(x)
    return x.contiguous(memory_format=layout), layout == torch.channels_last


def new_map(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised (N, C, H, W) tensor in the dtype and memory format of ``x``."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
