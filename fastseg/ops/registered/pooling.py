"""The registered ops behind max pooling and unpooling, and the autograd Functions over them.

    max_pool         (N, C, *size) -> the windows' maxima, and their index
    max_unpool       values of windows, their index -> (N, C, *size): "spread"
    max_unpool_bwd   (N, C, *size), index of windows -> values of windows: "pick"

for one to three spatial axes. ``bits`` is the kind of index: 64 for torch's int64, in the shape of the windows; 2, 4 or
8 for rows of packed codes; 0 for none. Each op is linear in its values or, given the index, in its gradient: the
gradient of pooling is a spread that adds, that of a spread is a pick, and that of a pick is again a spread that adds.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.kernels.runtime.sizes import layout_of, memoized
from fastseg.ops.core.autograd import run
from fastseg.ops.core.dispatch import HAS_TRITON, followed, what_follows
from fastseg.ops.core.layout import memory_format_of, new_map
from fastseg.ops.core.register import of_sizes, one_kernel, qualified, register
from fastseg.ops.core.torch_private import assert_async
from fastseg.ops.pool_indices import POOL, PoolIndices, encode, is_last, pack, pool_in_windows

if HAS_TRITON:
    from fastseg.kernels.pooling.max_pool import max_pool_fwd
    from fastseg.kernels.pooling.max_unpool import max_unpool_bwd, max_unpool_fwd
    from fastseg.kernels.pooling.windows import Pooling

INT64 = 64


class Geometry(NamedTuple):
    """Sizes of one pooling, one number per spatial axis; these are the arguments that the ops share."""

    size: tuple[int, ...]  # of the larger map
    out: tuple[int, ...]  # windows
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, *sizes: Sequence[int]) -> "Geometry":
        """Make one from the lists or tuples that a registered op receives."""
        return cls(*map(tuple, sizes))

    @property
    def window(self) -> tuple[tuple[int, ...], ...]:
        """The arguments of ``encode`` and ``decode``."""
        return self.size, self.kernel, self.stride, self.padding, self.dilation

    def pooling(self, N: int, C: int, channels_last: bool) -> "Pooling":
        """The sizes as the kernels take them, in three dimensions."""
        return _lifted(N, C, channels_last, *self)


@memoized
def _lifted(N: int, C: int, channels_last: bool, *sizes: tuple[int, ...]) -> "Pooling":
    dims = len(sizes[0])
    ones, zeros = (1,) * (3 - dims), (0,) * (3 - dims)
    fills = (ones, ones, ones, ones, zeros, ones)
    return Pooling(N, C, *(fill + v for fill, v in zip(fills, sizes, strict=True)), channels_last, dims)


# --- with kernels


def _launch_pool(x, size, out, kernel, stride, padding, dilation, bits):
    layout, shape = memory_format_of(x), x.shape
    sizes = map(tuple, (size, out, kernel, stride, padding, dilation))
    pool = _lifted(shape[0], shape[1], layout != torch.contiguous_format, *sizes)
    return max_pool_fwd(x.contiguous(memory_format=layout), pool, bits)


def _launch_unpool(v, index, size, out, kernel, stride, padding, dilation, bits, last, add, sync):
    g = Geometry.of(size, out, kernel, stride, padding, dilation)
    last = is_last(v) if bits == INT64 else last
    fmt = layout_of(last, len(size))
    index = index.contiguous(memory_format=fmt) if bits == INT64 else index.contiguous()
    pool = g.pooling(*v.shape[:2], last)
    y, valid = max_unpool_fwd(v.contiguous(memory_format=fmt), index, pool, bits, add=add)
    if valid is not None:
        _check_indices(valid, index, size, sync)
    return y.contiguous(memory_format=memory_format_of(v))


def _launch_pick(dy, index, size, out, kernel, stride, padding, dilation, bits, last):
    g = Geometry.of(size, out, kernel, stride, padding, dilation)
    last = is_last(dy) if bits == INT64 else last
    fmt = layout_of(last, len(size))
    index = index.contiguous(memory_format=fmt) if bits == INT64 else index.contiguous()
    dx = max_unpool_bwd(dy.contiguous(memory_format=fmt), index, g.pooling(*dy.shape[:2], last), bits)
    return dx.contiguous(memory_format=memory_format_of(dy))


def _check_indices(valid: Tensor, index: Tensor, size: list[int], sync: bool) -> None:
    """Raise if an index is outside the plane: at once on a CPU or with ``sync``, else when the device gets to it.

    The host does not wait for a GPU: as in torch, an assertion on the device tests what the kernel recorded.
    """
    if what_follows():  # values cannot be read
        return
    if followed() or (not sync and valid.device.type != "cpu"):
        assert_async(valid, "max_unpool: an index is outside its output volume")
    elif not valid.item():
        raise RuntimeError(invalid_index(index, size))


def invalid_index(index: Tensor, size: list[int]) -> str:
    """torch's message, with the first index outside the output."""
    wrong = index[(index < 0) | (index >= math.prod(size))]
    return f"Found an invalid max index: {wrong[0].item()} (output volumes are of size {_by(size)})"


