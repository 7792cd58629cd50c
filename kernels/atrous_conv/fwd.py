"""Atrous convolutions of one map, side by side, without products with padding: an implicit GEMM over rectangles.

    y_b = act(conv2d(x, w_b, bias_b, padding=dilation_b * (K_b // 2), dilation=dilation_b) + residual_b)   b = 0, 1 ...

All branches are one launch, which writes y_b into channels [b COUT, (b + 1) COUT) of one map: no concatenation. Inside
a rectangle (``regions.py``) every tap is valid everywhere or nowhere. So the loop over taps and channels has no masks
and leaves out the taps that read padding: at 32x32 and rates 6, 12, 18 an ASPP executes 0.59 of the products of a dense
convolution. Weights of a tap that is valid nowhere are never read: unlike in torch, their NaN stays out of the result.

The gradient at x is the same kernel with mirrored taps: it reads each branch's channels of dy and adds all branches in
one accumulator, over the rectangles of all cuts together. The weight gradient is a GEMM for each branch and tap over
the pixels where that tap is valid (``bwd.py``). x is saved once for all branches.

Layout: NHWC, weights (COUT, K, K, C). Traffic in elements, A = x, Y = output: A + weights + Y (+ Y of a residual); taps
and branches re-read A from the cache (``regions.work_items`` gives the order). A simpler kernel, over pixel tiles with
masked taps, executes 0.72 to 0.79 at that size: a tile rarely misses the map as a whole.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.atrous_conv import cost as atrous_conv_configs  # noqa: F401
from fastseg.kernels.atrous_conv.regions import REGION, TAPS, Branch
from fastseg.kernels.atrous_conv.tables import tables
from fastseg.kernels.common.norm_act import activate
from fastseg.kernels.common.tiles import clamp_index
from fastseg.kernels.runtime.config import select
from fastseg.kernels.runtime.launch import launch

# Registers what the launcher asks `select` for.
from fastseg.kernels.runtime.tensors import acc_dtype, precision


@triton.jit
def pick(ptrs, b, BRANCHES: tl.constexpr):
    """The pointer of branch ``b`` out of a tuple."""
    ptr = ptrs[0]
    for i in tl.static_range(1, BRANCHES):
        if b == i:
            ptr = ptrs[i]
    return ptr


@triton.jit(do_not_specialize=["N", "H", "W"])
def _atrous_conv_fwd_kernel(
    x_ptr, w_ptrs, bias_ptrs, residual_ptr, items_ptr, regions_ptr,
    y_ptr,
    N, H, W,
    C: tl.constexpr, CX: tl.constexpr, COUT: tl.constexpr, CY: tl.constexpr, WIDTH: tl.constexpr,
    BRANCHES: tl.constexpr, MIRRORED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, REGION: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """CX, CY: channels of a pixel of x and y, of which a branch reads C and writes COUT. WIDTH: of a region's row.

    MIRRORED: the gradient; weights are read as (C, taps, COUT), and all branches add up in one map.
    """
    BLOCKS_N: tl.constexpr = (COUT + BLOCK_N - 1) // BLOCK_N
    BLOCKS_K: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    item = tl.program_id(0) // BLOCKS_N
    block_n = tl.program_id(0) % BLOCKS_N
    region_ptr = regions_ptr + tl.load(items_ptr + 2 * item).to(tl.int64) * WIDTH

    # Rows past the rectangle's end read its last one. The clamps change nothing else: they are bounds that the check of
    # offsets can follow.
    y0, x0 = clamp_index(tl.load(region_ptr), H - 1), clamp_index(tl.load(region_ptr + 1), W - 1)
    h, w = clamp_index(tl.load(region_ptr + 2), H - 1) + 1, clamp_index(tl.load(region_ptr + 3), W - 1) + 1
    first, count = clamp_index(tl.load(region_ptr + 4), BRANCHES - 1), clamp_index(tl.load(region_ptr + 5), BRANCHES)
    row = clamp_index(tl.load(items_ptr + 2 * item + 1), N * (H * W) - 1) + tl.arange(0, BLOCK_M)
    mask_m = row < N * h * w
    row = tl.minimum(row, N * h * w - 1)
    n, at = row // (h * w), row % (h * w)
    pixel = n.to(tl.int64) * (H * W) + (tl.minimum(y0 + at // w, H - 1) * W + x0 + at % w)  # (BLOCK_M,)

    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < COUT
    offs_x = pixel[:, None] * CX + offs_k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for j in range(0, count):
        taps_ptr = region_ptr + REGION + j * TAPS
        shift = tl.load(taps_ptr).to(tl.int64)
        row_step, column_step = tl.load(taps_ptr + 1).to(tl.int64), tl.load(taps_ptr + 2).to(tl.int64)
        ny, nx = clamp_index(tl.load(taps_ptr + 3), 3), clamp_index(tl.load(taps_ptr + 4), 3)
        weight, K = tl.load(taps_ptr + 5).to(tl.int64), tl.load(taps_ptr + 6).to(tl.int64)
        w_ptr = tl.multiple_of(pick(w_ptrs, first + j, BRANCHES), 16)  # the choice drops what is known of each
        a_ptrs = x_ptr + tl.load(taps_ptr + 7).to(tl.int64) * C + offs_x
        if MIRRORED:
            b_ptrs = w_ptr + offs_k.to(tl.int64)[:, None] * (K * K * COUT) + offs_n[None, :]
        else:
            b_ptrs = w_ptr + offs_n.to(tl.int64)[None, :] * (K * K * C) + offs_k[:, None]
        # Taps and channels in one loop: the loads of the next tap are under way while this one is multiplied. Taps run
        # fastest: the programs that run read one block of channels at a time, from DRAM once, then from the L2.
        k, ty, tx = 0, 0, 0
        for _ in range(0, ny * nx * BLOCKS_K):
            from_x = (shift + ty * row_step + tx * column_step) * CX + k
            from_w = weight + ty * K + tx
            from_w = k * (K * K * COUT) + from_w * COUT if MIRRORED else from_w * C + k
            if C % BLOCK_K == 0:
                a = tl.load(a_ptrs + from_x)
            else:
                a = tl.load(a_ptrs + from_x, mask=(k + offs_k < C)[None, :], other=0.0)
            if C % BLOCK_K == 0 and COUT % BLOCK_N == 0:
                v = tl.load(b_ptrs + from_w)
            else:
                v = tl.load(b_ptrs + from_w, mask=(k + offs_k < C)[:, None] & mask_n[None, :], other=0.0)
            acc = tl.dot(a, v, acc, input_precision=PRECISION, out_dtype=ACC)
            tx += 1
            ends = (tx == nx).to(tl.int32)
            tx -= ends * nx
            ty += ends
            ends = (ty == ny).to(tl.int32)
            ty -= ends * ny
            k += ends * BLOCK_K

    channel = offs_n if MIRRORED else first * COUT + offs_n
    if HAS_BIAS:
        acc += tl.load(pick(bias_ptrs, first, BRANCHES) + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
    offs = pixel[:, None] * CY + channel[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(ACC)
    tl.store(y_ptr + offs, activate(acc, ACT).to(y_ptr.dtype.element_ty), mask=mask)


def atrous_conv_fwd(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], residual: Tensor | None, dilations: list[int], act: str
) -> Tensor:
    """x (N, C, H, W), weights (COUT, C, K, K), NHWC in memory -> y (N, B COUT, H, W): the same.

    Weights begin at multiples of 16 bytes. Biases (COUT,): all or none.
    """
    branches = _branches_of(weights, dilations)
    COUT, C = weights[0].shape[:2]
    y = _nhwc(x, COUT * len(weights))
    _launch(x, weights, biases, residual, y, branches, act, C=C, COUT=COUT, mirrored=False)
    return y


def atrous_conv_bwd_input(dy: Tensor, weights: list[Tensor], dilations: list[int]) -> Tensor:
    """dy (N, B COUT, H, W), weights (COUT, C, K, K), NHWC in memory -> dx (N, C, H, W), NHWC."""
    branches = _branches_of(weights, dilations)
    COUT, C = weights[0].shape[:2]
    dx = _nhwc(dy, C)
    _launch(dy, weights, [], None, dx, branches, "none", C=COUT, COUT=C, mirrored=True)
    return dx


def _branches_of(weights: list[Tensor], dilations: list[int]) -> tuple[Branch, ...]:
    sizes = []
    for w in weights:
        sizes.append(w.shape[-1])
    return _branches(tuple(sizes), tuple(dilations))


@functools.lru_cache(maxsize=256)
def _branches(sizes: tuple[int, ...], dilations: tuple[int, ...]) -> tuple[Branch, ...]:
    return tuple(map(Branch, sizes, dilations))


def _launch(x, weights, biases, residual, y, branches, act, *, C, COUT, mirrored) -> None:
    N, CX, H, W = x.shape
    cfg = select("atrous_conv_fwd", size=N * H * W, device=x.device, C=C, COUT=COUT, dtype=x.dtype)
    items, regions = tables(x, branches, cfg.BLOCK_M, mirrored=mirrored)
    launch(
        _atrous_conv_fwd_kernel, (items.shape[0] * -(-COUT // cfg.BLOCK_N),),
        x, tuple(weights), tuple(biases) or (x,), x if residual is None else residual, items, regions, y, N, H, W,
        C=C, CX=CX, COUT=COUT, CY=y.shape[1], WIDTH=regions.shape[1], BRANCHES=len(branches),
        MIRRORED=mirrored, HAS_BIAS=bool(biases), HAS_RESIDUAL=residual is not None, ACT=act, ACC=acc_dtype(x),
        PRECISION=precision(x), REGION=REGION, TAPS=TAPS, **cfg.launch,
    )  # fmt: skip


def _nhwc(x: Tensor, channels: int) -> Tensor:
    N, _, H, W = x.shape
    return x.new_empty(N, H, W, channels).permute(0, 3, 1, 2)
