"""Max pooling with small indices, and max unpooling that is deterministic: drop-ins for torch's modules."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastseg.nn.conv import Act, batch_norm_args
from fastseg.nn.fold import can_fold, convolve, folded, run_conv, run_conv_norm_act
from fastseg.nn.leaf import leaf
from fastseg.nn.norm import norm_group, watched_norm
from fastseg.nn.sequential import next_group, opened, run_layers
from fastseg.nn.watch import split_act, watched
from fastseg.ops._dispatch import kernels_run
from fastseg.ops._recompute import remember
from fastseg.ops.batch_norm_act_max_pool import batch_norm_act_max_pool2d
from fastseg.ops.max_pool import IndexFormat, max_pool1d, max_pool2d, max_pool3d
from fastseg.ops.max_unpool import CheckIndices, max_unpool1d, max_unpool2d, max_unpool3d
from fastseg.ops.max_unpool_conv import max_unpool_conv2d
from fastseg.ops.pool_indices import PoolIndices


class _MaxPool:
    """What the three poolings add to torch's."""

    pool: Callable

    def __init__(self, *args, index_format: IndexFormat = "int64", **kwargs):
        super().__init__(*args, **kwargs)
        if index_format not in ("int64", "compact"):
            raise ValueError(f'{type(self).__name__}: index_format is {index_format!r}; use "int64" or "compact"')
        self.index_format = index_format

    @leaf
    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor | PoolIndices]:
        """The maxima, and with ``return_indices`` their indices."""
        return self.pool(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices,
            index_format=self.index_format,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + (", index_format='compact'" if self.index_format == "compact" else "")


class MaxPool1d(_MaxPool, nn.MaxPool1d):
    """As ``torch.nn.MaxPool1d``; difference: ``index_format``, as in ``MaxPool2d``.

    Example:
        >>> MaxPool1d(2)(torch.randn(2, 3, 9)).shape
        torch.Size([2, 3, 4])
    """

    pool = staticmethod(max_pool1d)


class MaxPool2d(_MaxPool, nn.MaxPool2d):
    """As ``torch.nn.MaxPool2d``; difference: ``index_format="compact"`` returns a ``fastseg.ops.PoolIndices``.

    That is 2 bits a window of up to 4 cells, 4 up to 16, 8 up to 256, where torch's int64 takes 64. ``MaxUnpool2d``
    takes either. See ``fastseg.ops.max_pool2d``.

    Example:
        >>> pool = MaxPool2d(2, return_indices=True, index_format="compact")
        >>> values, indices = pool(torch.randn(2, 64, 32, 32).to(memory_format=torch.channels_last))
        >>> indices.nbytes, indices.to_torch().nbytes
        (8192, 262144)
    """

    pool = staticmethod(max_pool2d)


class MaxPool3d(_MaxPool, nn.MaxPool3d):
    """As ``torch.nn.MaxPool3d``; difference: ``index_format``, as in ``MaxPool2d``.

    Example:
        >>> MaxPool3d(2)(torch.randn(2, 3, 4, 6, 8)).shape
        torch.Size([2, 3, 2, 3, 4])
    """

    pool = staticmethod(max_pool3d)


class _MaxUnpool:
    """What the three unpoolings add to torch's."""

    unpool: Callable

    def __init__(self, *args, check_indices: CheckIndices = "async", **kwargs):
        super().__init__(*args, **kwargs)
        if check_indices not in ("async", "sync"):
            raise ValueError(f'{type(self).__name__}: check_indices is {check_indices!r}; use "async" or "sync"')
        self.check_indices = check_indices

    @leaf
    def forward(self, input: Tensor, indices: Tensor | PoolIndices, output_size: list[int] | None = None) -> Tensor:
        """Values of windows to where the indices say; zeros elsewhere."""
        return self.unpool(
            input, indices, self.kernel_size, self.stride, self.padding, output_size, check_indices=self.check_indices
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (", check_indices='sync'" if self.check_indices == "sync" else "")


class MaxUnpool1d(_MaxUnpool, nn.MaxUnpool1d):
    """As ``torch.nn.MaxUnpool1d``; differences: those of ``MaxUnpool2d``.

    Example:
        >>> values, indices = MaxPool1d(2, return_indices=True)(torch.randn(2, 3, 8))
        >>> MaxUnpool1d(2)(values, indices).shape
        torch.Size([2, 3, 8])
    """

    unpool = staticmethod(max_unpool1d)


class MaxUnpool2d(_MaxUnpool, nn.MaxUnpool2d):
    """As ``torch.nn.MaxUnpool2d``; differences: deterministic, also with ``torch.use_deterministic_algorithms(True)``;
    takes compact indices; never follows an index that is outside; ``check_indices="sync"`` raises for one at once, on a
    GPU too. See ``fastseg.ops.max_unpool2d``.

    Example:
        >>> values, indices = MaxPool2d(2, return_indices=True)(torch.randn(2, 3, 8, 8))
        >>> MaxUnpool2d(2)(values, indices).shape
        torch.Size([2, 3, 8, 8])
    """

    unpool = staticmethod(max_unpool2d)


class MaxUnpool3d(_MaxUnpool, nn.MaxUnpool3d):
    """As ``torch.nn.MaxUnpool3d``; differences: those of ``MaxUnpool2d``.

    Example:
        >>> values, indices = MaxPool3d(2, return_indices=True)(torch.randn(2, 3, 4, 4, 4))
        >>> MaxUnpool3d(2)(values, indices).shape
        torch.Size([2, 3, 4, 4, 4])
    """

    unpool = staticmethod(max_unpool3d)


def run_conv_norm_act_pool(
    x: Tensor, conv: nn.Module, norm: nn.Module, act: Act, pool: nn.Module
) -> tuple[Tensor, Tensor | PoolIndices]:
    """``pool(act(norm(conv(x))))`` with indices: what follows the convolution is one op, and in evaluation the norm is
    folded into it. Modules that somebody watches, and other kinds, are called one after another.

    Where no kernel runs the indices are int64 whatever the pool says: torch's pooling makes them for nothing, and codes
    would have to be made of them.
    """
    name, module = split_act(act)
    known = not (module or watched(conv, nn.Conv2d) or watched_norm(norm) or watched(pool, MaxPool2d))
    # The op with the pool knows no dilation, and the statistics of one process.
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
    """``block(unpool(x, indices, output_size))``, of a ``Sequential`` that begins with a convolution."""
    layers = opened(block)
    conv, norm, act, stop = next_group(layers or ())
    if conv is None:
        return block(_remembered(x, indices, unpool, output_size))
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
    """``act(norm(conv(unpool(x, indices, output_size))))``; in evaluation the unpooled map may stay unwritten."""
    name, module = split_act(act)
    fold = norm is not None and not module and not watched(unpool, MaxUnpool2d) and can_fold(x, conv, norm)
    if not fold or unpool.padding != (0, 0) or not _keeps_size(conv):
        return run_conv_norm_act(_remembered(x, indices, unpool, output_size), conv, norm, act)
    weight, bias = folded(x, conv, norm)
    return max_unpool_conv2d(
        x, indices, weight, bias, name, kernel_size=unpool.kernel_size, stride=unpool.stride, output_size=output_size
    )


def _keeps_size(conv: nn.Conv2d) -> bool:
    """Whether it is square, odd and without stride, dilation or groups, with the zeros around that keep H and W."""
    K = conv.kernel_size[0]
    plain = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    return plain and conv.kernel_size == (K, K) and conv.padding == (K // 2, K // 2) and K % 2 == 1


def _remembered(x: Tensor, indices: Tensor | PoolIndices, unpool: nn.Module, size: tuple[int, int]) -> Tensor:
    """``unpool(x, indices, size)``; the convolution after it keeps ``x``, and the backward unpools again."""
    if isinstance(indices, PoolIndices) and not isinstance(unpool, MaxUnpool2d):
        indices = indices.to_torch()  # another module's unpooling knows torch's
    y = unpool(x, indices, size)
    if torch.compiler.is_compiling() or watched(unpool, MaxUnpool2d) or not (y.requires_grad and kernels_run(x)):
        return y
    return remember(y, (x,), lambda source: unpool(source, indices, size))
