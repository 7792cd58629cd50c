"""Linear maps over channels: tokens become maps again, and two matrices with nothing between become one (R4)."""

from typing import Any

import torch
from torch import Tensor, fx

from fastseg.ops.pointwise import compose_pointwise
from fastseg.ops.resize_concat_conv import resize_concat_conv2d
from fastseg.optimizing.graph import Work, argument, aten, only_user, pair, shape

NAME = "compose pointwise"
SUM = aten.conv2d.default


def run(work: Work) -> list[str]:
    """1x1 -> 1x1 convolution, or 1x1 convolutions in front of a fused 1x1 of several maps; constants, no activation
    between, and fewer products in one."""
    matched = []
    for conv in work.calls(SUM):
        if (inner := _inner(work, argument(conv, "input"), conv)) is None or not _plain_1x1(work, conv):
            continue
        if not _pays(inner, shape(argument(conv, "weight"))[0]):
            continue
        given = [argument(each, name) for each in (conv, inner) for name in ("weight", "bias")]
        weight, bias = work.made(_composed, [work.tensor(node) for node in given])
        matched.append(f"{inner.name}, {conv.name}")
        work.replace(conv, SUM, (inner.args[0], weight, bias))
    for fused in work.calls(resize_concat_conv2d):
        matched.extend(_into_sum(work, fused))
    return matched


def _into_sum(work: Work, fused: fx.Node) -> list[str]:
    """Put the 1x1 convolutions in front of a fused 1x1 into its matrix."""
    maps: Any = list(fused.args[0])  # type: ignore[arg-type]
    weight, bias = work.tensor(fused.args[1]), work.tensor(fused.args[2])
    if weight is None or weight.shape[2:] != (1, 1) or (fused.args[2] is not None and bias is None):
        return []
    cout, widths = weight.shape[0], [shape(m)[1] for m in maps]
    inner = [_inner(work, m, fused) for m in maps]
    inner = [each if each is not None and _pays(each, cout) else None for each in inner]
    if not any(inner):
        return []
    tensors = [work.tensor(argument(each, name)) for each in inner if each is not None for name in ("weight", "bias")]
    taken = tuple(each is not None for each in inner)
    made = work.made(_summed, [weight, bias, *tensors], tuple(widths), taken)
    new = [m if each is None else each.args[0] for m, each in zip(maps, inner, strict=True)]
    names = [each.name for each in inner if each is not None]
    work.replace(fused, resize_concat_conv2d, (new, *made), dict(fused.kwargs))
    return [f"{', '.join(names)}, {fused.name}"]


def _inner(work: Work, node: Any, reader: fx.Node) -> fx.Node | None:
    """``node``, if it is a 1x1 convolution of constants that ``reader`` alone reads."""
    if not isinstance(node, fx.Node) or node.target is not SUM or only_user(node) is not reader:
        return None
    return node if _plain_1x1(work, node) else None


def _plain_1x1(work: Work, conv: fx.Node) -> bool:
    weight, bias = work.tensor(argument(conv, "weight")), argument(conv, "bias")
    if weight is None or weight.dim() != 4 or weight.shape[2:] != (1, 1) or argument(conv, "groups") != 1:
        return False
    if bias is not None and work.tensor(bias) is None:
        return False
    return pair(argument(conv, "stride")) == (1, 1) and pair(argument(conv, "padding")) == (0, 0)


def _pays(inner: fx.Node, cout: int) -> bool:
    """One matrix has fewer products than two."""
    middle, channels = shape(argument(inner, "weight"))[:2]
    return channels * cout < middle * (channels + cout)


def _composed(outer: Tensor, outer_bias: Tensor | None, inner: Tensor, inner_bias: Tensor | None) -> tuple:
    return compose_pointwise(outer, inner, inner_bias, outer_bias)


def _summed(*given: Any) -> tuple[Tensor, Tensor | None]:
    weight, bias, *tensors, widths, taken = given
    parts, rest = [], list(tensors)
    for part, each in zip(weight.split(list(widths), 1), taken, strict=True):
        if not each:
            parts.append(part)
            continue
        inner, inner_bias = rest.pop(0), rest.pop(0)
        made, more = compose_pointwise(part, inner, inner_bias)
        parts.append(made)
        bias = more if bias is None else bias if more is None else bias + more
    return torch.cat(parts, 1), bias
