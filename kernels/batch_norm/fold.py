"""Fold a fixed batch norm into the convolution before it, in one launch: a row of filters per output channel.

    weight'[o, :] = weight[o, :] s[o],   shift[o] = (bias[o] - mean[o]) s[o] + beta[o],   s = gamma / sqrt(var + eps)

Traffic in elements: the weight twice. A filter may begin anywhere, so that one kernel serves filters of all lengths:
its elements are loaded one by one, neighbours by the same warp. A network's weights are a few megabytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.tensors import acc_dtype

MOST = 2048  # of a row's elements in a program: 16 bytes in 16 bits for each of AMD's 256 threads


@triton.jit(do_not_specialize=["row", "columns"])
def _fold_norm_fwd_kernel(
    w_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr,
    y_ptr, shift_ptr,
    row, columns, eps,
    HAS_BIAS: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale = 1 / tl.sqrt(tl.load(var_ptr + o).to(ACC) + eps)
    if HAS_GAMMA:
        scale *= tl.load(gamma_ptr + o).to(ACC)
    if block == 0:
        shift = -tl.load(mean_ptr + o).to(ACC)
        if HAS_BIAS:
            shift += tl.load(bias_ptr + o).to(ACC)
        shift *= scale
        if HAS_BETA:
            shift += tl.load(beta_ptr + o).to(ACC)
        tl.store(shift_ptr + o, shift.to(shift_ptr.dtype.element_ty))
    offs = block * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + o * row + offs, mask=offs < columns, other=0.0).to(ACC)
    tl.store(y_ptr + o * columns + offs, (w * scale).to(y_ptr.dtype.element_ty), mask=offs < columns)


def fold_norm_fwd(
    weight: Tensor, row: int, bias: Tensor | None, mean: Tensor, var: Tensor, gamma: Tensor | None,
    beta: Tensor | None, eps: float, y: Tensor,
) -> Tensor:  # fmt: skip
    """Fills ``y``, shaped as ``weight`` and dense; -> the shift (COUT,).

    ``row``: elements from one filter of ``weight`` to the next; each is dense, in the order of ``y``. Vectors are
    (COUT,), dense.
    """
    COUT, columns = weight.shape[0], y[0].numel()
    shift = y.new_empty(COUT)
    launch(
        _fold_norm_fwd_kernel, (COUT, -(-columns // MOST)),
        weight, mean if bias is None else bias, mean, var, mean if gamma is None else gamma,
        mean if beta is None else beta, y, shift, row, columns, eps,
        HAS_BIAS=bias is not None, HAS_GAMMA=gamma is not None, HAS_BETA=beta is not None,
        ACC=acc_dtype(y if y.dtype == torch.float64 else weight), BLOCK=MOST, num_warps=4, num_stages=1,
    )  # fmt: skip
    return shift
