"""A linear layer over the tokens of a map that become a map again is a 1x1 convolution of the map."""

from typing import Any

from torch import Tensor, fx

from fastseg.ops.core.sizes import same_number
from fastseg.optimizing.graph import Work, argument, aten, only_user, shape

NAME = "linear over tokens"
RESHAPES = (aten.reshape.default, aten.view.default, aten.flatten.using_ints)
COPIES = (aten.contiguous.default, aten.clone.default)


def run(work: Work) -> list[str]:
    """flatten to (N, C, h w) -> transpose -> linear -> transpose -> reshape to (N, COUT, h, w); constants."""
    matched = []
    for node in work.calls(*RESHAPES[:2]):
        linear = _swapped(_copied(node.args[0], node))
        if linear is None or linear.target is not aten.linear.default or len(shape(linear)) != 3:
            continue
        flat = _swapped(_copied(linear.args[0], linear))
        if flat is None or flat.target not in RESHAPES or only_user(flat) is None:
            continue
        source: Any = flat.args[0]
        wanted, given = shape(node), shape(source)
        if len(wanted) != 4 or len(given) != 4 or len(shape(flat)) != 3:
            continue
        same = [same_number(a, b) for a, b in zip((wanted[0], *wanted[2:]), (given[0], *given[2:]), strict=True)]
        if not all(same) or not same_number(shape(flat)[1], given[1]) or not same_number(shape(flat)[0], given[0]):
            continue
        weight, bias = work.tensor(argument(linear, "weight")), argument(linear, "bias")
        if weight is None or not same_number(wanted[1], weight.shape[0]):
            continue
        matched.append(linear.name)
        (filters,) = work.made(_filters, [weight])
        work.replace(node, aten.conv2d.default, (source, filters, bias))
    return matched


def _copied(node: Any, reader: fx.Node) -> Any:
    """What is behind copies that change the layout alone; None if somebody else reads ``node``."""
    while isinstance(node, fx.Node):
        if only_user(node) is not reader:
            return None
        if node.target not in COPIES:
            return node
        node, reader = node.args[0], node
    return None


def _swapped(node: Any) -> fx.Node | None:
    """What ``node`` swaps the last two of three axes of; nobody else reads it."""
    if not isinstance(node, fx.Node) or len(shape(node)) != 3:
        return None
    swaps = node.target is aten.transpose.int and {n % 3 for n in node.args[1:3]} == {1, 2}  # type: ignore[operator]
    swaps = swaps or (node.target is aten.permute.default and [n % 3 for n in node.args[1]] == [0, 2, 1])  # type: ignore
    return _copied(node.args[0], node) if swaps else None


def _filters(weight: Tensor) -> tuple[Tensor]:
    return (weight[:, :, None, None],)
