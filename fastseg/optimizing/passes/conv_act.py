"""Convolution, residual and activation become one call, which packs its weights on a CPU inside a ``Runner``."""

from typing import Any

from torch import fx

from fastseg.ops.conv_act import conv2d_act
from fastseg.optimizing.graph import Work, argument, aten, only_user, pair, same_shape, shape

NAME = "convolution + residual + activation"


def run(work: Work) -> list[str]:
    """Every 2-D convolution, with a sum of its size and an activation if they follow and nobody else reads between."""
    matched = []
    for conv in work.calls(aten.conv2d.default):
        if len(shape(conv)) != 4:
            continue
        last, residual, act = conv, None, None
        user = only_user(last)
        if user is not None and (other := _summand(user, last)) is not None:
            last, residual = user, other
            user = only_user(last)
        if user is not None and (name := activation(user)):
            last, act = user, name
        names = ("input", "weight", "bias")
        x, weight, bias = (argument(conv, name) for name in names)
        sizes = (pair(argument(conv, name)) for name in ("stride", "padding", "dilation"))
        args = (x, weight, bias, act, *sizes, argument(conv, "groups"))
        work.replace(last, conv2d_act, args, {} if residual is None else {"residual": residual})
        matched.append(
            " + ".join([conv.name, *["residual"] * (residual is not None), *[act or ""] * (act is not None)])
        )
    return matched


def _summand(node: fx.Node, conv: fx.Node) -> fx.Node | None:
    """What ``node`` adds to the convolution, if that has its shape."""
    if node.target is not aten.add.Tensor or argument(node, "alpha") != 1:
        return None
    first, second = node.args[:2]
    other = second if first is conv else first
    return other if isinstance(other, fx.Node) and same_shape(other, conv) else None


def with_activation(node: fx.Node) -> tuple[fx.Node, str | None]:
    """The activation that alone reads ``node``, and its name; else ``node`` and None."""
    user = only_user(node)
    name = "" if user is None else activation(user)
    return (user, name) if user is not None and name else (node, None)


def activation(node: fx.Node) -> str:
    """The activation that a call is, by its name in ``fastseg.ops``, or ""."""
    if node.target is aten.relu.default:
        return "relu"
    if node.target is aten.relu6.default:
        return "relu6"
    if node.target is aten.hardtanh.default and _is(node, "min_val", 0) and _is(node, "max_val", 6):
        return "relu6"
    if node.target is aten.leaky_relu.default and _is(node, "negative_slope", 0.01):
        return "leaky_relu"
    return ""


def _is(node: fx.Node, name: str, value: Any) -> bool:
    return argument(node, name) == value
