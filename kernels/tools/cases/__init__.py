"""Cases for ahead-of-time compilation: launcher calls on ``meta`` tensors, and the claims about each compiled kernel.

A case is a function of a dtype that calls a launcher (or an op) as a network would, with realistic sizes; ``meta``
tensors have no memory, so a map of 2^31 elements costs nothing. ``make kernel-report`` prints the results, and
``tests/kernels/aot/test_budgets.py`` asserts them. Some case reaches every kernel, and one whose largest tensor is past
2^31 elements does: only there do 32-bit offsets show. There is one file for each family of kernels, with the claims
that are special to it:

    CASES            name -> function of a dtype
    MATRIX_KERNELS   kernels whose sums of products run on matrix units for fp16 and bf16
    SCALAR_LOADS     kernel or case -> why its global loads cannot be 128 bits wide
    TF32_CASES       cases that ask for tf32: torch's switch for convolutions is on by default
    SMALL_TILE_CASES cases with tiles of fewer than 64 rows by intention: HMMA is then right on sm_90 and sm_100 too
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from fastseg.kernels.tools.cases import (
    atrous_conv,
    batch_norm,
    inverted_residual,
    pooling,
    separable_conv,
    upsample,
    upsample_heads,
)

TOPICS = (
    separable_conv,
    inverted_residual,
    atrous_conv,
    batch_norm,
    pooling,
    upsample,
    upsample_heads,
)
DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)  # fp16 compiles to the same but for the type

# Registers that Triton 3.9 spills, by kernel; 3.6 and 3.7, for which configurations are chosen, spill none.
SPILLS: dict[str, int] = {}
if [int(n) for n in triton.__version__.split(".")[:2]] >= [3, 8]:
    SPILLS = {"_separable_conv_fwd_fused_kernel": 18, "_atrous_conv_tables_kernel": 2, "_upsample_loss_sums_kernel": 14}

CASES: dict[str, Callable[[torch.dtype], None]] = {}
MATRIX_KERNELS: set[str] = set()
SCALAR_LOADS: dict[str, str] = {}
TF32_CASES: set[str] = set()
SMALL_TILE_CASES: set[str] = set()
for topic in TOPICS:
    assert not CASES.keys() & topic.CASES.keys(), f"{topic.__name__}: a case of that name exists"
    CASES |= topic.CASES
    MATRIX_KERNELS |= getattr(topic, "MATRIX_KERNELS", set())
    SCALAR_LOADS |= getattr(topic, "SCALAR_LOADS", {})
    TF32_CASES |= getattr(topic, "TF32_CASES", set())
    SMALL_TILE_CASES |= getattr(topic, "SMALL_TILE_CASES", set())


@dataclass(frozen=True)
class Claims:
    """The claims about one kernel in one case.

    Attributes:
        matrix: its products run on the target's own matrix instruction.
        small_tile: the older HMMA counts as well.
        vector: it has global loads of 128 bits.
        tf32: it may use tf32.
        spills: registers that it may spill.
    """

    matrix: bool = False
    small_tile: bool = False
    vector: bool = True
    tf32: bool = False
    spills: int = 0


def claims_of(case: str, kernel: str, dtype: torch.dtype) -> Claims:
    """The claims of ``kernel`` in ``case``, from the tables above."""
    return Claims(
        matrix=kernel in MATRIX_KERNELS and dtype in (torch.float16, torch.bfloat16),
        small_tile=case in SMALL_TILE_CASES,
        vector=case not in SCALAR_LOADS and kernel not in SCALAR_LOADS,
        tf32=case in TF32_CASES,
        spills=SPILLS.get(kernel, 0),
    )
