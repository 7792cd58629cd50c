"""Batch norm, activation and max pooling in one pass over the output of a convolution."""

import torch
from torch import Tensor

from fastseg.ops.core.autograd import derived, differentiable
from fastseg.ops.core.dispatch import HAS_TRITON, needs_grad, runs_kernel, transforms_active
from fastseg.ops.core.forms import Forms, KernelForm, OneKernel, Reference, Verdict
from fastseg.ops.core.layout import channels_last, like, new_map
from fastseg.ops.core.norm import (
    ACTIVATIONS,
    Activation,
    BatchNormArgs,
    PlainNorm,
    activate,
    check_norm,
    norm_options,
    norm_tensors,
    plain_norm_bwd,
    stats_dtype_of,
    torch_norm,
    update_running,
)
from fastseg.ops.core.override import overridable
from fastseg.ops.core.register import of_sizes, qualified, register
from fastseg.ops.max_pool import IndexFormat, Sizes, max_pool2d, max_pool_ref, pool_geometry
from fastseg.ops.pool_indices import PoolIndices, bits_of
from fastseg.ops.registered.pooling import Geometry, fake_index, plain_pick, plain_pool, plain_unpool
from fastseg.ops.registered.pooling import unsupported as pooling_unsupported

if HAS_TRITON:
    from fastseg.kernels.batch_norm.stats import batch_norm_stats
    from fastseg.kernels.common.norm_args import Norm
    from fastseg.kernels.pooling.max_pool import max_pool_fwd
    from fastseg.kernels.pooling.norm_max_pool_bwd import norm_max_pool_bwd


@overridable
def batch_norm_act_max_pool2d(
    x: Tensor,
    norm: BatchNormArgs | None,
    act: Activation | None = "relu",
    kernel_size: Sizes = 2,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    index_format: IndexFormat = "compact",
    inplace: bool = False,
) -> Tensor | tuple[Tensor, Tensor | PoolIndices]:
    """Compute ``max_pool2d(act(norm(x)), kernel_size, stride, padding, ...)``, the end of an encoder stage, as one op.

    The kernel reads ``x`` once and writes the pooled map and 2 to 8 bits per window; the normalised map is never
    stored. Training reads ``x`` once more, for the batch statistics. The backward saves ``x`` and the codes; plain
    modules save ``x``, the activated map and int64 indices. Overlapping windows in training and contiguous maps run as
    norm, activation and ``max_pool2d`` in turn. Second derivatives and forward-mode AD run in plain PyTorch.

    Args:
        x: (N, C, H, W); the one-pass kernel takes channels_last.
        norm: the batch norm; None if it was folded into the convolution.
        act: None, "relu", "relu6" or "leaky_relu".
        kernel_size: size of the windows, in pixels; this and the next five are as in ``max_pool2d``.
        stride: distance between windows, in pixels; None means ``kernel_size``.
        padding: on each side, in pixels.
        ceil_mode: True to keep a window that begins inside the map and ends outside.
        return_indices: True to return the indices of the maxima too.
        index_format: "compact" or "int64".
        inplace: True if ``x`` may be overwritten to save a map.

    Returns:
        The maxima, (N, C, OH, OW), and with ``return_indices`` a ``PoolIndices`` or int64 indices.

    Raises:
        ValueError: the activation is unknown, the norm does not fit ``x``, or ``max_pool2d`` raises it.
        RuntimeError: ``max_pool2d`` raises it.

    Reference: the encoder of SegNet, arXiv:1511.00561.
    """
    name = "batch_norm_act_max_pool2d"
    if act is not None and act not in ACTIVATIONS:
        raise ValueError(f'{name}: act is {act!r}; use None, "relu", "relu6" or "leaky_relu"')
    if x.dim() != 4:
        raise ValueError(f"{name}: x is {tuple(x.shape)}; it must be (N, C, H, W)")
    check_norm(f"{name}: norm", norm, x.shape[1], x, x.shape)
    stride = kernel_size if stride is None else stride
    geometry = pool_geometry(x.shape, kernel_size, stride, padding, 1, ceil_mode, 2)
    tensors = norm_tensors(norm)
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    last = not transforms_active() and x.is_contiguous(memory_format=torch.channels_last)  # vmap has no channels_last
    sizes = (geometry, x.shape, last, wants_grad, norm is not None)
    if not runs_kernel(FORMS, x, sizes, *tensors) or geometry is None:
        y = activate(torch_norm(x, norm), act, inplace=inplace or norm is not None)
        return max_pool2d(y, kernel_size, stride, padding, 1, ceil_mode, return_indices, index_format=index_format)
    compact = index_format == "compact"
    bits = (bits_of(geometry.kernel) if compact or not return_indices else 64) if return_indices or wants_grad else 0
    kind, eps = norm_options(norm)
    args = (x, *tensors, kind, eps, act or "none", *geometry, bits)
    y, index, stats = _NormPool.apply(*args) if needs_grad(x, *tensors) else pool_op(*args)
    update_running(norm, stats)
    if not return_indices:
        return y
    return y, PoolIndices(index, y.shape, *(tuple(v) for v in geometry.window), True) if compact else index


