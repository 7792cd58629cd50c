"""Fold a fixed batch norm into the weight and bias of the convolution before it, as one registered op."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg.ops.core.dispatch import HAS_TRITON, INTERPRETED, followed, kernels_run
from fastseg.ops.core.register import register

if HAS_TRITON:
    from fastseg.kernels.batch_norm.fold import fold_norm_fwd

# Weight, bias, mean, variance, gamma, beta, eps.
Fold = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None, float]


def fold_norm(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    last: bool,
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of ``batch_norm(conv(x))`` as one convolution; no gradient.

        weight' = weight s,   bias' = (bias - mean) s + beta,   s = gamma / sqrt(var + eps)

    Args:
        weight: (COUT, C, KH, KW).
        dtype: of the results.
        last: True for a channels_last weight, False for a contiguous one.
    """
    return fold_norms([(weight, bias, mean, var, gamma, beta, eps)], dtype, last, kernels_run(weight))[0]


def fold_norms(folds: Sequence[Fold], dtype: torch.dtype, last: bool, kernel: bool) -> list[tuple[Tensor, Tensor]]:
    """``fold_norm`` of each; a fold is its first arguments. ``kernel``: True if kernels run on such weights."""
    if torch.is_grad_enabled():
        with torch.no_grad():
            return fold_norms(folds, dtype, last, kernel)
    made = []
    for fold in folds:
        made.append((_fold if kernel and fold[0].numel() else _plain)(*fold, dtype, last))
    return made


def pays_on_cpu(weight: Tensor, values: int) -> bool:
    """Whether to fold at each call costs a CPU less than the norm's pass over a map of so many values; True elsewhere.

    A dozen calls on the weight stand against one on the map, which threads share: 60 us and 8 us on small ones, equal
    at 2^18 values and a small weight (one thread).
    """
    if not weight.is_cpu or INTERPRETED or followed(weight):
        return True
    return values >= torch.get_num_threads() * (2**17 + weight.numel())


def _format(last: bool) -> torch.memory_format:
    return torch.channels_last if last else torch.contiguous_format


def _launch(weight, bias, mean, var, gamma, beta, eps, dtype, last) -> tuple[Tensor, Tensor]:
    row = weight.stride(0)
    form = torch.channels_last if last else torch.contiguous_format
    slice_of_1x1 = weight.shape[2:].numel() == 1 and weight.stride(1) == 1
    if not slice_of_1x1 and not weight.is_contiguous(memory_format=form):
        weight = weight.contiguous(memory_format=form)
        row = weight[0].numel()
    vectors = []
    for t in (bias, mean, var, gamma, beta):
        vectors.append(None if t is None else t.contiguous())
    y = torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=form)
    return y, fold_norm_fwd(weight, row, *vectors, eps, y)


def _plain(weight, bias, mean, var, gamma, beta, eps, dtype, last) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    bias, mean, var, gamma, beta = (None if t is None else t.to(wide) for t in (bias, mean, var, gamma, beta))
    scale = torch.rsqrt(var + eps)
    scale = scale if gamma is None else scale * gamma
    if bias is None:
        shift = mean * -scale if beta is None else torch.addcmul(beta, mean, scale, value=-1)
    else:
        shift = (bias - mean) * scale if beta is None else torch.addcmul(beta, bias - mean, scale)
    y = (weight * scale[:, None, None, None]).to(dtype).contiguous(memory_format=_format(last))
    return y, shift.to(dtype)


def _fake_weight(weight: Tensor, dtype: torch.dtype, last: bool) -> Tensor:
    return torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=_format(last))


def _fake(weight, bias, mean, var, gamma, beta, eps, dtype, last) -> tuple[Tensor, Tensor]:
    return _fake_weight(weight, dtype, last), weight.new_empty(weight.shape[0], dtype=dtype)


_fold = register(
    "fold_norm(Tensor weight, Tensor? bias, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps, "
    "ScalarType dtype, bool last) -> (Tensor, Tensor)",
    _launch,
    _plain,
    _fake,
)
