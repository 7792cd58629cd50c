"""Launch configurations of the separable convolution: heuristics with their reasons, and what tuning tries besides.

What compilation shows (registers, spills, blocks) is in `make kernel-report`; what a GPU would show is an estimate,
until a table in ``tuned/`` replaces it.
"""

import torch

from fastseg.kernels.runtime.config import candidates, heuristic
from fastseg.kernels.runtime.sizes import next_power_of_2
from fastseg.kernels.separable_conv.cost import fused_block_n, fused_tile, pw_tile

# Of the kernels that hold taps: all there are. Left to itself, ptxas takes 80 or 128 and spills a few (3 to 7 on sm_80
# to sm_100, by Triton's version).
TAP_REGISTERS = 255


@heuristic("separable_conv_fwd_dw")
def _dw_config(size: int, C: int, K: int, dtype: torch.dtype) -> dict[str, int]:
    """An 8x16 tile re-reads (8+2)(16+2)/128 = 1.4 inputs per output through L1, in 64-byte segments."""
    return {"BLOCK_H": 8, "BLOCK_W": 16, "BLOCK_C": 64 // dtype.itemsize, "num_warps": 4,
            "maxnreg": TAP_REGISTERS}  # fmt: skip


@candidates("separable_conv_fwd_dw")
def _dw_candidates(size: int, C: int, K: int, dtype: torch.dtype) -> list[dict[str, int]]:
    tiles = [(4, 8, 64), (4, 16, 32), (4, 16, 64), (8, 8, 32), (8, 8, 64), (8, 16, 16), (8, 16, 32), (8, 16, 64)]
    return [
        {"BLOCK_H": h, "BLOCK_W": w, "BLOCK_C": c, "num_warps": n, "maxnreg": TAP_REGISTERS}
        for h, w, c in tiles
        for n in (4, 8)
    ]


@heuristic("separable_conv_fwd_fused")
def _fused_config(size: int, C: int, COUT: int, K: int, dtype: torch.dtype, stats: bool) -> dict[str, int]:
    """BLOCK_N covers COUT, so that the depthwise tile is computed once; 64 rows are what wgmma takes. Where that leaves
    the chip idle, the cost model's smaller tile.

    A wide accumulator leaves room for one block per multiprocessor (172 registers on sm_90). 128 registers would make
    it two, at 0 to 26 spills by shape and Triton version; tuning tries it. 255 is no limit.
    """
    tile = fused_tile(size, C, COUT, K, dtype)
    block_k = 64 if tile.N == 32 and C > 32 and dtype.itemsize == 2 else 32  # loads of 128 bits, taps and weights alike
    return {"BLOCK_H": tile.H, "BLOCK_W": tile.W, "BLOCK_N": tile.N, "BLOCK_K": block_k,
            "num_warps": 8 if tile.N * dtype.itemsize >= 512 else 4, "num_stages": 1, "maxnreg": 255}  # fmt: skip


@candidates("separable_conv_fwd_fused")
def _fused_candidates(size: int, C: int, COUT: int, K: int, dtype: torch.dtype, stats: bool) -> list[dict[str, int]]:
    tiles = [(8, 8, 32, 4), (8, 8, 32, 8), (8, 8, 64, 8), (4, 16, 32, 8), (8, 16, 32, 8), (8, 16, 64, 8), (8, 8, 64, 4),
             (4, 8, 32, 4), (4, 4, 32, 4)]  # fmt: skip
    widest = fused_block_n(COUT, dtype)
    return [
        {"BLOCK_H": h, "BLOCK_W": w, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": 1, "maxnreg": regs}
        for n in sorted({min(n, widest) for n in (32, 64, 128, widest)}, reverse=True)
        for h, w, k, warps in tiles
        for regs in (128, 255)
    ]


@heuristic("separable_conv_fwd_pw")
def _pw_config(size: int, C: int, COUT: int, dtype: torch.dtype) -> dict[str, int]:
    """128 x 128 is the smallest tile whose arithmetic hides its loads on Hopper; wgmma needs 64 rows.

    fp32 takes a quarter of that: its operands fill the registers (spills on sm_100). Small maps take less.
    """
    block_m, block_n = pw_tile(size, COUT, dtype)
    block_k = 32 if C <= 32 or dtype.itemsize > 2 else 64
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
            "num_warps": 8 if block_m * block_n >= 128 * 128 else 4, "num_stages": 3}  # fmt: skip


