"""Device functions of the depthwise half: a tile's K x K taps, in one go or as tiles that wait in registers."""

import triton
import triton.language as tl

from fastseg.kernels.common.norm_act import activate


@triton.jit
def depthwise_tile(
    x_ptr, dw_ptr, bias_ptr, iy, ix, mask_m, offs_k, mask_k, H, W, dilation,
    C: tl.constexpr, K: tl.constexpr, DW_C: tl.constexpr, DW_T: tl.constexpr, PRE_ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """K x K taps of one image at input positions (iy, ix) of the first tap: -> (BLOCK_M, BLOCK_K), in ACC.

    UNROLL: all taps are asked for at once, and wait for memory once. A tile must be small for that: of 8x16x64, all
    K*K tap tiles would spill (1.1 KB of stack, sm_90, Triton 3.6).
    """
    u = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    if UNROLL:
        taps = nine_taps(x_ptr, iy, ix, mask_m, offs_k, mask_k, H, W, dilation, C)
        u = sum_of_taps(taps, dw_ptr, bias_ptr, offs_k, mask_k, DW_C, DW_T, PRE_ACT, HAS_BIAS, ACC)
    else:
        for ky in tl.range(0, K, num_stages=1, loop_unroll_factor=1):
            y = iy + ky * dilation
            mask_y = mask_m & (y >= 0) & (y < H)
            for kx in tl.static_range(K):
                x = _tap(x_ptr, y, ix + kx * dilation, mask_y, offs_k, mask_k, W, C).to(ACC)
                w = tl.load(dw_ptr + offs_k * DW_C + (ky * K + kx) * DW_T, mask=mask_k, other=0.0).to(ACC)
                u += activate(x, PRE_ACT) * w[None, :]
        if HAS_BIAS:
            u += tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0).to(ACC)[None, :]
    return u


@triton.jit
def nine_taps(x_ptr, iy, ix, mask_m, offs_k, mask_k, H, W, dilation, C: tl.constexpr):
    """The 3 x 3 tap tiles of one image, as they lie in memory: a tuple of (BLOCK_M, BLOCK_K), 0 outside the image."""
    upper = _three_taps(x_ptr, iy, ix, mask_m, offs_k, mask_k, H, W, dilation, C)
    middle = _three_taps(x_ptr, iy + dilation, ix, mask_m, offs_k, mask_k, H, W, dilation, C)
    lower = _three_taps(x_ptr, iy + 2 * dilation, ix, mask_m, offs_k, mask_k, H, W, dilation, C)
    return upper + middle + lower


@triton.jit
def sum_of_taps(
    taps, dw_ptr, bias_ptr, offs_k, mask_k, DW_C: tl.constexpr, DW_T: tl.constexpr, PRE_ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The depthwise convolution from ``nine_taps``: -> (BLOCK_M, BLOCK_K), in ACC. Its weights stay in L1."""
    u = tl.zeros(taps[0].shape, ACC)
    for tap in tl.static_range(9):
        w = tl.load(dw_ptr + offs_k * DW_C + tap * DW_T, mask=mask_k, other=0.0).to(ACC)
        u += activate(taps[tap].to(ACC), PRE_ACT) * w[None, :]
    if HAS_BIAS:
        u += tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0).to(ACC)[None, :]
    return u


@triton.jit
def _three_taps(x_ptr, y, ix, mask_m, offs_k, mask_k, H, W, dilation, C: tl.constexpr):
    mask_y = mask_m & (y >= 0) & (y < H)
    return (
        _tap(x_ptr, y, ix, mask_y, offs_k, mask_k, W, C),
        _tap(x_ptr, y, ix + dilation, mask_y, offs_k, mask_k, W, C),
        _tap(x_ptr, y, ix + 2 * dilation, mask_y, offs_k, mask_k, W, C),
    )


@triton.jit
def _tap(x_ptr, y, col, mask_y, offs_k, mask_k, W, C: tl.constexpr):
    mask = (mask_y & (col >= 0) & (col < W))[:, None] & mask_k[None, :]
    return tl.load(x_ptr + (y * W + col)[:, None] * C + offs_k[None, :], mask=mask, other=0.0)
