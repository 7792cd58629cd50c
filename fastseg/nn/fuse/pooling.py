"""Run convolution, norm and activation with the pooling after or the unpooling before them."""

from torch import Tensor, nn

from fastseg.nn.fuse.children import Act, batch_norm_args
from fastseg.nn.fuse.conv_norm_act import can_fold, convolve, folded, run_conv, run_conv_norm_act
from fastseg.nn.fuse.norm import norm_group, watched_norm
from fastseg.nn.fuse.sequential import next_group, opened, run_layers
from fastseg.nn.fuse.watch import split_act, watched
from fastseg.nn.pooling import MaxPool2d, MaxUnpool2d
from fastseg.ops.batch_norm_act_max_pool import batch_norm_act_max_pool2d
from fastseg.ops.core.dispatch import followed, kernels_run
from fastseg.ops.core.recompute import remember
from fastseg.ops.max_unpool_conv import max_unpool_conv2d
from fastseg.ops.pool_indices import PoolIndices


def run_conv_norm_act_pool(
    x: Tensor, conv: nn.Module, norm: nn.Module, act: Act, pool: nn.Module
) -> tuple[Tensor, Tensor | PoolIndices]:
    """Compute ``pool(act(norm(conv(x))))`` with indices.
        Everything after the convolution is one op; in evaluation the norm is folded into the convolution. Modules that
        are watched or of another class are called one after another.

    Without kernels the indices are int64 whatever the pool says: torch's pooling returns them anyway, and codes would
    have to be computed from them.
    """
    name, module = split_act(act)
    known = not (module or watched(conv, nn.Conv2d) or watched_norm(norm) or watched(pool, MaxPool2d))
    # The fused op has neither dilation nor statistics of several processes.
    if not known or pool.dilation != 1 or not pool.return_indices or norm_group(norm) is not None:
        return pool(run_conv_norm_act(x, conv, norm, act))
    if can_fold(x, conv, norm):
        y, args = run_conv(x, conv, norm), None
    else:
        y, args = convolve(conv, x), batch_norm_args(norm)
    return batch_norm_act_max_pool2d(
        y, args, name, pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, True,
        index_format=pool.index_format if kernels_run(y) else "int64", inplace=True,
    )  # fmt: skip


def run_unpool(
    x: Tensor, indices: Tensor | PoolIndices, unpool: nn.Module, output_size: tuple[int, int], block: nn.Module
) -> Tensor:
    """Compute ``block(unpool(x, indices, output_size))`` for a ``Sequential`` that begins with a convolution."""
    layers = opened(block)
    conv, norm, act, stop = next_group(layers or ())
    if conv is None:
        return block(unpooled(x, indices, unpool, output_size))
    y = run_unpool_conv_norm_act(x, indices, unpool, output_size, conv, norm, act)
    return run_layers(y, layers[stop:])


def run_unpool_conv_norm_act(
    x: Tensor,
    indices: Tensor | PoolIndices,
    unpool: nn.Module,
    output_size: tuple[int, int],
    conv: nn.Module,
    norm: nn.Module | None,
    act: Act,
) -> Tensor:
    """``act(norm(conv(unpool(x, indices, output_size))))``; in evaluation the unpooled map need not be stored."""
    name, module = split_act(act)
    fold = norm is not None and not module and not watched(unpool, MaxUnpool2d) and can_fold(x, conv, norm)
    if not fold or unpool.padding != (0, 0) or not _keeps_size(conv):
        return run_conv_norm_act(unpooled(x, indices, unpool, output_size), conv, norm, act)
    weight, bias = folded(x, conv, norm)
    return max_unpool_conv2d(
        x, indices, weight, bias, name, kernel_size=unpool.kernel_size, stride=unpool.stride, output_size=output_size
    )


def _keeps_size(conv: nn.Conv2d) -> bool:
    """True for a square, odd kernel without stride, dilation or groups, whose zero padding keeps H and W."""
    K = conv.kernel_size[0]
    plain = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    return plain and conv.kernel_size == (K, K) and conv.padding == (K // 2, K // 2) and K % 2 == 1


def unpooled(x: Tensor, indices: Tensor | PoolIndices, unpool: nn.Module, size: tuple[int, int]) -> Tensor:
    """``unpool(x, indices, size)``; a convolution after it may keep ``x``, and the backward unpool again."""
    if isinstance(indices, PoolIndices) and not isinstance(unpool, MaxUnpool2d):
        indices = indices.to_torch()  # another module's unpooling takes torch's indices
    y = unpool(x, indices, size)
    if followed(y) or watched(unpool, MaxUnpool2d) or not (y.requires_grad and kernels_run(x)):
        return y
    return remember(y, (x,), lambda source: unpool(source, indices, size))
