"""Batch norms with fixed statistics become part of the convolution, or transposed convolution, in front of them."""

from typing import Any

import torch
from torch import Tensor, fx

from fastseg.ops.registered.fold_norm import fold_norm
from fastseg.optimizing.graph import Work, argument, aten, only_user

NAME = "fold norms"
NORM = ("running_mean", "running_var", "weight", "bias")
PLAIN, TRANSPOSED = aten.conv2d.default, aten.conv_transpose2d.input


def run(work: Work) -> list[str]:
    """conv2d or conv_transpose2d -> batch_norm, nobody else reading the convolution; weights and statistics are
    constants."""
    matched = []
    for norm in work.calls(aten.batch_norm.default):
        conv = norm.args[0]
        if not isinstance(conv, fx.Node) or conv.target not in (PLAIN, TRANSPOSED) or only_user(conv) is not norm:
            continue
        transposed = conv.target is TRANSPOSED
        if transposed and argument(conv, "groups") != 1:
            continue
        given = [argument(conv, name) for name in ("weight", "bias")] + [argument(norm, name) for name in NORM]
        tensors = [work.tensor(node) for node in given]
        unknown = any(node is not None and t is None for node, t in zip(given, tensors, strict=True))
        if argument(norm, "training") or unknown or tensors[2] is None:
            continue
        matched.append(f"{conv.name}, {norm.name}")
        made = work.made(_fold_transposed if transposed else _fold, tensors, argument(norm, "eps"))
        kwargs = {name: value for name, value in conv.kwargs.items() if name not in ("weight", "bias")}
        work.replace(norm, conv.target, (conv.args[0], *made, *conv.args[3:]), kwargs)
    return matched


def _fold(
    weight: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    last = weight.is_contiguous(memory_format=torch.channels_last)
    return fold_norm(weight, bias, mean, var, gamma, beta, eps, weight.dtype, last)


def _fold_transposed(weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Of a transposed convolution, whose weight is (C, COUT, K, K)."""
    folded, bias = _fold(weight.transpose(0, 1), *rest)
    return folded.transpose(0, 1).contiguous(), bias
