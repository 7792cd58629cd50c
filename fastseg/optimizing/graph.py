"""A graph of aten calls that passes rewrite: its constants, shapes and calls."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fastseg.ops.core.sizes import same_number

aten = torch.ops.aten
Size = int | fx.Node


class Constants:
    """Tensors made of a model's weights, each made once; graphs of several shapes share them."""

    def __init__(self) -> None:
        self._made: dict[tuple, tuple[tuple, tuple[Tensor, ...]]] = {}  # the sources stay, so that no id returns

    def made(self, make: Callable[..., tuple], sources: Sequence[Tensor | None], *options: Any) -> tuple:
        """``make(*sources, *options)``; for the very same sources and equal options the result of the first call."""
        place = (make, options, *map(id, sources))
        if place not in self._made:
            with torch.no_grad():
                self._made[place] = tuple(sources), make(*sources, *options)
        return self._made[place][1]


class Work:
    """A graph with its tensors while passes work on it.

    Args:
        module: its placeholders are the tensors of a call, its output is what the call returns; no op of it writes to
            a tensor that another reads.
        constants: where what is made of weights is kept.
    """

    def __init__(self, module: fx.GraphModule, constants: Constants):
        self.module, self.constants = module, constants
        self._count = sum(node.op == "get_attr" for node in module.graph.nodes)

    def clone(self) -> "Work":
        """The same calls and tensors in a graph of their own."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.module.graph, {}))
        new = Work(assemble(graph, tensors_of(self.module)), self.constants)
        new._count = self._count
        return new

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def calls(self, *targets: Any) -> Iterator[fx.Node]:
        """The calls of the targets that are read, in their order; calls may be replaced meanwhile."""
        for node in list(self.graph.nodes):
            if node.users and node.op == "call_function" and node.target in targets:
                yield node

    def tensor(self, node: Any) -> Tensor | None:
        """The constant that a node reads, or None."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        found = getattr(self.module, str(node.target), None)
        return found if isinstance(found, Tensor) else None

    def constant(self, value: Tensor | None) -> fx.Node | None:
        """A node that reads ``value``."""
        if value is None:
            return None
        name = f"made_{self._count}"
        self._count += 1
        self.module.register_buffer(name, value)
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.get_attr(name)
        node.meta["val"] = value
        return node

    def made(self, make: Callable[..., tuple], sources: Sequence[Tensor | None], *options: Any) -> list:
        """Nodes of the tensors ``make(*sources, *options)``, which are made once; None for None."""
        return [self.constant(value) for value in self.constants.made(make, sources, *options)]

    def replace(self, old: fx.Node, target: Callable, args: tuple, kwargs: dict | None = None) -> fx.Node:
        """Put a call in the place of ``old``, whose value it gives."""
        with self.graph.inserting_before(old):
            new = self.graph.call_function(target, args, kwargs or {})
        new.meta["val"] = old.meta.get("val")
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)
        return new

    def insert(self, before: fx.Node, target: Callable, args: tuple, val: Any) -> fx.Node:
        """Insert a call in front of ``before``; ``val`` is what its result is like."""
        with self.graph.inserting_before(before):
            new = self.graph.call_function(target, args)
        new.meta["val"] = val
        return new

    def clean(self) -> None:
        """Drop what nobody reads, and the tensors with it."""
        self.graph.eliminate_dead_code()
        read = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        for name in [name for name in tensors_of(self.module) if name not in read]:
            delattr(self.module, name)
        self.graph.lint()
        self.module.recompile()

    @property
    def output(self) -> fx.Node:
        return next(node for node in reversed(self.graph.nodes) if node.op == "output")


def assemble(graph: fx.Graph, tensors: dict[str, Tensor]) -> fx.GraphModule:
    """The module of a graph whose constants have plain names."""
    return fx.GraphModule(dict(tensors), graph)


def tensors_of(module: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors that the module itself holds."""
    return {name: value for name, value in vars(module)["_buffers"].items() if value is not None}


def shape(node: Any) -> tuple:
    """The shape of a node's value, or () if it has none; symbols where sizes are free."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def same_shape(a: Any, b: Any) -> bool:
    """True if the values of two nodes have one shape, whatever the free sizes are."""
    first, second = shape(a), shape(b)
    return bool(first) and len(first) == len(second) and all(map(same_number, first, second))


def dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def only_user(node: fx.Node) -> fx.Node | None:
    """The node's only user, which reads it once; else None."""
    users = list(node.users)
    if len(users) != 1 or sum(one is node for one in users[0].all_input_nodes) != 1:
        return None
    reads = 0

    def count(each: fx.Node) -> fx.Node:
        nonlocal reads
        reads += each is node
        return each

    fx.map_arg((users[0].args, users[0].kwargs), count)
    return users[0] if reads == 1 else None


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an aten call by its name in the schema, its default where it is not given."""
    schema = node.target._schema  # type: ignore[union-attr]
    for i, each in enumerate(schema.arguments):
        if each.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            return node.args[i] if i < len(node.args) and not each.kwarg_only else each.default_value
    raise KeyError(f"{node.target} has no argument {name}")


def pair(value: Any) -> tuple[int, int]:
    """(a, b) of a size as aten takes it: [a, b], [a] or a."""
    numbers = list(value) if isinstance(value, Iterable) else [value]
    return (numbers[0], numbers[-1])
