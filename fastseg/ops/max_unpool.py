"""Max unpooling over one, two or three spatial axes, from int64 or compact indices."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from fastseg.ops.core.dispatch import followed, is_torchs, needs_grad, runs_kernel, what_follows
from fastseg.ops.core.layout import like
from fastseg.ops.core.sizes import whole
from fastseg.ops.core.torch_private import deterministic, unpool3d_to, unpool_to
from fastseg.ops.max_pool import Sizes, spatial
from fastseg.ops.pool_indices import UNPOOL, PoolIndices
from fastseg.ops.registered.pooling import INT64, UNPOOL_FORMS, Geometry, spread_ref, unpool

CheckIndices = Literal["async", "sync"]


def max_unpool1d(
    input: Tensor,
    indices: Tensor | PoolIndices,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    output_size: Sequence[int] | None = None,
    *,
    check_indices: CheckIndices = "async",
) -> Tensor:
    """As ``torch.nn.functional.max_unpool1d``, for (N, C, L) or (C, L); see ``max_unpool2d``."""
    return _max_unpool(1, max_unpool1d, input, indices, kernel_size, stride, padding, output_size, check_indices)


def max_unpool2d(
    input: Tensor,
    indices: Tensor | PoolIndices,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    output_size: Sequence[int] | None = None,
    *,
    check_indices: CheckIndices = "async",
) -> Tensor:
    """As ``torch.nn.functional.max_unpool2d``, but deterministic, and memory-safe for any index.

    The window that owns an output element writes it, once. There is no memset and no atomic, and
    ``torch.use_deterministic_algorithms(True)`` has nothing to forbid. If several windows name one cell, the last in
    memory order wins, and the gradient flows to each of them. First, second and forward-mode derivatives work.

    An int64 index outside the output is an error, and is never used as an address, in the forward or the backward. On a
    CPU torch's error is raised. On a GPU the kernel records the index and a device-side assertion reads the record: as
    in torch, the error appears at the next synchronisation and the host does not wait. ``check_indices="sync"`` waits
    and raises here, names the index, and leaves the CUDA context usable: use it for untrusted data and for debugging.

    Args:
        input: values of the windows, (N, C, h, w) or (C, h, w); floating point, contiguous or channels_last.
        indices: int64, flat in the output's plane, of the shape of ``input``; or the ``PoolIndices`` of the pooling.
        kernel_size: size of the pooling's windows, in pixels: one number, or one per axis, as for the next two.
        stride: distance between windows, in pixels; None means ``kernel_size``.
        padding: of the pooling, in pixels.
        output_size: (H, W) or (N, C, H, W), in pixels; None means (h - 1) stride - 2 padding + kernel_size. It may
            differ from that by less than a stride.
        check_indices: "async" or "sync", as above.

    Returns:
        (N, C, H, W): the values at their indices, zeros elsewhere; in the memory format of ``input``.

    Raises:
        RuntimeError: an index is outside the output, indices have another dtype or shape, or a plane is empty.
        ValueError: ``output_size`` is out of range, or ``check_indices`` is neither of the two.
        NotImplementedError: ``input`` is not floating point.

    Reference: ``torch.nn.functional.max_unpool2d``; Zeiler and Fergus, arXiv:1311.2901.
    """
    return _max_unpool(2, max_unpool2d, input, indices, kernel_size, stride, padding, output_size, check_indices)


def max_unpool3d(
    input: Tensor,
    indices: Tensor | PoolIndices,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    output_size: Sequence[int] | None = None,
    *,
    check_indices: CheckIndices = "async",
) -> Tensor:
    """As ``torch.nn.functional.max_unpool3d``, for (N, C, d, h, w) or (C, d, h, w); see ``max_unpool2d``."""
    return _max_unpool(3, max_unpool3d, input, indices, kernel_size, stride, padding, output_size, check_indices)


def _max_unpool(dims, public, input, indices, kernel_size, stride, padding, output_size, check_indices) -> Tensor:
    if has_torch_function_unary(input):
        return handle_torch_function(
            public, (input,), input, indices, kernel_size, stride, padding, output_size, check_indices=check_indices
        )
    plain = dims > 1 and type(indices) is Tensor and is_torchs(input) and not followed(input)
    if plain and check_indices in ("async", "sync"):
        sizes = (kernel_size, kernel_size if stride is None else stride, padding)
        size = _plain_size(dims, input, *sizes, output_size)
        if size is not None and not deterministic():
            if dims == 2:
                return unpool_to(input, indices, size)
            if input.is_contiguous() and indices.is_contiguous():  # torch's keeps no other layout
                return unpool3d_to(input, indices, size, *(v if type(v) is tuple else (v,) * 3 for v in sizes[1:]))
    name = public.__name__
    if check_indices not in ("async", "sync"):
        raise ValueError(f'{name}: check_indices is {check_indices!r}; use "async" or "sync"')
    sizes = [spatial(v, dims) for v in (kernel_size, kernel_size if stride is None else stride, padding)]
    if not _is_window(sizes, (kernel_size, stride, padding)):  # torch raises the error
        index = indices.to_torch() if isinstance(indices, PoolIndices) else indices
        return UNPOOL[dims](input, index, kernel_size, stride, padding, output_size)
    kernel, stride, padding = sizes
    size = None if output_size is None or len(output_size) == 0 else [whole(n) for n in output_size]
    size = _output_size(input, kernel, stride, padding, size)
    _check(input, indices, name, dims)
    if isinstance(indices, PoolIndices):
        indices.check()
    batched = input.dim() == dims + 2
    v = input if batched else input[None]
    geometry = Geometry.of(size, v.shape[2:], kernel, stride, padding, (1,) * dims)
    if isinstance(indices, PoolIndices):
        if indices.codes.numel() and [list(s) for s in indices_window(indices)] == [list(s) for s in geometry.window]:
            index, bits, last = indices.codes, indices.bits, indices.channels_last
        else:  # codes belong to another plane; torch reads flat indices of one plane in another, and so does this
            index, bits, last = indices.to_torch(), INT64, False
    else:
        index, bits, last = indices, INT64, False
    if bits == INT64:
        index = index if index.dim() == dims + 2 else index[None]
    if not runs_kernel(UNPOOL_FORMS, input, (geometry, v.shape), index, name=name):
        if bits != INT64:
            index = indices.to_torch()
            index = index if index.dim() == dims + 2 else index[None]
        y = max_unpool_ref(v, index, geometry, bits != INT64, check_indices == "sync")
    else:
        y = unpool(v, index, geometry, bits, last, add=False, sync=check_indices == "sync")
    return y if batched else y[0]


def _plain_size(dims: int, input: Tensor, kernel, stride, padding, output_size) -> tuple[int, ...] | None:
    """The output's size, of whole (N, C, *windows) in floating point and sizes as they should be; None: look closer."""
    shape = input.shape
    if len(shape) != dims + 2 or 0 in shape or not input.is_floating_point():
        return None
    sizes: list[tuple] = []
    for value in (kernel, stride, padding):
        sizes.append(value if type(value) is tuple else (value,) * dims)
        if len(sizes[-1]) != dims or set(map(type, sizes[-1])) != {int}:
            return None
    k, s, p = sizes
    full = tuple([(n - 1) * s[d] + k[d] - 2 * p[d] for d, n in enumerate(shape[2:])])
    if min(*k, *s, *full) < 1 or min(p) < 0:
        return None
    if output_size is None:
        return full
    if type(output_size) not in (tuple, list, torch.Size) or len(output_size) not in (dims, dims + 2):
        return None
    size = tuple(output_size[-dims:])
    near = all(type(n) is int and n > 0 and abs(n - m) < t for n, m, t in zip(size, full, s, strict=True))
    return size if near else None


