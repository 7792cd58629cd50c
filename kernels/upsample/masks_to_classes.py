"""Class map of a mask classifier: each pixel's best sum over queries; no map of queries or classes at full size exists.

    m_q   = (1 - u) ((1 - t) a_q + t b_q) + u ((1 - t) c_q + t d_q)      a, b, c, d: the corners of the pixel's cell
    s_k   = sum_q sigmoid(m_q) p[q, k]
    y     = the first class with the largest s_k; 0 where they are NaN: a NaN of any query is one of every class

Traffic in elements: reads N Q h w mask logits and N Q K probabilities, writes N H W class indices. Torch's steps write
and read N Q H W upsampled logits and their sigmoid, and N K H W sums.

A program owns BLOCK_P columns of one output row. It gathers and squashes BLOCK_Q queries of them and multiplies these
with BLOCK_K classes: a product of matrices whose left side never leaves registers. All classes up to 256 fit one block
of sums; more are walked block by block, and the sigmoids are then computed again for each. Products of fp16 and bf16
maps are of fp16, which has 11 bits for numbers in [0, 1]; sums are fp32.

Why not simpler: a class at a time, as ``argmax.py`` walks, computes K Q sigmoids a pixel in place of Q.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.common.bilinear import mix, nan_blind_maximum, source_coordinate
from fastseg.kernels.runtime.config import candidates, heuristic, select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv, next_power_of_2
from fastseg.kernels.runtime.tensors import acc_dtype, precision
from fastseg.kernels.upsample.sizes import Upsampling

MOST_SUMS = 256  # classes whose sums a program holds at once


@triton.jit(
    do_not_specialize=["h", "w", "H", "W", "Q"],
    do_not_specialize_on_alignment=["stride_n", "stride_q", "stride_y", "stride_x"],
)
def _masks_to_classes_fwd_kernel(
    x_ptr, p_ptr, y_ptr,
    h, w, H, W, scale_h, scale_w, Q, stride_n, stride_q, stride_y, stride_x,
    K: tl.constexpr, ALIGN_CORNERS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks_w = tl.cdiv(W, BLOCK_P)
    tile = tl.program_id(0)
    column = tile % blocks_w * BLOCK_P
    row = tile // blocks_w  # of all images
    n = (row // H).to(tl.int64)
    offs_p = column + tl.arange(0, BLOCK_P)
    here = offs_p < W
    x0, x1, t = source_coordinate(offs_p, w, scale_w, ALIGN_CORNERS, ACC)  # (BLOCK_P,)
    y0, y1, u = source_coordinate(row % H, h, scale_h, ALIGN_CORNERS, ACC)
    left, right, t = (x0 * stride_x)[:, None], (x1 * stride_x)[:, None], t[:, None]
    top_ptr = x_ptr + n * stride_n + y0 * stride_y
    bottom_ptr = x_ptr + n * stride_n + y1 * stride_y
    p_ptr += n * Q * K
    best = tl.full((BLOCK_P,), -1.0, ACC)
    y = tl.zeros((BLOCK_P,), tl.int32)
    for k in tl.range(0, K, BLOCK_K, num_stages=1):
        offs_k = k + tl.arange(0, BLOCK_K)
        sums = tl.zeros((BLOCK_P, BLOCK_K), ACC)
        for q in tl.range(0, Q, BLOCK_Q):
            offs_q = q + tl.arange(0, BLOCK_Q)
            mask = here[:, None] & (offs_q < Q)[None, :]
            plane = (offs_q * stride_q)[None, :]
            a = tl.load(top_ptr + (plane + left), mask=mask, other=0.0).to(ACC)
            b = tl.load(top_ptr + (plane + right), mask=mask, other=0.0).to(ACC)
            c = tl.load(bottom_ptr + (plane + left), mask=mask, other=0.0).to(ACC)
            d = tl.load(bottom_ptr + (plane + right), mask=mask, other=0.0).to(ACC)
            m = mix(1 - u, mix(1 - t, a, t, b), u, mix(1 - t, c, t, d))
            share = 1.0 / (1.0 + tl.exp(-m))
            p = tl.load(
                p_ptr + offs_q[:, None] * K + offs_k[None, :],
                mask=(offs_q < Q)[:, None] & (offs_k < K)[None, :], other=0.0,
            )  # fmt: skip
            sums = tl.dot(share.to(p.dtype), p, sums, input_precision=PRECISION, out_dtype=ACC)
        sums = tl.where((offs_k < K)[None, :], sums, -1.0)
        largest = tl.reduce(sums, 1, nan_blind_maximum)
        first = tl.min(tl.where(sums == largest[:, None], offs_k[None, :], K), axis=1)
        wins = largest > best
        best, y = tl.where(wins, largest, best), tl.where(wins, first, y)
    tl.store(y_ptr + (row.to(tl.int64) * W + offs_p), y.to(y_ptr.dtype.element_ty), mask=here)


def masks_to_classes_fwd(x: Tensor, p: Tensor, up: Upsampling, dtype: torch.dtype) -> Tensor:
    """Mask logits x (N, Q, h, w), any strides; probabilities p (N, Q, K), contiguous -> class indices (N, H, W)."""
    N, Q, K = p.shape
    H, W = up.y.full, up.x.full
    y = torch.empty(N, H, W, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    cfg = select("masks_to_classes_fwd", size=y.numel(), device=x.device, Q=Q, K=K, dtype=x.dtype)
    h, w, _, _, scale_h, scale_w, *_ = up.arguments()
    launch(
        _masks_to_classes_fwd_kernel, (N * H * cdiv(W, cfg.BLOCK_P),),
        x, p, y, h, w, H, W, scale_h, scale_w, Q, *x.stride(),
        K=K, ALIGN_CORNERS=up.align_corners, PRECISION=precision(x), ACC=acc_dtype(x), **cfg.launch,
    )  # fmt: skip
    return y


def _classes_block(K: int) -> int:
    return max(16, min(MOST_SUMS, next_power_of_2(K)))


@heuristic("masks_to_classes_fwd")
def _masks_config(size: int, Q: int, K: int, dtype: torch.dtype) -> dict[str, int]:
    """64 rows of a product are what wgmma takes; 256 sums a pixel are 64 registers of 256 threads."""
    block_k = _classes_block(K)
    block_q = 32 if dtype.itemsize == 2 else 16
    return {"BLOCK_P": 64, "BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": 8 if block_k > 128 else 4,
            "num_stages": 1}  # fmt: skip


@candidates("masks_to_classes_fwd")
def _masks_candidates(size: int, Q: int, K: int, dtype: torch.dtype) -> list[dict[str, int]]:
    widest = _classes_block(K)
    return [
        {"BLOCK_P": pixels, "BLOCK_Q": queries, "BLOCK_K": classes, "num_warps": warps, "num_stages": 1}
        for classes in sorted({widest, max(16, widest // 2)})
        for pixels, warps in ((64, 4), (64, 8), (128, 8))
        for queries in (16, 32)
    ]
