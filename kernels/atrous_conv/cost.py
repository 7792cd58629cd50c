"""Launch configurations of the atrous convolution, and the cost model that chooses between our kernel and a library's.

Heuristics with their reasons, and further candidates for tuning. GPU times are estimates until a table in ``tuned/``
replaces them. With F the fraction of products that is left (``regions.py``) and D the dense products:

    own      max(bytes / BW,  F D / (OWN_GEMM rate),  longest program) + 1 launch
    library  for each branch  max(bytes / BW,  D_b / rate) + 1 launch;  then activation, residual, concatenation

The library is modelled at its best, so it wins a tie: it may split the sums of the few long programs that a single
image gives; our kernel does not.
"""

import functools

import torch

from fastseg.kernels.atrous_conv.regions import Branch, dense, executed, forward_regions
from fastseg.kernels.runtime.ceilings import H200, OWN_GEMM, OWN_LANES, Chip
from fastseg.kernels.runtime.config import candidates, heuristic
from fastseg.kernels.runtime.sizes import next_power_of_2
from fastseg.kernels.runtime.verdict import Verdict, verdict


@functools.lru_cache(maxsize=4096)
def plan(
    N: int,
    C: int,
    H: int,
    W: int,
    COUT: int,
    branches: tuple[Branch, ...],
    dtype: torch.dtype,
    passes: int,
    ieee: bool = False,
    chip: Chip = H200,
) -> Verdict:
    """Choose the faster form, by the model in this file's header.

    ``passes``: elementwise passes over the output (activation, residual) that the library needs and our kernel does
    not. ``ieee``: fp32 without tf32, on lanes instead of matrix units.
    """
    rate, share = chip.dot(dtype, tf32=not ieee), OWN_LANES if ieee else OWN_GEMM
    cfg = _config(N * H * W, C, COUT, dtype)
    regions, e = forward_regions(H, W, branches), dtype.itemsize
    A, Y = e * N * H * W * C, e * N * H * W * COUT
    seconds = lambda pairs, channels: 2 * pairs * C * channels / rate
    done, nominal = executed(regions, N, cfg["BLOCK_M"]), dense(H, W, branches, N)
    weights = sum(e * C * COUT * branch.K**2 for branch in branches)
    longest = chip.multiprocessors * seconds(max(r.count for r in regions) * cfg["BLOCK_M"], min(COUT, cfg["BLOCK_N"]))
    moved = (A + weights + (1 + (passes > 1)) * Y * len(branches)) / chip.bandwidth
    own = max(moved, max(seconds(done, COUT), longest) / share) + chip.launch
    each = lambda branch: max((A + Y) / chip.bandwidth, seconds(dense(H, W, (branch,), N), COUT)) + chip.launch
    library = sum(map(each, branches))
    after = passes + (len(branches) > 1)  # the concatenation is one more
    library += after * (2 * Y * len(branches) / chip.bandwidth + chip.launch)
    undilated = all(branch.K == 1 or branch.dilation == 1 for branch in branches)
    pays = own < library and not undilated
    form = "taps in padding skipped" if pays else "the library's dense convolution"
    taken = f"{form}: {done / nominal:.2f} of the products are executed"
    return verdict(pays, "own", own, "library", library, taken, chip.described)


@heuristic("atrous_conv_fwd")
def _config(size: int, C: int, COUT: int, dtype: torch.dtype) -> dict[str, int]:
    """128 x 128 is the smallest tile whose arithmetic hides its loads on Hopper; wgmma needs 64 rows.

    With few rows, 64: the rectangles of one image are small, and surplus rows of a tile are multiplied for nothing (at
    32x32 and N = 1 an ASPP executes 0.72 with 64 rows, 0.85 with 128). fp32 operands would fill the registers.
    """
    block_n = min(128, max(16, next_power_of_2(COUT)))
    if dtype.itemsize > 2:
        return {"BLOCK_M": 64, "BLOCK_N": min(64, block_n), "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
    block_m = 64 if size < 8192 else 128
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 32 if C <= 32 else 64,
            "num_warps": 8 if block_m * block_n == 128 * 128 else 4, "num_stages": 3}  # fmt: skip


@heuristic("atrous_conv_bwd_weight")
def _weight_config(size: int, C: int, COUT: int, dtype: torch.dtype) -> dict[str, int]:
    """128 x 128 outputs a program; a sum over thousands of rows hides the start of its loop.

    fp32 goes through registers (one stage): wgmma wants both operands turned, and a copy that turns has 32 bits.
    """
    block_n, block_k = (min(128, max(16, next_power_of_2(channels))) for channels in (COUT, C))
    if dtype.itemsize > 2:
        return {"BLOCK_M": 32, "BLOCK_N": min(64, block_n), "BLOCK_K": min(64, block_k), "num_warps": 4,
                "num_stages": 1}  # fmt: skip
    return {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": block_k,
            "num_warps": 8 if block_n * block_k == 128 * 128 else 4, "num_stages": 3}  # fmt: skip


@candidates("atrous_conv_bwd_weight")
def _weight_candidates(size: int, C: int, COUT: int, dtype: torch.dtype) -> list[dict[str, int]]:
    tiles = [(32, 64, 64, 4), (64, 64, 64, 4), (64, 64, 128, 4), (64, 128, 128, 4), (64, 128, 128, 8),
             (32, 128, 128, 8), (64, 128, 256, 8), (128, 128, 128, 8)]  # fmt: skip
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for m, n, k, warps in tiles
        for stages in (1, 2, 3, 4)
    ]


@candidates("atrous_conv_fwd")
def _candidates(size: int, C: int, COUT: int, dtype: torch.dtype) -> list[dict[str, int]]:
    tiles = [(64, 64, 64, 4), (64, 128, 64, 4), (128, 64, 64, 4), (128, 128, 64, 4), (128, 128, 64, 8),
             (128, 256, 64, 8), (64, 256, 64, 4), (64, 256, 32, 8), (128, 128, 32, 8), (256, 128, 64, 8)]  # fmt: skip
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for m, n, k, warps in tiles
        for stages in (2, 3, 4)
    ]
