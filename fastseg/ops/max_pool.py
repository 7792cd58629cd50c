"""Max pooling over one, two or three spatial axes, with compact indices on request."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from fastseg.kernels.runtime.sizes import memoized_as_given
from fastseg.ops.core.autograd import run
from fastseg.ops.core.dispatch import is_torchs, runs_kernel
from fastseg.ops.core.sizes import whole
from fastseg.ops.core.torch_private import pool_with_index
from fastseg.ops.pool_indices import POOL, PoolIndices, bits_of, encode, is_last, pack, pool_in_windows
from fastseg.ops.registered.pooling import INT64, POOL_FORMS, Geometry, MaxPool, pool_op

IndexFormat = Literal["int64", "compact"]
Sizes = int | tuple[int, ...] | list[int]


def max_pool1d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    index_format: IndexFormat = "int64",
) -> Tensor | tuple[Tensor, Tensor | PoolIndices]:
    """As ``torch.nn.functional.max_pool1d``, for (N, C, L) or (C, L); see ``max_pool2d`` for ``index_format``."""
    return _max_pool(
        1, max_pool1d, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, index_format
    )


def max_pool2d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    index_format: IndexFormat = "int64",
) -> Tensor | tuple[Tensor, Tensor | PoolIndices]:
    """As ``torch.nn.functional.max_pool2d``, with the same values, indices, layouts and errors, and compact indices.

    Ties go to the first cell of a window. NaN wins; of several NaNs, the last. Padding is never chosen. First, second
    and forward-mode derivatives work. Without ``return_indices``, the backward saves codes of 2 to 8 bits per window.

    Args:
        input: (N, C, H, W) or (C, H, W), contiguous or channels_last.
        kernel_size: size of the windows, in pixels: one number, or one per axis, as for the next three.
        stride: distance between windows, in pixels; None means ``kernel_size``.
        padding: on each side, in pixels; at most half the dilated window.
        dilation: distance between neighbouring cells of a window, in pixels.
        ceil_mode: True to keep a window that begins inside the map and ends outside.
        return_indices: True to return the indices of the maxima too.
        index_format: "int64" for torch's flat indices, or "compact" for ``PoolIndices``: 2 bits for windows of up to 4
            cells, 4 up to 16, 8 up to 256; that is 1/32 to 1/8 of the bytes.

    Returns:
        The maxima (N, C, OH, OW) and, with ``return_indices``, their indices, both in the memory format of ``input``.

    Raises:
        RuntimeError: as torch's function.
        ValueError: ``index_format`` is neither of the two, or compact and the windows have more than 256 cells.

    Reference: ``torch.nn.functional.max_pool2d``; 2 bits a window: Badrinarayanan et al., SegNet, arXiv:1511.00561.
    """
    if index_format == "int64" and is_torchs(input) and not has_torch_function_unary(input):
        function = pool_with_index if return_indices else torch.max_pool2d
        try:
            return function(input, kernel_size, () if stride is None else stride, padding, dilation, ceil_mode)
        except TypeError:  # of sizes that are no plain numbers, numpy's among them
            pass
    return _max_pool(
        2, max_pool2d, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, index_format
    )


def max_pool3d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    index_format: IndexFormat = "int64",
) -> Tensor | tuple[Tensor, Tensor | PoolIndices]:
    """As ``torch.nn.functional.max_pool3d``, for (N, C, D, H, W) or (C, D, H, W); see also ``max_pool2d``."""
    return _max_pool(
        3, max_pool3d, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, index_format
    )


def _max_pool(dims, public, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, index_format):
    if has_torch_function_unary(input):
        return handle_torch_function(
            public, (input,), input, kernel_size, stride, padding, dilation, ceil_mode, return_indices,
            index_format=index_format,
        )  # fmt: skip
    name = public.__name__
    if index_format not in ("int64", "compact"):
        raise ValueError(f'{name}: index_format is {index_format!r}; use "int64" or "compact"')
    stride = kernel_size if stride is None or (type(stride) is list and not stride) else stride
    arguments = (kernel_size, stride, padding, dilation)
    if dims == 3 and index_format == "int64" and set(map(type, arguments)) == {int} and is_torchs(input):
        return POOL[dims](input, *arguments, ceil_mode, return_indices)
    geometry = pool_geometry(input.shape, *arguments, ceil_mode, dims)
    if not runs_kernel(POOL_FORMS, input, (geometry, input.shape), name=name) or geometry is None:
        return max_pool_ref(input, *arguments, ceil_mode, return_indices, index_format, geometry, dims)
    compact = return_indices and index_format == "compact"
    wants_grad = torch.is_grad_enabled() and input.requires_grad
    if return_indices:
        bits = bits_of(geometry.kernel) if compact else INT64
    else:
        bits = bits_of(geometry.kernel) if wants_grad else 0
    x = input if input.dim() == dims + 2 else input[None]
    y, index = run(MaxPool, pool_op, x, *geometry, bits)
    y = y if x is input else y[0]
    if not return_indices:
        return y
    if not compact:
        return y, index if x is input else index[0]
    return y, PoolIndices(index, y.shape, *(tuple(v) for v in geometry.window), is_last(x))


def max_pool_ref(
    input: Tensor, kernel_size, stride, padding, dilation, ceil_mode, return_indices, index_format, geometry, dims: int
) -> Tensor | tuple[Tensor, Tensor | PoolIndices]:
    """``max_pool1d``, ``2d`` and ``3d`` in plain PyTorch; without a ``geometry``, torch raises its own errors."""
    if dims == 1:
        input = input.resolve_neg()  # without gradients, torch's max_pool1d ignores the lazy negation
    if geometry is not None:
        kernel_size, stride, padding, dilation = geometry[2:]
    if geometry is None or not return_indices or index_format == "int64":
        return POOL[dims](input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    y, index = pool_in_windows(dims, input, kernel_size, stride, padding, dilation, ceil_mode)
    batched = index if input.dim() == dims + 2 else index[None]
    last = is_last(input) and input.dim() == dims + 2
    codes = pack(encode(batched, *geometry.window), bits_of(geometry.kernel), last)
    return y, PoolIndices(codes, y.shape, *(tuple(v) for v in geometry.window), last)


def spatial(value: Sizes, dims: int) -> tuple[int, ...] | None:
    """Expand ``value`` to one number per spatial axis; None if it is neither one number nor ``dims`` of them."""
    if type(value) is int:
        return (value,) * dims
    value = tuple(map(whole, value)) if isinstance(value, Iterable) else (whole(value),)
    if not all(isinstance(n, (int, torch.SymInt)) for n in value):
        return None
    return value * dims if len(value) == 1 else value if len(value) == dims else None


def _least(a: int, b: int) -> int:
    """The minimum, without a guard on symbolic sizes. Dynamo turns only ``min`` into ``sym_min`` (torch 2.11)."""
    if isinstance(a, Tensor):  # of a trace
        return torch.minimum(a, b)
    return min(a, b) if torch.compiler.is_dynamo_compiling() else torch.sym_min(a, b)


@memoized_as_given
def pool_geometry(
    shape: torch.Size, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, ceil_mode: bool, dims: int
) -> Geometry | None:
    """The sizes of a pooling of a map of this shape; None if torch must raise the error."""
    values = [spatial(v, dims) for v in (kernel_size, stride, padding, dilation)]
    size = tuple(shape[-dims:])
    if None in values or len(shape) not in (dims + 1, dims + 2) or 0 in shape[-dims - 1 :]:
        return None
    kernel, stride, padding, dilation = values
    out = []
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        reach = k if dims == 3 else d * (k - 1) + 1  # torch compares the padding with this
        if k < 1 or s < 1 or d < 1 or not 0 <= p <= reach // 2:
            return None
        span = n + 2 * p - d * (k - 1) - 1
        o = span // s + 1
        if ceil_mode:  # no window begins in the padding at the end
            o = _least((span + s - 1) // s + 1, (n + p - 1) // s + 1)
        if o < 1:
            return None
        out.append(o)
    return Geometry(size, tuple(out), kernel, stride, padding, dilation)