def _by(size: list[int]) -> str:
    return "x".join(map(str, size if len(size) > 1 else [*size, 1]))


# --- in plain PyTorch


def plain_pool(x, size, out, kernel, stride, padding, dilation, bits, last=None):
    """Plain pooling; ``last`` is the packing of the codes, None for that of ``x``."""
    ceil = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    index_of = POOL[len(size)] if bits == INT64 else partial(pool_in_windows, len(size))
    y, index = index_of(x, kernel, stride, padding, dilation, ceil != list(out), return_indices=True)
    y = y.contiguous(memory_format=memory_format_of(x))
    if bits == INT64:
        return y, index.contiguous(memory_format=memory_format_of(x))
    if bits == 0:
        return y, x.new_empty(0, dtype=torch.uint8)
    return y, pack(encode(index, size, kernel, stride, padding, dilation), bits, is_last(x) if last is None else last)


def _as_int64(index, shape, g: Geometry, bits: int, last: bool) -> Tensor:
    """Int64 indices (N, C, *windows) from either kind of index; -1 where a code names no cell."""
    if bits == INT64:
        return index
    return PoolIndices(index, torch.Size(shape), *(tuple(v) for v in g.window), last).to_torch()


def plain_unpool(v, index, size, out, kernel, stride, padding, dilation, bits, last, add, sync):
    index = _as_int64(index, v.shape, Geometry.of(size, out, kernel, stride, padding, dilation), bits, last)
    return spread_ref(v, index, size, add=add, checked=bits == INT64 and not add, sync=sync)