@candidates("separable_conv_fwd_pw")
def _pw_candidates(size: int, C: int, COUT: int, dtype: torch.dtype) -> list[dict[str, int]]:
    tiles = [(64, 32, 64, 4), (64, 64, 64, 4), (64, 128, 64, 4), (128, 64, 64, 4), (128, 128, 64, 4), (128, 128, 64, 8),
             (128, 256, 64, 8), (64, 256, 64, 4), (64, 256, 32, 8), (128, 128, 32, 8)]  # fmt: skip
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for m, n, k, warps in tiles
        for stages in (2, 3, 4)
    ]


@heuristic("separable_conv_bwd_pw_input")
def _pw_input_config(size: int, C: int, COUT: int, dtype: torch.dtype) -> dict[str, int]:
    """64 x 64: dy, z and the accumulator are alive at once, and 128 channels spill on Triton 3.6 (105 on sm_90)."""
    block_n = min(64, max(16, next_power_of_2(C)))
    return {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}


@candidates("separable_conv_bwd_pw_input")
def _pw_input_candidates(size: int, C: int, COUT: int, dtype: torch.dtype) -> list[dict[str, int]]:
    tiles = [(64, 64, 32, 4), (64, 128, 32, 4), (64, 128, 64, 8), (64, 256, 32, 8), (128, 64, 32, 8), (128, 128, 32, 8)]
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for m, n, k, warps in tiles
        for stages in (1, 2, 3)
    ]


@heuristic("separable_conv_bwd_pw_weight")
def _pw_weight_config(size: int, C: int, COUT: int, dtype: torch.dtype) -> dict[str, int]:
    """64 x 64 outputs a program keep dz and the activation of 64 rows in registers beside the accumulator."""
    return {"BLOCK_M": 64 if dtype.itemsize == 2 else 32, "BLOCK_N": 64 if COUT > 32 else 32,
            "BLOCK_K": 64 if C > 32 else 32, "num_warps": 4, "num_stages": 2}  # fmt: skip


@candidates("separable_conv_bwd_pw_weight")
def _pw_weight_candidates(size: int, C: int, COUT: int, dtype: torch.dtype) -> list[dict[str, int]]:
    tiles = [(32, 64, 64, 4), (64, 64, 64, 4), (64, 64, 128, 8), (32, 128, 128, 8), (64, 128, 64, 8), (64, 128, 128, 8)]
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for m, n, k, warps in tiles
        for stages in (1, 2, 3)
    ]


@heuristic("separable_conv_bwd_dw_input")
def _dw_input_config(size: int, C: int, K: int, dtype: torch.dtype) -> dict[str, int]:
    """As the depthwise forward, with half the pixels: g1 and u are both loaded for each tap."""
    return {"BLOCK_H": 8, "BLOCK_W": 8, "BLOCK_C": 64 // dtype.itemsize, "num_warps": 4,
            "maxnreg": TAP_REGISTERS}  # fmt: skip


@candidates("separable_conv_bwd_dw_input")
def _dw_input_candidates(size: int, C: int, K: int, dtype: torch.dtype) -> list[dict[str, int]]:
    tiles = [(4, 8, 32), (4, 8, 64), (4, 16, 32), (8, 8, 16), (8, 8, 32), (8, 8, 64), (8, 16, 16), (8, 16, 32)]
    return [
        {"BLOCK_H": h, "BLOCK_W": w, "BLOCK_C": c, "num_warps": n, "maxnreg": TAP_REGISTERS}
        for h, w, c in tiles
        for n in (4, 8)
    ]


@heuristic("separable_conv_bwd_dw_weight")
def _dw_weight_config(size: int, C: int, K: int, dtype: torch.dtype) -> dict[str, int]:
    """A 64-byte segment of channels; 64 rows amortise adding a tap into the padded accumulator."""
    return {"BLOCK_M": 64, "BLOCK_C": 64 // dtype.itemsize, "num_warps": 4, "maxnreg": TAP_REGISTERS}


@candidates("separable_conv_bwd_dw_weight")
def _dw_weight_candidates(size: int, C: int, K: int, dtype: torch.dtype) -> list[dict[str, int]]:
    return [
        {"BLOCK_M": m, "BLOCK_C": c, "num_warps": warps, "maxnreg": TAP_REGISTERS}
        for m, c in [(32, 32), (32, 64), (64, 16), (64, 32), (64, 64), (128, 16), (128, 32)]
        for warps in (2, 4, 8)
    ]
