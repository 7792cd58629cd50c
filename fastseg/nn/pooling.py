"""Max pooling with compact indices and deterministic max unpooling: drop-ins for torch's modules."""

from collections.abc import Callable

from torch import Tensor, nn

from fastseg.nn.leaf import leaf, recorded, stood_for
from fastseg.ops.core.explain import UNFUSED_DEPTH
from fastseg.ops.max_pool import IndexFormat, max_pool1d, max_pool2d, max_pool3d
from fastseg.ops.max_unpool import CheckIndices, max_unpool1d, max_unpool2d, max_unpool3d
from fastseg.ops.pool_indices import PoolIndices


class _MaxPool:
    """What the three poolings add to torch's modules."""

    pool: Callable

    def __init__(self, *args, index_format: IndexFormat = "int64", **kwargs):
        super().__init__(*args, **kwargs)
        if index_format not in ("int64", "compact"):
            raise ValueError(f'{type(self).__name__}: index_format is {index_format!r}; use "int64" or "compact"')
        self.index_format = index_format

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor | PoolIndices]:
        """The maxima, and with ``return_indices`` their indices."""
        # A `leaf`, written out: its call would be a tenth of what a small map takes.
        if type(input) is not Tensor and (found := recorded(self, (input,), {})) is not None:
            return found
        if UNFUSED_DEPTH[0] and (torchs := stood_for(self)) is not None:
            return torchs.forward(self, input)
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

    Compact indices take 2 bits for windows of up to 4 cells, 4 up to 16, 8 up to 256; torch's int64 takes 64.
    ``MaxUnpool2d`` takes either. See ``fastseg.ops.max_pool2d``.

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
    """What the three unpoolings add to torch's modules."""

    unpool: Callable

    def __init__(self, *args, check_indices: CheckIndices = "async", **kwargs):
        super().__init__(*args, **kwargs)
        if check_indices not in ("async", "sync"):
            raise ValueError(f'{type(self).__name__}: check_indices is {check_indices!r}; use "async" or "sync"')
        self.check_indices = check_indices

    @leaf
    def forward(self, input: Tensor, indices: Tensor | PoolIndices, output_size: list[int] | None = None) -> Tensor:
        """Write the values of the windows at their indices; zeros elsewhere."""
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
    """As ``torch.nn.MaxUnpool2d``; differences: deterministic, and takes compact indices.
        It works under ``torch.use_deterministic_algorithms(True)``. An index outside the output is never used as an
        address; ``check_indices="sync"`` raises for one at once, on a GPU too. See ``fastseg.ops.max_unpool2d``.

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
