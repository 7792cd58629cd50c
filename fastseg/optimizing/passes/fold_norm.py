"""Batch norms with fixed statistics become part of the convolution in front of them."""

import torch
from torch import Tensor, fx

from fastseg.ops.registered.fold_norm import fold_norm
from fastseg.optimizing.graph import Work, argument, aten, only_user

NAME = "fold norms"
NORM = ("running_mean", "running_var", "weight", "bias")


def run(work: Work) -> list[str]:
    """conv2d -> batch_norm, nobody else reading the convolution; weights and statistics are constants."""
    matched = []
    for norm in work.calls(aten.batch_norm.default):
        conv = norm.args[0]
        if not isinstance(conv, fx.Node) or conv.target is not aten.conv2d.default or only_user(conv) is not norm:
            continue
        given = [argument(conv, name) for name in ("weight", "bias")] + [argument(norm, name) for name in NORM]
        tensors = [work.tensor(node) for node in given]
        unknown = any(node is not None and t is None for node, t in zip(given, tensors, strict=True))
        if argument(norm, "training") or unknown or tensors[2] is None:
            continue
        matched.append(f"{conv.name}, {norm.name}")
        made = work.made(_fold, tensors, argument(norm, "eps"))
        work.replace(norm, aten.conv2d.default, (conv.args[0], *made, *conv.args[3:]), dict(conv.kwargs))
    return matched


def _fold(
    weight: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    last = weight.is_contiguous(memory_format=torch.channels_last)
    return fold_norm(weight, bias, mean, var, gamma, beta, eps, weight.dtype, last)