def spread_ref(v: Tensor, index: Tensor, size: list[int], *, add: bool, checked: bool, sync: bool) -> Tensor:
    """Unpool by ``scatter``, differentiable; int64 index, shaped as ``v``. Unchecked, an outside index is dropped."""
    (N, C), cells, last = v.shape[:2], math.prod(size), is_last(v)
    ok = (index >= 0) & (index < cells)
    if checked:
        _check_indices(ok.all(), index, size, sync)
    # One long row in memory order; its last cell takes what is dropped. Of equal targets the last one wins.
    planes = torch.arange(N * C, device=v.device).view(N, C, *[1] * len(size))
    target = (planes // C * cells + index) * C + planes % C if last else planes * cells + index
    target = torch.where(ok, target, N * C * cells)
    in_memory = lambda t: (t.movedim(1, -1) if last else t).reshape(-1)
    row = v.new_zeros(N * C * cells + 1)
    target, values = in_memory(target), in_memory(v)
    row = row.scatter_add(0, target, values) if add else row.scatter(0, target, values)
    shape = (N, *size, C) if last else (N, C, *size)
    y = row[:-1].view(shape)
    return (y.movedim(-1, 1) if last else y).clone(memory_format=memory_format_of(v))


def plain_pick(dy, index, size, out, kernel, stride, padding, dilation, bits, last):
    g = Geometry.of(size, out, kernel, stride, padding, dilation)
    flat = _as_int64(index, (*dy.shape[:2], *out), g, bits, last).flatten(2)
    ok = (flat >= 0) & (flat < math.prod(size))
    picked = torch.where(ok, dy.flatten(2).gather(2, torch.where(ok, flat, 0)), 0)
    return picked.view(*dy.shape[:2], *out).contiguous(memory_format=memory_format_of(dy))


# --- shapes, registration


def fake_index(x, last: bool, size, out, kernel, stride, padding, dilation, bits) -> Tensor:
    """The index of a pooling of ``x``, as a fake tensor."""
    N, C = x.shape[:2]
    if bits == INT64:
        fmt = layout_of(last, len(size))
        return torch.empty((N, C, *out), dtype=torch.int64, device=x.device, memory_format=fmt)
    if bits == 0:
        return x.new_empty(0, dtype=torch.uint8)
    rows, inner = (N * math.prod(out), C) if last else (N * C * math.prod(out[:-1]), out[-1])
    return x.new_empty((rows, (inner * bits + 7) // 8), dtype=torch.uint8)


def _fake_pool(x, *sizes):
    return new_map(x, (*x.shape[:2], *sizes[1])), fake_index(x, is_last(x), *sizes)


def unsupported(geometry: Geometry | None, shape: Sequence[int]) -> str:
    """Why the kernels cannot pool, or unpool, a map of this shape, or "".

    Args:
        geometry: None if torch must raise the error.
        shape: (N, C, *spatial) or (C, *spatial).
    """
    if geometry is None:
        return "torch's own checks"
    if 0 in shape or 0 in geometry.size:
        return "empty input or output"
    N, C = shape[:2] if len(shape) == len(geometry.size) + 2 else (1, shape[0])
    return geometry.pooling(N, C, False).unsupported()


def _sizes(x: Tensor, *sizes: Sequence[int]) -> tuple:
    return Geometry.of(*sizes[:6]), x.shape


def _sizes_of_index(v: Tensor, index: Tensor, *sizes: Sequence[int]) -> tuple:
    return Geometry.of(*sizes[:6]), v.shape


POOL_FORMS = one_kernel("max_pool2d", _launch_pool, plain_pool, unsupported, aliases=("max_pool1d", "max_pool3d"))
UNPOOL_FORMS = one_kernel(
    "max_unpool2d", _launch_unpool, plain_unpool, unsupported, aliases=("max_unpool1d", "max_unpool3d")
)
PICK_FORMS = one_kernel("max_unpool2d", _launch_pick, plain_pick, unsupported, backward=True)

_SIZES = "SymInt[] size, SymInt[] out, int[] kernel, int[] stride, int[] padding, int[] dilation, int bits"
# Eager callers have asked the list of the pooling; its gradients are of the same geometry.
pool_op = register(
    f"max_pool(Tensor x, {_SIZES}) -> (Tensor, Tensor)", _launch_pool, plain_pool, _fake_pool,
    forms=POOL_FORMS, request=of_sizes(_sizes), asked=True,
)  # fmt: skip
unpool_op = register(
    f"max_unpool(Tensor v, Tensor index, {_SIZES}, bool last, bool add, bool sync) -> Tensor", _launch_unpool,
    plain_unpool, lambda v, index, size, *_: new_map(v, (*v.shape[:2], *size)),
    forms=UNPOOL_FORMS, request=of_sizes(_sizes_of_index), asked=True,
)  # fmt: skip
pick_op = register(
    f"max_unpool_bwd(Tensor dy, Tensor index, {_SIZES}, bool last) -> Tensor", _launch_pick, plain_pick,
    lambda dy, index, size, out, *_: new_map(dy, (*dy.shape[:2], *out)),
    forms=PICK_FORMS, request=of_sizes(_sizes_of_index), asked=True,
)  # fmt: skip


# --- autograd


def unpool(
    v: Tensor, index: Tensor, geometry: Geometry, bits: int, last: bool, *, add: bool, sync: bool = False
) -> Tensor:
    """Spread: write each window's value to the cell that its index names; zeros elsewhere."""
    return run(_MaxUnpool, unpool_op, v, index, *geometry, bits, last, add, sync)


def pick(dy: Tensor, index: Tensor, geometry: Geometry, bits: int, last: bool) -> Tensor:
    """Pick: for each window, read the value of the cell that its index names."""
    return run(_MaxUnpoolBwd, pick_op, dy, index, *geometry, bits, last)


class MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *args):
        y, index = pool_op(x, *args)
        MaxPool.save(ctx, (x, *args), (y, index))
        ctx.mark_non_differentiable(index)
        return y, index

    @staticmethod
    def save(ctx, inputs, output) -> None:
        ctx.save_for_backward(output[1])
        ctx.args = inputs[1:]
        ctx.last = is_last(inputs[0])

    @staticmethod
    def backward(ctx, dy, _):
        (index,) = ctx.saved_tensors
        *geometry, bits = ctx.args
        if bits == INT64:  # in the layout of the index, because dy is cheaper to copy
            dy = dy.contiguous(memory_format=memory_format_of(index))
        dx = unpool(dy, index, Geometry(*geometry), bits, ctx.last, add=True)
        return dx, *(None for _ in ctx.args)


class _MaxUnpool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, index, *args):
        _MaxUnpool.save(ctx, (v, index, *args), None)
        return unpool_op(v, index, *args)

    @staticmethod
    def save(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.args = inputs[2:]

    @staticmethod
    def backward(ctx, dy):
        (index,) = ctx.saved_tensors
        *geometry, bits, last, _, _ = ctx.args
        return pick(dy, index, Geometry(*geometry), bits, last), None, *(None for _ in ctx.args)


class _MaxUnpoolBwd(torch.autograd.Function):
    save = _MaxUnpool.save

    @staticmethod
    def forward(ctx, dy, index, *args):
        _MaxUnpool.save(ctx, (dy, index, *args), None)
        return pick_op(dy, index, *args)

    @staticmethod
    def backward(ctx, dx):
        (index,) = ctx.saved_tensors
        *geometry, bits, last = ctx.args
        if bits == INT64:
            dx = dx.contiguous(memory_format=memory_format_of(index))
        return unpool(dx, index, Geometry(*geometry), bits, last, add=True), None, *(None for _ in ctx.args)


for _name, _function in (("max_pool", MaxPool), ("max_unpool", _MaxUnpool), ("max_unpool_bwd", _MaxUnpoolBwd)):
    torch.library.register_autograd(qualified(_name), _function.backward, setup_context=_function.save)