def batch_norm_act_max_pool2d_ref(
    x: Tensor,
    norm: BatchNormArgs | None,
    act: Activation | None = "relu",
    kernel_size: Sizes = 2,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    index_format: IndexFormat = "compact",
    inplace: bool = False,
) -> Tensor | tuple[Tensor, Tensor | PoolIndices]:
    """``batch_norm_act_max_pool2d`` in torch's own lines; ``x`` is not overwritten."""
    y, stride = ACTIVATIONS[act or "none"](torch_norm(x, norm)), kernel_size if stride is None else stride
    geometry = pool_geometry(y.shape, kernel_size, stride, padding, 1, ceil_mode, 2)
    return max_pool_ref(y, kernel_size, stride, padding, 1, ceil_mode, return_indices, index_format, geometry, 2)


# --- implementations


def _kernel_norm(x, mean, var, weight, bias, kind, eps):
    """The kernels' ``Norm``, and the batch statistics (3, C), empty if the running statistics are used."""
    vectors = [None if t is None else t.contiguous() for t in (mean, var, weight, bias)]
    stats = x.new_empty(0, dtype=stats_dtype_of(x))
    if kind == "none":
        return None, stats
    if kind == "batch":
        stats = batch_norm_stats(x)
        vectors[:2] = stats[0], stats[1]
    return Norm(*vectors, eps, kind == "batch"), stats


def _launch_fwd(x, mean, var, weight, bias, kind, eps, act, size, out, kernel, stride, padding, dilation, bits):
    g, x = Geometry.of(size, out, kernel, stride, padding, dilation), channels_last(x)
    norm, stats = _kernel_norm(x, mean, var, weight, bias, kind, eps)
    y, index = max_pool_fwd(x, g.pooling(*x.shape[:2], True), bits, norm, act)
    return y, index, stats


def _launch_bwd(
    dy, index, stats, x, mean, var, weight, bias, kind, eps, act, size, out, kernel, stride, padding, dilation, bits
):
    g, x = Geometry.of(size, out, kernel, stride, padding, dilation), channels_last(x)
    mean, var = (stats[0], stats[1]) if kind == "batch" else (mean.contiguous(), var.contiguous())
    affine = (None if t is None else t.contiguous() for t in (weight, bias))
    norm = Norm(mean, var, *affine, eps, kind == "batch")
    dx, sums = norm_max_pool_bwd(channels_last(dy), index, x, norm, act, g.pooling(*x.shape[:2], True), bits)
    dtype = x.dtype if weight is None else weight.dtype
    return dx, sums[1].to(dtype, copy=True), sums[0].to(dtype, copy=True)


def _plain_fwd(x, mean, var, weight, bias, kind, eps, act, *sizes):
    x = channels_last(x)
    norm = PlainNorm(kind, mean, var, weight, bias, eps, x)
    y, index = plain_pool(
        ACTIVATIONS[act](norm(x)).to(x.dtype), *sizes, last=True
    )  # with one channel, x is in both layouts
    return y, index, norm.stats


def _plain_bwd(dy, index, stats, x, mean, var, weight, bias, kind, eps, act, *sizes):
    wide = stats_dtype_of(x)
    norm = PlainNorm(kind, *((stats[0], stats[1]) if kind == "batch" else (mean, var)), weight, bias, eps, x)
    g = plain_unpool(channels_last(dy).to(wide), index, *sizes, True, True, False)
    dx, dweight, dbias = plain_norm_bwd(g, channels_last(x).to(wide), norm, kind == "batch", act)
    dtype = x.dtype if weight is None else weight.dtype
    return channels_last(dx.to(x.dtype)), dweight.to(dtype), dbias.to(dtype)


