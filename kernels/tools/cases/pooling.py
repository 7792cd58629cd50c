"""Ahead-of-time cases of max pooling and unpooling, and of the ops fused with them."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastseg.kernels.batch_norm.stats import batch_norm_stats
from fastseg.kernels.common.norm_args import Norm
from fastseg.kernels.pooling.max_pool import max_pool_fwd
from fastseg.kernels.pooling.max_unpool import max_unpool_bwd, max_unpool_fwd
from fastseg.kernels.pooling.max_unpool_conv import max_unpool_conv_fwd
from fastseg.kernels.pooling.norm_max_pool_bwd import norm_max_pool_bwd
from fastseg.kernels.pooling.windows import Pooling, new_index, new_map


def _pooling(N: int, C: int, H: int, W: int, K: int, S: int, P: int, last: bool) -> Pooling:
    """Square windows, ceil mode."""
    out = [-(-(n + 2 * P - K) // S) + 1 for n in (H, W)]
    return Pooling(N, C, (1, H, W), (1, *out), (1, K, K), (1, S, S), (0, P, P), (1, 1, 1), last)


def _map(pool: Pooling, grid: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    return new_map(torch.empty(0, dtype=dtype, device="meta"), pool, grid)


def _pool(dtype: torch.dtype, pool: Pooling, bits: int, *, add: bool = False) -> None:
    """Pooling, and unpooling there and back."""
    max_pool_fwd(_map(pool, pool.size, dtype), pool, bits)
    index = new_index(torch.empty(0, device="meta"), pool, bits)
    max_unpool_fwd(_map(pool, pool.out, dtype), index, pool, bits, add=add)
    max_unpool_bwd(_map(pool, pool.size, dtype), index, pool, bits)


def _stage(dtype: torch.dtype, pool: Pooling) -> None:
    """Batch statistics, norm, ReLU and pooling, and their backward."""
    z, y = _map(pool, pool.size, dtype), _map(pool, pool.out, dtype)
    norm = Norm(*(torch.empty(pool.C, device="meta") for _ in range(4)), 1e-5, True)
    batch_norm_stats(z.select(2, 0))
    _, index = max_pool_fwd(z, pool, 2, norm, "relu")
    norm_max_pool_bwd(y, index, z, norm, "relu", pool, 2)


def _unpool_conv(dtype: torch.dtype, pool: Pooling, COUT: int) -> None:
    meta = torch.empty(0, dtype=dtype, device="meta")
    weight = torch.empty(COUT, pool.C, 3, 3, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
    bias = torch.empty(COUT, device="meta")
    v = new_map(meta, pool, pool.out).select(2, 0)
    max_unpool_conv_fwd(v, new_index(meta, pool, 2), weight, bias, "relu", pool, 2)


_SEGNET = {"C": 64, "H": 360, "W": 480, "K": 2, "S": 2, "P": 0}  # its first stage
_LARGE = 256  # images that put the larger map past 2^31 elements

CASES: dict[str, Callable[[torch.dtype], None]] = {
    "SegNet pool, codes": lambda dtype: _pool(dtype, _pooling(_LARGE, **_SEGNET, last=True), 2),
    "SegNet pool, int64": lambda dtype: _pool(dtype, _pooling(_LARGE, **_SEGNET, last=True), 64),
    "SegNet pool, codes, NCHW": lambda dtype: _pool(dtype, _pooling(_LARGE, **_SEGNET, last=False), 2),
    "SegNet pool, int64, NCHW": lambda dtype: _pool(dtype, _pooling(_LARGE, **_SEGNET, last=False), 64),
    "ResNet pool, codes": lambda dtype: _pool(dtype, _pooling(16, 64, 256, 256, 3, 2, 1, True), 4, add=True),
    "SegNet stage": lambda dtype: _stage(dtype, _pooling(_LARGE, **_SEGNET, last=True)),
    "SegNet decoder 64->64": lambda dtype: _unpool_conv(dtype, _pooling(_LARGE, **_SEGNET, last=True), 64),
    "SegNet stage 5": lambda dtype: _stage(dtype, _pooling(16, 512, 23, 30, 2, 2, 0, True)),
}
MATRIX_KERNELS = {"_max_unpool_conv_fwd_kernel"}
TF32_CASES = {"SegNet decoder 64->64"}
_NCHW = "windows two pixels apart along the line: their cells are loaded one by one, their neighbours by the same warp"
SCALAR_LOADS = {
    "SegNet pool, codes, NCHW": _NCHW,
    "SegNet pool, int64, NCHW": _NCHW,
    "_max_unpool_bwd_kernel": "each channel reads the cell that its own code names",
    "_norm_max_pool_bwd_reduce_kernel": "each channel reads the cell that its own code names",
    "_max_unpool_fwd_foreign_kernel": "a report of a few kilobytes",
}
