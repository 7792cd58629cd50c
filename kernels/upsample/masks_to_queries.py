"""The owner of each pixel of a mask classifier, and the areas of all masks; no map of queries at full size exists.

    m_q   = (1 - u) ((1 - t) a_q + t b_q) + u ((1 - t) c_q + t d_q)      a, b, c, d: the corners of the pixel's cell
    p_q   = sigmoid(m_q), or m_q itself where the maps are sigmoids already;    v_q = s_q p_q
    y     = the first query whose v_q is NaN, else the first with the largest v_q
    in    = v_y >= threshold, or p_y >= threshold;    area_q = the number of pixels with v_q, or p_q, >= threshold

Traffic in elements: reads N Q h w maps and N Q scores, writes N H W queries and N H W bytes, and adds to N Q areas.
Torch's steps write and read N Q H W upsampled maps, their sigmoids, their products and one comparison.

A program owns BLOCK outputs of one image, in the order of memory. For each query it gathers the four corners of its
outputs' cells, which caches serve again to its neighbours, counts the outputs inside, and adds the count to the area:
an atomic sum of integers, the same in any order; most masks are small, and a count of 0 is not added.

Why not simpler: areas from a second kernel would interpolate and squash every query again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.common.bilinear import float_of, source_coordinate
from fastseg.kernels.runtime.config import candidates, heuristic, select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import bits_of, cdiv
from fastseg.kernels.runtime.tensors import acc_dtype
from fastseg.kernels.upsample.sizes import Upsampling
from fastseg.kernels.upsample.volume_argmax import _within


@triton.jit(
    do_not_specialize=["h", "w", "H", "W", "Q", "threshold", "stride_n"],
    do_not_specialize_on_alignment=["stride_q", "stride_y", "stride_x"],
)
def _masks_to_queries_fwd_kernel(
    x_ptr, s_ptr, y_ptr, inside_ptr, area_ptr,
    h, w, H, W, scale_h, scale_w, Q, threshold, stride_n, stride_q, stride_y, stride_x,
    SQUASH: tl.constexpr, WEIGHTED: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(H * W, BLOCK)
    tile = tl.program_id(0).to(tl.int64)
    n = tile // blocks
    offs = (tile % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    here = offs < H * W
    y0, y1, u = source_coordinate(offs // W, h, scale_h, ALIGN_CORNERS, ACC)
    x0, x1, t = source_coordinate(offs % W, w, scale_w, ALIGN_CORNERS, ACC)
    a, b = y0 * stride_y + x0 * stride_x, y0 * stride_y + x1 * stride_x
    c, d = y1 * stride_y + x0 * stride_x, y1 * stride_y + x1 * stride_x
    least = float_of(threshold, ACC)
    plane_ptr = x_ptr + n * stride_n
    best = tl.full((BLOCK,), float("-inf"), ACC)
    own = tl.full((BLOCK,), float("-inf"), ACC)  # what is compared with the threshold, of the owner
    y = tl.zeros((BLOCK,), tl.int32)
    for q in tl.range(0, Q, num_stages=1):
        share = _within(plane_ptr, a, b, c, d, u, t, here)
        plane_ptr += stride_q  # a query's plane may lie 2^31 elements and more behind the first
        if SQUASH:
            share = 1.0 / (1.0 + tl.exp(-share))
        value = share * tl.load(s_ptr + (n * Q + q)).to(ACC)
        compared = value if WEIGHTED else share
        wins = (value > best) | ((value != value) & (best == best))
        best, own, y = tl.where(wins, value, best), tl.where(wins, compared, own), tl.where(wins, q, y)
        count = tl.sum(((compared >= least) & here).to(tl.int32), axis=0)
        tl.atomic_add(area_ptr + (n * Q + q), count.to(tl.int64), mask=count > 0)
    out = n * H * W + offs
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=here)
    tl.store(inside_ptr + out, (own >= least).to(tl.uint8), mask=here)


def masks_to_queries_fwd(
    x: Tensor, scores: Tensor, up: Upsampling, dtype: torch.dtype, threshold: float, *, squash: bool, weighted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask logits, or with ``squash=False`` sigmoids, x (N, Q, h, w), any strides; scores (N, Q), contiguous.

    Returns:
        Queries (N, H, W) of ``dtype``, inside (N, H, W), bool, and areas (N, Q), int64.
    """
    N, Q = scores.shape
    H, W = up.y.full, up.x.full
    y = torch.empty(N, H, W, dtype=dtype, device=x.device)
    inside = torch.empty(N, H, W, dtype=torch.uint8, device=x.device)
    areas = torch.zeros(N, Q, dtype=torch.int64, device=x.device)
    if y.numel() > 0:
        cfg = select("masks_to_queries_fwd", size=y.numel(), device=x.device, Q=Q, dtype=x.dtype)
        h, w, _, _, scale_h, scale_w, *_ = up.arguments()
        launch(
            _masks_to_queries_fwd_kernel, (N * cdiv(H * W, cfg.BLOCK),),
            x, scores, y, inside, areas, h, w, H, W, scale_h, scale_w, Q, bits_of(threshold), *x.stride(),
            SQUASH=squash, WEIGHTED=weighted, ALIGN_CORNERS=up.align_corners, ACC=acc_dtype(x), **cfg.launch,
        )  # fmt: skip
    return y, inside.view(torch.bool), areas


@heuristic("masks_to_queries_fwd")
def _queries_config(size: int, Q: int, dtype: torch.dtype) -> dict[str, int]:
    """Four outputs a thread: a query's count costs each warp one reduction for all of its outputs."""
    return {"BLOCK": 512, "num_warps": 4}


@candidates("masks_to_queries_fwd")
def _queries_candidates(size: int, Q: int, dtype: torch.dtype) -> list[dict[str, int]]:
    pairs = ((256, 4), (512, 4), (512, 8), (1024, 4), (1024, 8))
    return [{"BLOCK": block, "num_warps": warps} for block, warps in pairs]
