"""Ahead-of-time cases: inverted residual blocks, 1x1 convolutions with every epilogue, stems, and norm folding."""

from collections.abc import Callable

import torch

from fastseg.kernels.batch_norm.fold import fold_norm_fwd
from fastseg.kernels.dense_conv.pointwise import pointwise_conv_fwd
from fastseg.kernels.dense_conv.stem import stem_conv_fwd
from fastseg.kernels.inverted_residual.fwd import Weights, inverted_residual_fwd

_meta = lambda *shape, dtype: torch.empty(*shape, dtype=dtype, device="meta")
_nhwc = lambda n, c, h, w, dtype: _meta(n, h, w, c, dtype=dtype).permute(0, 3, 1, 2)


def _block(
    *, N: int, C: int, HIDDEN: int, COUT: int, side: int, stride: int = 1, dilation: int = 1, residual: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """16 bits whatever is asked for: the op takes nothing else (4 and 10 spills in fp32 on sm_80)."""
    shapes = ((HIDDEN, C, 1, 1), (HIDDEN,), (HIDDEN, 1, 3, 3), (HIDDEN,), (COUT, HIDDEN, 1, 1), (COUT,))
    weights = Weights(*(_meta(*shape, dtype=dtype) for shape in shapes))
    inverted_residual_fwd(_nhwc(N, C, side, side, dtype), weights, "relu6", stride, dilation, residual)


def _stem(dtype: torch.dtype, *, N: int, COUT: int, side: int, stride: int) -> None:
    weight, bias = _nhwc(COUT, 3, 3, 3, dtype), _meta(COUT, dtype=dtype)
    stem_conv_fwd(_nhwc(N, 3, side, side, dtype), weight, bias, "relu6", stride, 1)


def _pointwise(dtype: torch.dtype, *, N: int, C: int, COUT: int, side: int) -> None:
    bias, image_bias = _meta(COUT, dtype=dtype), _meta(N, COUT, dtype=dtype)
    saved, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, True
    try:
        x, residual = _nhwc(N, C, side, side, dtype), _nhwc(N, COUT, side, side, dtype)
        pointwise_conv_fwd(x, _meta(COUT, C, 1, 1, dtype=dtype), bias, "relu6", residual, image_bias)
    finally:
        torch.backends.cudnn.allow_tf32 = saved


def _fold(dtype: torch.dtype, *, COUT: int, C: int, K: int) -> None:
    weight, vectors = _meta(COUT, C, K, K, dtype=dtype), [_meta(COUT, dtype=torch.float32) for _ in range(4)]
    fold_norm_fwd(weight, weight.stride(0), None, *vectors, 1e-5, torch.empty_like(weight))


CASES: dict[str, Callable[[torch.dtype], None]] = {
    # past 2^31 elements
    "block 16->96->24, stride 2": lambda dtype: _block(N=2100, C=16, HIDDEN=96, COUT=24, side=256, stride=2),
    "block 24->144->24, residual": lambda dtype: _block(N=16, C=24, HIDDEN=144, COUT=24, side=128, residual=True),
    "block 32->192->64, stride 2": lambda dtype: _block(N=16, C=32, HIDDEN=192, COUT=64, side=64, stride=2),
    "block 64->384->96, dilated": lambda dtype: _block(N=16, C=64, HIDDEN=384, COUT=96, side=32, dilation=2),
    "stem 3->32, stride 2": lambda dtype: _stem(dtype, N=2800, COUT=32, side=512, stride=2),  # past 2^31 elements
    "fold 65536x4096, 3x3": lambda dtype: _fold(dtype, COUT=65536, C=4096, K=3),  # past 2^31 elements
    "1x1 96->576, all behind it": lambda dtype: _pointwise(dtype, N=16, C=96, COUT=576, side=32),
}
MATRIX_KERNELS = {"_inverted_residual_fwd_kernel", "_stem_conv_fwd_kernel"}
SCALAR_LOADS = {
    "block 16->96->24, stride 2": "64 pixels of 16 channels: 64 bits for each of gfx942's 256 threads",
    "_stem_conv_fwd_kernel": "windows of 3 x 3 pixels of 3 channels begin anywhere",
    "_fold_norm_fwd_kernel": "filters of any length begin anywhere",
}
TF32_CASES = {case for case in CASES if case.startswith("1x1")}
