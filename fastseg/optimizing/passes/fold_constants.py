"""What is computed of constants alone is computed once: standardised weights, positions of a given size."""

from typing import Any

import torch
from torch import Tensor, fx

from fastseg.optimizing.graph import Work

NAME = "fold constants"
GROWTH = 4  # a result that is larger than its sources, by more than this, is made in each call
SMALL = 2**16  # bytes that may be kept in any case


def run(work: Work) -> list[str]:
    """aten calls whose tensors are constants, at least one, and whose result draws nothing at random."""
    matched = []
    for node in list(work.graph.nodes):
        if node.op != "call_function" or not node.users or not _plain(node):
            continue
        inputs = node.all_input_nodes
        tensors = [work.tensor(each) for each in inputs]
        if not inputs or any(t is None for t in tensors):
            continue
        given = _hashable((list(node.args), dict(node.kwargs)), {each: i for i, each in enumerate(inputs)})
        (value,) = work.constants.made(_compute, tensors, node.target, given)
        bound = max(SMALL, GROWTH * sum(t.nbytes for t in tensors if t is not None))
        if not isinstance(value, Tensor) or value.nbytes > bound:
            continue
        matched.append(node.name)
        node.replace_all_uses_with(work.constant(value))
    return matched


def _plain(node: fx.Node) -> bool:
    target = node.target
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.name.startswith("aten::") or schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ())


def _hashable(value: Any, places: dict[fx.Node, int]) -> tuple:
    """Arguments with numbers in the place of nodes."""
    if isinstance(value, fx.Node):
        return "tensor", places[value]
    if isinstance(value, dict):
        return "dict", tuple((key, _hashable(each, places)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return "list", tuple(_hashable(each, places) for each in value)
    return "value", value


def _arguments(given: tuple, tensors: tuple) -> Any:
    kind, value = given
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _arguments(each, tensors) for key, each in value}
    return [_arguments(each, tensors) for each in value] if kind == "list" else value


def _compute(*given: Any) -> tuple:
    *tensors, target, arguments = given
    args, kwargs = _arguments(arguments, tuple(tensors))
    return (target(*args, **kwargs),)
