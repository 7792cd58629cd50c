"""Convolution of an unpooled map that is never stored: y = act(conv2d(unpool(v, codes), weight, bias)), channels_last.

An implicit GEMM whose left operand is built from the windows: for tap (ky, kx) and output pixel (h, w)

    a[pixel, c] = v[window of (h + ky - P, w + kx - P), c]   where the window's code names that pixel, else 0

Stride 1; windows that share no cell. Three of four products are with zeros, as in a plain convolution of the unpooled
map; the data decides where, so a GEMM cannot skip them. The map's write is saved, and its read by the convolution.
Traffic in elements, lo windows, Y outputs: lo + codes + Y + weights, lo from the cache K^2 times more. ``plan`` says
whether that pays. By its counts it does for 1x1; a 3x3 builds its operand nine times, which takes longer than writing
and reading the map.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.common.norm_act import activate
from fastseg.kernels.common.tiles import tile_and_block, tile_pixels
from fastseg.kernels.pooling.windows import Pooling, unpack_codes
from fastseg.kernels.runtime.ceilings import H200, OWN_GEMM, Chip, spread
from fastseg.kernels.runtime.config import candidates, heuristic, select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv, next_power_of_2
from fastseg.kernels.runtime.tensors import acc_dtype, precision
from fastseg.kernels.runtime.verdict import Verdict, verdict

# Lane operations that build the left operand, counted in the SASS for sm_90: for an element unpack, compare, select and
# move; for a pixel and tap the window, its bounds, and addresses.
BUILD, BUILD_ROW = 9, 600


@triton.jit(do_not_specialize=["H", "W", "OH", "OW"])
def _max_unpool_conv_fwd_kernel(
    v_ptr, codes_ptr, w_ptr, bias_ptr,
    y_ptr,
    C, H, W, OH, OW, COUT,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, K: tl.constexpr, PAD: tl.constexpr,
    BITS: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = BLOCK_H * BLOCK_W
    FIELDS: tl.constexpr = 8 // BITS
    tile, block = tile_and_block(tl.cdiv(COUT, BLOCK_N))
    n, h, w, mask_m = tile_pixels(tile, H, W, BLOCK_H, BLOCK_W)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k, offs_b = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // FIELDS)
    mask_n = offs_n < COUT
    width = (C + FIELDS - 1) // FIELDS
    windows = n * (OH * OW).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for tap in range(K * K):
        hh, ww = h + tap // K - PAD, w + tap % K - PAD
        qh, qw = hh // SH, ww // SW
        iy, ix = hh - qh * SH, ww - qw * SW
        ok = mask_m & (hh >= 0) & (hh < H) & (ww >= 0) & (ww < W) & (qh < OH) & (qw < OW) & (iy < KH) & (ix < KW)
        pattern = ((iy * KW + ix) * (0x55 if BITS == 2 else 0x11 if BITS == 4 else 1)).to(tl.uint8)  # in each field
        at = qh * OW + qw
        for k in range(0, C, BLOCK_K):
            mask_k = k + offs_k < C
            offs_v = windows * C + k
            v = tl.load(
                v_ptr + offs_v + (at[:, None] * C + offs_k[None, :]), mask=ok[:, None] & mask_k[None, :], other=0.0
            )
            mask_b = ok[:, None] & (k // FIELDS + offs_b < width)[None, :]
            offs_c = windows * width + k // FIELDS
            packed = tl.load(codes_ptr + offs_c + (at[:, None] * width + offs_b[None, :]), mask=mask_b, other=0)
            code = unpack_codes(packed ^ pattern[:, None], BITS, BLOCK_M, BLOCK_K)  # 0 where the code is the named one
            a = tl.where(code == 0, v, tl.zeros_like(v))
            # (COUT, K, K, C) in memory: the channels of one filter's tap are neighbours
            rows = offs_n[None, :] * (K * K) + tap
            b = tl.load(w_ptr + (rows * C + k + offs_k[:, None]), mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
    y = activate(acc, ACT).to(y_ptr.dtype.element_ty)
    offs = (h * W + w)[:, None] * COUT + offs_n[None, :]
    tl.store(y_ptr + n * (H * W).to(tl.int64) * COUT + offs, y, mask=mask_m[:, None] & mask_n[None, :])


def max_unpool_conv_fwd(
    v: Tensor, codes: Tensor, weight: Tensor, bias: Tensor | None, act: str, pool: Pooling, bits: int
) -> Tensor:
    """v (N, C, OH, OW) and its codes, weight (COUT, C, K, K), all NHWC in memory -> y (N, COUT, H, W): the same."""
    (N, C), (_, H, W), (_, OH, OW), COUT, K = v.shape[:2], pool.size, pool.out, weight.shape[0], weight.shape[-1]
    y = torch.empty((N, COUT, H, W), dtype=v.dtype, device=v.device, memory_format=torch.channels_last)
    cfg = select("max_unpool_conv_fwd", size=N * H * W, device=v.device, C=C, COUT=COUT, dtype=v.dtype)
    tiles = N * cdiv(H, cfg.BLOCK_H) * cdiv(W, cfg.BLOCK_W)
    launch(
        _max_unpool_conv_fwd_kernel, (tiles * cdiv(COUT, cfg.BLOCK_N),),
        v, codes, weight, v if bias is None else bias, y, C, H, W, OH, OW, COUT,
        KH=pool.kernel[1], KW=pool.kernel[2], SH=pool.stride[1], SW=pool.stride[2], K=K, PAD=K // 2, BITS=bits,
        HAS_BIAS=bias is not None, ACT=act, ACC=acc_dtype(v), PRECISION=precision(v), **cfg.launch,
    )  # fmt: skip
    return y


@functools.lru_cache(maxsize=4096)
def plan(
    pixels: int, windows: int, C: int, COUT: int, K: int, dtype: torch.dtype, bits: int, chip: Chip = H200
) -> Verdict:
    """Whether the unpooled map (``pixels`` x C) is better left unwritten, from bytes, lane operations and products.

    Two blocks share a multiprocessor, so that one builds operands while the other multiplies: the longer of the two
    counts. The plain way writes the map, and reads it in a library's convolution.
    """
    e, hi, lo, Y = dtype.itemsize, pixels * C, windows * C, pixels * COUT
    small = lo * (e + bits / 8)
    products = 2 * K * K * hi * COUT / chip.dot(dtype)
    blocks_n = cdiv(COUT, block_n(COUT))
    build = (BUILD + BUILD_ROW / C) * K * K * hi * blocks_n / chip.lanes
    few = spread(cdiv(pixels, 64) * blocks_n, chip)
    folded = max((small + e * Y) / chip.bandwidth, build * few, products / OWN_GEMM * few)
    plain = (small + e * hi) / chip.bandwidth + max(e * (hi + Y) / chip.bandwidth, products)
    taken = "folded into the convolution" if folded < plain else "plain"
    return verdict(folded < plain, "folded", folded, "plain", plain, taken, chip.described)


def block_n(COUT: int) -> int:
    """Output channels of one program: as many as leave room for a second block."""
    return min(128, max(16, next_power_of_2(COUT)))


@heuristic("max_unpool_conv_fwd")
def _config(size: int, C: int, COUT: int, dtype: torch.dtype) -> dict[str, int]:
    """64 pixels are what wgmma takes; more, or 64 channels, spill with Triton 3.6. One stage: one is computed."""
    wide = dtype.itemsize > 2
    return {"BLOCK_H": 8, "BLOCK_W": 8, "BLOCK_N": min(64, block_n(COUT)) if wide else block_n(COUT),
            "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}  # fmt: skip


@candidates("max_unpool_conv_fwd")
def _candidates(size: int, C: int, COUT: int, dtype: torch.dtype) -> list[dict[str, int]]:
    return [
        {"BLOCK_H": h, "BLOCK_W": w, "BLOCK_N": block_n(COUT), "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for h, w in ((8, 8), (4, 16), (8, 16), (4, 32))
        for k in (32, 64)
        for warps in (4, 8)
        for stages in (1, 2)
    ]