def _is_window(sizes: list[tuple[int, ...] | None], given: tuple) -> bool:
    """True if kernel, stride and padding have one number per axis, each within its range."""
    if None in sizes or any(isinstance(v, (tuple, list)) and len(v) != len(sizes[0]) for v in given):
        return False
    kernel, stride, padding = sizes
    return min(kernel) >= 1 and min(stride) >= 1 and min(padding) >= 0


def _output_size(input: Tensor, kernel, stride, padding, output_size: list[int] | None) -> list[int]:
    """The output's spatial size, refused as torch refuses one.

    A graph takes the size unchecked: a check would become a guard, which symbolic sizes cannot always prove.
    """
    dims = len(kernel)
    windows = input.shape[-dims:]
    default = [(n - 1) * s + k - 2 * p for n, k, s, p in zip(windows, kernel, stride, padding, strict=True)]
    if followed():
        return default if output_size is None else output_size[-dims:]
    size = default
    if output_size is not None:
        if len(output_size) not in (dims, dims + 2):
            raise ValueError(
                f"output_size should be a sequence containing {dims} or {dims + 2} elements, but it has a length of "
                f"'{len(output_size)}'"
            )
        size = list(output_size[-dims:])
        for d, (n, middle, s) in enumerate(zip(size, default, stride, strict=True)):
            if not middle - s < n < middle + s:
                raise ValueError(
                    f'invalid output_size "{size}" (dim {d} must be between {middle - s} and {middle + s})'
                )
    for d, n in enumerate(size):
        if n < 0:
            raise ValueError(
                f"max_unpooling: output_size must contain non-negative spatial dimensions, but got output_size[{d}]={n}"
            )
    return size


