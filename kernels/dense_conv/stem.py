"""The first convolution of a network, from a few channels of an image, with bias and activation in one launch, NHWC.

    y = act(conv2d(x, weight, stride, padding) + bias)

An implicit GEMM whose inner dimension is all taps of all channels at once, 27 for 3x3 on RGB. cuDNN's tensor-core
kernels want multiples of 8 channels, so they pad the image, and leave bias and activation to passes of their own over
the largest map of the network. Neighbouring elements of a window's row are neighbours in memory, but a window begins
anywhere: loads are scalar, 32 for a pixel of 3x3 x 3, and hit the cache.

Traffic in elements: A + Y + weights; a library's A + Y, and 2Y for each of bias and activation.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.common.norm_act import activate
from fastseg.kernels.common.tiles import tile_and_block, tile_pixels
from fastseg.kernels.runtime.ceilings import H200, OWN_GEMM, Chip, spread
from fastseg.kernels.runtime.config import candidates, heuristic, select
from fastseg.kernels.runtime.conv_sizes import Geometry
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv, next_power_of_2
from fastseg.kernels.runtime.tensors import acc_dtype, empty_nhwc, precision
from fastseg.kernels.runtime.verdict import Verdict, verdict

MOST_CHANNELS, MOST_TAPS = 4, 64  # of the image; of all channels together
ROWS = 64  # pixels of a tile


@triton.jit(do_not_specialize=["H", "W", "OH", "OW"])
def _stem_conv_fwd_kernel(
    x_ptr, w_ptr, bias_ptr,
    y_ptr,
    H, W, OH, OW, stride, padding,
    C: tl.constexpr, COUT: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, block = tile_and_block(tl.cdiv(COUT, BLOCK_N))
    n, oy, ox, mask_m = tile_pixels(tile, OH, OW, BLOCK_H, BLOCK_W)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)  # (tap row, tap column, channel), channels innermost
    mask_n = offs_n < COUT
    ky, kx, c = offs_k // (K * C), offs_k // C % K, offs_k % C
    iy = (oy * stride - padding)[:, None] + ky[None, :]
    ix = (ox * stride - padding)[:, None] + kx[None, :]
    inside = mask_m[:, None] & (offs_k < K * K * C)[None, :] & (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)
    x = tl.load(x_ptr + n * H * W * C + ((iy * W + ix) * C + c[None, :]), mask=inside, other=0.0)
    w = tl.load(w_ptr + offs_n[None, :] * (K * K * C) + offs_k[:, None],
                mask=(offs_k < K * K * C)[:, None] & mask_n[None, :], other=0.0)  # fmt: skip
    y = tl.dot(x, w.to(x_ptr.dtype.element_ty), input_precision=PRECISION, out_dtype=ACC)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
    y = activate(y, ACT).to(y_ptr.dtype.element_ty)
    offs = (oy * OW + ox)[:, None] * COUT + offs_n[None, :]
    tl.store(y_ptr + n * OH * OW * COUT + offs, y, mask=mask_m[:, None] & mask_n[None, :])


def stem_conv_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, stride: int, padding: int) -> Tensor:
    """x (N, C, H, W), weight (COUT, C, K, K) in NHWC memory -> y (N, COUT, OH, OW), NHWC."""
    N, C, H, W = x.shape
    COUT, K = weight.shape[0], weight.shape[-1]
    OH, OW = ((size + 2 * padding - K) // stride + 1 for size in (H, W))
    g = Geometry(N, C, H, W, COUT, OH, OW, K, stride, padding, 1)
    y = empty_nhwc(x, g, COUT)
    cfg = select("stem_conv_fwd", size=g.pixels, device=x.device, C=C, COUT=COUT, K=K, dtype=x.dtype)
    tiles = N * cdiv(OH, cfg.BLOCK_H) * cdiv(OW, cfg.BLOCK_W)
    launch(
        _stem_conv_fwd_kernel, (tiles * cdiv(COUT, cfg.BLOCK_N),),
        x, weight, x if bias is None else bias, y, H, W, OH, OW, stride, padding,
        C=C, COUT=COUT, K=K, HAS_BIAS=bias is not None, ACT=act, ACC=acc_dtype(x), PRECISION=precision(x),
        BLOCK_K=max(16, next_power_of_2(K * K * C)), **cfg.launch,
    )  # fmt: skip
    return y


@functools.lru_cache(maxsize=4096)
def plan(g: Geometry, dtype: torch.dtype, passes: int, *, tf32: bool, chip: Chip = H200) -> Verdict:
    """Own kernel or library, whose convolution is followed by ``passes`` over y.

    A scalar load takes four lane operations' time: there is a quarter as many load lanes as multiply-add lanes.
    """
    e, A, Y = dtype.itemsize, g.N * g.C * g.H * g.W, g.pixels * g.COUT
    taps = max(16, next_power_of_2(g.K * g.K * g.C))
    moved = e * (A + Y) / chip.bandwidth
    products = 2 * g.pixels * taps * max(16, next_power_of_2(g.COUT))
    rate = chip.dot(dtype) * OWN_GEMM if tf32 or dtype != torch.float32 else chip.lanes
    few = spread(cdiv(g.pixels, ROWS), chip)
    own = max(moved, (8 * g.pixels * taps / chip.lanes + products / rate) * few) + chip.launch
    library = moved + passes * 2 * e * Y / chip.bandwidth + chip.launch * (1 + passes)
    taken = "one launch" if own < library else "library"
    return verdict(own < library, "own kernel", own, "library", library, taken, chip.described)


@heuristic("stem_conv_fwd")
def _config(size: int, C: int, COUT: int, K: int, dtype: torch.dtype) -> dict[str, int]:
    """64 pixels are what wgmma takes: a thread loads 16 elements of 27 taps and writes 16 bytes at a time."""
    return {"BLOCK_H": 4, "BLOCK_W": 16, "BLOCK_N": min(64, max(16, next_power_of_2(COUT))),
            "num_warps": 4, "num_stages": 1}  # fmt: skip


@candidates("stem_conv_fwd")
def _candidates(size: int, C: int, COUT: int, K: int, dtype: torch.dtype) -> list[dict[str, int]]:
    block_n = max(16, next_power_of_2(COUT))
    return [
        {"BLOCK_H": h, "BLOCK_W": w, "BLOCK_N": min(n, block_n), "num_warps": warps, "num_stages": 1}
        for h, w, warps in ((4, 16, 4), (2, 32, 4), (8, 8, 4), (1, 64, 4), (4, 32, 4), (4, 32, 8))
        for n in (32, 64)
    ]
