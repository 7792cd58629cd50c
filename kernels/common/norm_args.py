"""A batch norm as kernels take it: its tensors, and the arguments made of them."""

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """One batch norm as a kernel sees it: vectors of C elements. ``weight`` and ``bias``: both or neither."""

    mean: Tensor
    var: Tensor  # biased
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    batch_stats: bool  # mean and var were taken from this batch: the gradient flows through them


def norm_args(norm: Norm | None, dummy: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, float], bool, bool]:
    """-> (weight, bias, mean, var, eps) for a kernel, NORM, AFFINE; ``dummy`` stands for a pointer nobody reads."""
    if norm is None:
        return (dummy, dummy, dummy, dummy, 0.0), False, False
    affine = norm.weight is not None
    return (
        (norm.weight if affine else dummy, norm.bias if affine else dummy, norm.mean, norm.var, norm.eps),
        True,
        affine,
    )