def _fake_fwd(x, mean, var, weight, bias, kind, eps, act, *sizes):
    x = channels_last(x)
    stats = x.new_empty((3, x.shape[1]) if kind == "batch" else 0, dtype=stats_dtype_of(x))
    return new_map(x, (*x.shape[:2], *sizes[1])), fake_index(x, True, *sizes), stats


def _fake_bwd(dy, index, stats, x, mean, var, weight, *_):
    dtype = x.dtype if weight is None else weight.dtype
    vector = lambda: x.new_empty(x.shape[1], dtype=dtype)
    return torch.empty_like(x, memory_format=torch.channels_last), vector(), vector()


NOT_LAST = "not channels_last: one after another"


class OnePass(KernelForm):
    """Norm, activation and pooling in one pass."""

    def cost(self, request: OneKernel) -> Verdict | None:
        last = request.sizes[2]
        return None if last else Verdict(False, None, NOT_LAST)


def _unsupported(geometry: Geometry | None, shape: torch.Size, last: bool, wants_grad: bool, norm: bool) -> str:
    """Why the kernels cannot compute the op, or its gradient if it is wanted, or ""."""
    if (why := pooling_unsupported(geometry, shape)) or geometry is None or not wants_grad:
        return why
    if norm and geometry.pooling(shape[0], shape[1], True).disjoint:
        return ""
    if not last:  # the reason that is named first
        return NOT_LAST
    return f"{'overlapping windows in training' if norm else 'nothing is saved without a norm'}: one after another"


def _sizes_of(x: Tensor, *args) -> tuple:
    """Of the registered op, whose caller has asked about layout and gradients."""
    return Geometry.of(*args[7:13]), x.shape, True, False, True


FORMS = Forms("batch_norm_act_max_pool2d", [OnePass(_launch_fwd, _unsupported), Reference(_plain_fwd)])
BACKWARD_FORMS = Forms(
    "batch_norm_act_max_pool2d", [OnePass(_launch_bwd, _unsupported), Reference(_plain_bwd)], backward=True
)

_NORM = "Tensor x, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, str kind, float eps, str act"
_SIZES = "SymInt[] size, SymInt[] out, int[] kernel, int[] stride, int[] padding, int[] dilation, int bits"
pool_op = register(
    f"batch_norm_act_max_pool({_NORM}, {_SIZES}) -> (Tensor, Tensor, Tensor)", _launch_fwd, _plain_fwd, _fake_fwd,
    forms=FORMS, request=of_sizes(_sizes_of), asked=True,
)  # fmt: skip
pool_bwd_op = register(
    f"batch_norm_act_max_pool_bwd(Tensor dy, Tensor index, Tensor stats, {_NORM}, {_SIZES}) "
    "-> (Tensor, Tensor, Tensor)", _launch_bwd, _plain_bwd, _fake_bwd,
    forms=BACKWARD_FORMS, request=of_sizes(lambda dy, index, stats, *args: _sizes_of(*args)), asked=True,
)  # fmt: skip


class _NormPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        y, index, stats = pool_op(*args)
        _NormPool.save(ctx, args, (y, index, stats))
        ctx.mark_non_differentiable(index, stats)
        return y, index, stats

    @staticmethod
    def save(ctx, inputs, output) -> None:
        ctx.save_for_backward(*output[1:], *inputs[:5])
        ctx.options = inputs[5:]

    @staticmethod
    def gradients(ctx, saved, dy, *_):
        index, stats, x, *tensors = saved
        dx, dweight, dbias = pool_bwd_op(dy, index, stats, x, *tensors, *ctx.options)
        need = ctx.needs_input_grad
        grads = (like(x, dx), None, None, dweight, dbias)
        return *(g if n else None for g, n in zip(grads, need, strict=False)), *(None for _ in ctx.options)

    @staticmethod
    def again(ctx, saved, dy, *_):
        index, _, x, mean, var, weight, bias = saved
        (kind, eps, act, *sizes), need = ctx.options, ctx.needs_input_grad
        wide = stats_dtype_of(x)

        def forward(x, weight, bias):
            y = ACTIVATIONS[act](PlainNorm(kind, mean, var, weight, bias, eps, x)(x.to(wide)))
            return plain_pick(y, index, *sizes, True).to(x.dtype)

        dx, dweight, dbias = derived(forward, (x, weight, bias), (need[0], need[3], need[4]), dy)
        return dx, None, None, dweight, dbias, *(None for _ in ctx.options)

    backward = staticmethod(differentiable(gradients, again))


torch.library.register_autograd(qualified("batch_norm_act_max_pool"), _NormPool.backward, setup_context=_NormPool.save)
