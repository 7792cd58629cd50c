"""Batch norm, residual and activation in one pass; batch statistics of one process or of a process group."""

import torch
from torch import Tensor
from torch import distributed as dist

from fastseg.ops.core.autograd import derived, differentiable, refused
from fastseg.ops.core.dispatch import needs_grad, runs_kernel
from fastseg.ops.core.layout import like
from fastseg.ops.core.norm import (
    ACTIVATION_GRADS,
    ACTIVATIONS,
    Activation,
    BatchNormArgs,
    activate,
    add_residual,
    check_norm,
    stats_dtype_of,
    torch_norm,
    update_running,
    with_both,
)
from fastseg.ops.core.override import overridable
from fastseg.ops.core.recompute import remember
from fastseg.ops.core.register import DECOMPOSITIONS, qualified
from fastseg.ops.registered.batch_norm_act import FORMS, bwd_input_op, bwd_reduce_op, fwd_op, stats_op


@overridable
def batch_norm_act(
    x: Tensor,
    norm: BatchNormArgs,
    act: Activation | None = None,
    residual: Tensor | None = None,
    *,
    process_group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """Compute ``act(batch_norm(x) + residual)`` in one pass, with the batch norm of ``torch.nn.functional.batch_norm``.

    Training reads ``x`` once more, for the batch statistics. The backward saves ``x`` and per-channel vectors and
    recomputes the input of the activation; with a residual it saves the result, which the next convolution saves too.
    Without a residual, a ``fastseg.nn.ConvNormAct2d`` that follows saves no map of its own: its backward recomputes the
    result. Second derivatives, forward-mode AD, empty batches and a residual of another dtype run in plain PyTorch.
    With a ``process_group`` only first derivatives exist; differentiating the gradients raises.

    Args:
        x: (N, C, H, W), contiguous or channels_last; norm and statistics may be float32 for 16-bit ``x``.
        norm: tensors and options of the batch norm; weight, bias, or both may be None.
        act: None, "relu", "relu6" or "leaky_relu" (slope 0.01).
        residual: (N, C, H, W), added before the activation.
        process_group: the processes that share batch statistics, as in ``torch.nn.SyncBatchNorm``. Each of them calls
            this function; a batch may be empty. Training only. None means this process alone.

    Returns:
        (N, C, H, W), in the memory format of ``x``.

    Raises:
        ValueError: the activation is unknown; ``x`` is not 4-D; norm or residual does not fit ``x``; batch statistics
            would come from one value per channel.

    Reference: Ioffe and Szegedy, arXiv:1502.03167; the order of a residual block, He et al., arXiv:1512.03385.
    """
    if (norm.weight is None) != (norm.bias is None):
        norm = with_both(norm)
    _check(x, norm, act, residual, process_group)
    tensors = norm[:4]
    kind = None if residual is None else residual.dtype
    others = tensors if residual is None else (*tensors, residual)
    kernel = runs_kernel(FORMS, x, (x.shape, x.dtype, kind, process_group is not None), *others)
    if not kernel and process_group is None:
        return _in_place(x, norm, act, residual)
    mean, var, weight, bias = tensors
    kind, eps = "batch" if norm.training else "running", norm.eps
    group = None
    if kind == "batch":
        stats = (stats_op if kernel else DECOMPOSITIONS[stats_op.op])(x.detach())
        if process_group is not None:
            group = _Group(process_group, plain=not kernel)
            stats = group.merge(stats, x.numel() // x.shape[1])
        mean, var = stats[0], stats[1]
        update_running(norm, stats)
    args = (x, mean, var, weight, bias, residual, kind == "batch", eps, act or "none")
    if group is None and not (torch.is_grad_enabled() and needs_grad(x, weight, bias, residual)):
        return fwd_op(*args)
    y = _BatchNormAct.apply(*args, group)
    if not kernel or residual is not None:  # with a residual the result itself is saved
        return y
    if weight is not None:  # copies, because FSDP frees parameters between a forward and its backward
        weight, bias = torch.stack((weight.detach(), bias.detach())).unbind()
    vectors = (mean.detach(), var.detach(), weight, bias)
    return remember(y, (x,), lambda source: fwd_op(source, *vectors, *args[5:]))


def batch_norm_act_ref(
    x: Tensor, norm: BatchNormArgs, act: Activation | None = None, residual: Tensor | None = None
) -> Tensor:
    """``batch_norm_act`` in torch's own lines."""
    y = torch_norm(x, norm)
    return ACTIVATIONS[act or "none"](y if residual is None else y + residual)


def _in_place(x: Tensor, norm: BatchNormArgs, act: Activation | None, residual: Tensor | None) -> Tensor:
    """The same; residual and activation are applied in place, behind the norm.

    The backward saves ``x`` and the activated map. Saving ``x`` alone and recomputing the map makes forward and
    backward 4 % to 42 % slower on a CPU, and saves nothing if a convolution follows, because it saves that map anyway.
    """
    return activate(add_residual(torch_norm(x, norm), residual), act, inplace=True)


def _check(x, norm: BatchNormArgs, act, residual, process_group) -> None:
    name = "batch_norm_act"
    if act is not None and act not in ACTIVATIONS:
        raise ValueError(f'{name}: act is {act!r}; use None, "relu", "relu6" or "leaky_relu"')
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4D input (got {x.dim()}D input); x must be (N, C, H, W)")
    if process_group is not None and not norm.training:
        raise ValueError(f"{name}: process_group is given with fixed statistics; set norm.training=True")
    pixels = x.shape if process_group is None else (2, *x.shape[1:3], 1)  # each process may have one pixel
    check_norm(f"{name}: norm", norm, x.shape[1], x, pixels)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{name}: residual is {tuple(residual.shape)}, x is {tuple(x.shape)}; they must be equal")


class _Group:
    """Statistics over all processes of a group, and the means over all their pixels that the backward needs."""

    def __init__(self, process_group, plain: bool):
        self.process_group, self.plain = process_group, plain
        self.pixels = torch.empty(0, device="cpu")

    def merge(self, stats: Tensor, pixels: int) -> Tensor:
        """Merge this process's (3, C) statistics with those of the others by Chan's formula, in fp64."""
        C = stats.shape[1]
        mine = torch.cat(
            (stats[0].double(), stats[1].double() * pixels, stats.new_full((1,), pixels, dtype=torch.float64))
        )
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.process_group))]
        dist.all_gather(parts, mine, group=self.process_group)
        means, squares, counts = torch.stack(parts).split((C, C, 1), 1)
        self.pixels = counts.sum()
        mean = (counts * means).sum(0) / self.pixels
        m2 = (squares + counts * (means - mean) ** 2).sum(0)
        return torch.stack((mean, m2 / self.pixels, m2 / (self.pixels - 1))).to(stats.dtype)

    def means(self, sums: Tensor) -> Tensor:
        """Turn this process's (2, C) sums into means over the pixels of all processes."""
        total = sums.clone()
        dist.all_reduce(total, group=self.process_group)
        return total / self.pixels.to(total.dtype)


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *inputs, group = args
        y = _pick(fwd_op, group)(*inputs)
        _BatchNormAct.save(ctx, inputs, y)
        ctx.group = group
        return y

    @staticmethod
    def save(ctx, inputs, output) -> None:
        *tensors, residual, batch, eps, act = inputs
        from_y = residual is not None and act != "none"
        ctx.save_for_backward(*tensors, output if from_y else None)
        ctx.options, ctx.group = (batch, eps, act), None

    @staticmethod
    def gradients(ctx, saved, dy):
        x, *norm, y = saved
        (batch, eps, act), group = ctx.options, ctx.group
        need_x, _, _, need_weight, need_bias, need_residual, *_ = ctx.needs_input_grad
        dx, dweight, dbias, g = None, None, None, dy
        if need_x or need_weight or need_bias or (need_residual and y is not None):
            sums, masked, dx = _pick(bwd_reduce_op, group)(dy, x, *norm, y, eps, act, not batch)
            g, act = (dy, act) if y is None else (masked, "none")
            dtype = x.dtype if norm[2] is None else norm[2].dtype
            dweight, dbias = sums[1].to(dtype, copy=True), sums[0].to(dtype, copy=True)
            if batch and need_x:
                means = sums if group is None else group.means(sums)
                dx = _pick(bwd_input_op, group)(g, x, *norm, means, group is not None, eps, act)
        dx = like(x, dx) if need_x else None
        residual = g if need_residual else None
        return dx, None, None, dweight if need_weight else None, dbias if need_bias else None, residual, *[None] * 4

    @staticmethod
    def again(ctx, saved, dy):
        x, mean, var, weight, bias, y = saved
        (batch, eps, act), need = ctx.options, ctx.needs_input_grad
        if ctx.group is not None:
            with torch.no_grad():
                grads = _BatchNormAct.gradients(ctx, saved, dy)
            return refused("batch_norm_act", "with a process_group", grads, (x, weight, bias, dy))
        wide = stats_dtype_of(x)
        if y is not None:  # the side of its kinks that an activation is on has no derivative
            dy, act = ACTIVATION_GRADS[act](dy, y.detach()), "none"
        running = (None, None) if batch else (mean.to(wide), var.to(wide))

        def forward(x, *affine):
            norm = BatchNormArgs(*running, *(None if t is None else t.to(wide) for t in affine), batch, 0.0, eps)
            return activate(torch_norm(x.to(wide), norm), act).to(x.dtype)

        dx, dweight, dbias = derived(forward, (x, weight, bias), (need[0], need[3], need[4]), dy)
        return dx, None, None, dweight, dbias, dy if need[5] else None, *[None] * 4

    backward = staticmethod(differentiable(gradients, again))


def _pick(op, group: _Group | None):
    """The op, or its plain form inside ``fastseg.reference()``; only calls with a process group get here then."""
    return DECOMPOSITIONS[op.op] if group is not None and group.plain else op


torch.library.register_autograd(
    qualified("batch_norm_act"),
    lambda ctx, dy: _BatchNormAct.backward(ctx, dy)[:9],
    setup_context=_BatchNormAct.save,
)