def indices_window(indices: PoolIndices) -> tuple[tuple[int, ...], ...]:
    """The geometry that the codes belong to, in the order of ``Geometry.window``."""
    return indices.input_size, indices.kernel_size, indices.stride, indices.padding, indices.dilation


def max_unpool_ref(v: Tensor, index: Tensor, geometry: Geometry, trusted: bool, sync: bool = False) -> Tensor:
    """``max_unpool1d``, ``2d`` and ``3d`` in plain PyTorch: torch's own functions, or a scatter where these cannot run.

    Args:
        v: (N, C, *windows).
        index: int64, of the same shape.
        geometry: sizes of the pooling; ``size`` is that of the output.
        trusted: True if the index was decoded from codes; its -1, for codes that name no cell, is then dropped.
        sync: as ``check_indices``.
    """
    dims = len(geometry.size)
    cpu = v.device.type == "cpu" and not followed()
    dropped = trusted and not (cpu and index.numel() > 0 and bool(index.min() >= 0))
    # Traces and transforms: torch's own function looks at sizes and values, and supports neither vmap nor ONNX.
    composed = dropped or bool(what_follows())
    if torch.are_deterministic_algorithms_enabled() or composed or (sync and v.device.type != "cpu"):
        checked = not trusted and 0 not in geometry.size  # into an empty plane torch looks at no index
        return spread_ref(v, index, geometry.size, add=False, checked=checked, sync=sync)
    if needs_grad(v):
        index = index.contiguous()  # torch's backward knows no other layout with ``is_grads_batched=True``
    return like(v, UNPOOL[dims](v, index, geometry.kernel, geometry.stride, geometry.padding, geometry.size))


def _check(input: Tensor, indices: Tensor | PoolIndices, name: str, dims: int) -> None:
    """Raise torch's errors in torch's words; its own functions cannot be called in deterministic mode."""
    if input.dim() not in (dims + 1, dims + 2):
        raise RuntimeError(
            f"Input to max_unpooling{dims}d should be a {dims + 1}d or {dims + 2}d Tensor, but got a tensor with "
            f"{input.dim()} dimensions."
        )
    if not input.is_floating_point():
        raise NotImplementedError(f"\"{name}\" not implemented for '{str(input.dtype).removeprefix('torch.')}'")
    if isinstance(indices, Tensor) and indices.dtype != torch.int64:
        raise RuntimeError(f"elements in indices should be type int64 but got: {indices.dtype}")
    if input.shape != indices.shape:
        raise RuntimeError(
            f"Expected shape of indices to be same as that of the input tensor ({list(input.shape)}) but got indices "
            f"tensor with shape: {list(indices.shape)}"
        )
    for axis in range(input.dim() - dims - 1, input.dim()):
        if input.shape[axis] == 0:
            raise RuntimeError(
                f"{name}: Expected input to have non-zero size for non-batch dimensions, but got {list(input.shape)} "
                f"with dimension {axis} being empty."
            )
