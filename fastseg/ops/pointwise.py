"""Two matrices of channels with nothing between them are one matrix."""

from contextlib import nullcontext

import torch
from torch import Tensor

NAME = "compose_pointwise"


def compose_pointwise(
    outer: Tensor, inner: Tensor, inner_bias: Tensor | None = None, outer_bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of ``outer(inner(x))``, two linear maps over channels: 1x1 convolutions or linear layers.

    The product is computed in fp32 or wider, whatever autocast says, and is differentiable: both matrices stay
    parameters.

    Args:
        outer: (COUT, M) or (COUT, M, 1, 1).
        inner: (M, C) or (M, C, 1, 1).
        inner_bias: (M,).
        outer_bias: (COUT,).

    Returns:
        The weight, (COUT, C, 1, 1), and the bias, (COUT,), or None if both biases are; in the dtype of ``outer``.

    Raises:
        ValueError: a weight is not a matrix or a 1x1 filter, or the widths do not fit.
    """
    for label, t in (("outer", outer), ("inner", inner)):
        if t.dim() not in (2, 4) or any(n != 1 for n in t.shape[2:]):
            raise ValueError(f"{NAME}: {label} is {tuple(t.shape)}; it must be (OUT, IN) or (OUT, IN, 1, 1)")
    if outer.shape[1] != inner.shape[0]:
        raise ValueError(f"{NAME}: outer is {tuple(outer.shape)}, inner {tuple(inner.shape)}; M must be the same")
    for label, t, width in (("inner_bias", inner_bias, inner.shape[0]), ("outer_bias", outer_bias, outer.shape[0])):
        if t is not None and t.shape != (width,):
            raise ValueError(f"{NAME}: {label} is {tuple(t.shape)}; it must be ({width},)")
    kept = torch.promote_types(outer.dtype, torch.float32)
    kind = outer.device.type
    with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):  # meta tensors have no autocast
        a, b = outer.flatten(1).to(kept), inner.flatten(1).to(kept)
        weight = (a @ b)[:, :, None, None].to(outer.dtype)
        bias = None if outer_bias is None else outer_bias.to(kept)
        if inner_bias is not None:
            more = a @ inner_bias.to(kept)
            bias = more if bias is None else bias + more
        return weight, None if bias is None else bias.to(outer.dtype)
