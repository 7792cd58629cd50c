"""The evaluation graph of a model: aten calls in which nothing is written in place."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn

from fastseg.io.files import first_line
from fastseg.io.quiet import quiet
from fastseg.optimizing.graph import argument, assemble, aten

DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
Sizes = Literal["free", "given"]


class Kind(NamedTuple):
    """What an input must be like."""

    shape: tuple[int | None, ...]  # None: free, within limits
    limits: tuple[tuple[int, int], ...]  # the least and the largest size of each axis
    dtype: torch.dtype
    device: torch.device


class Traced(NamedTuple):
    """A model's graph, and what calls it holds for."""

    module: fx.GraphModule
    holds: "Holds"
    unflatten: Callable[[list], Any]  # the results as the model returns them
    notes: tuple[str, ...]  # what is not free, and why


class Holds(NamedTuple):
    """The calls that a graph holds for."""

    kinds: tuple[Kind, ...]
    guards: Callable[..., None] | None  # raises AssertionError for inputs that would take another way

    def why_not(self, inputs: Sequence[Any]) -> str:
        """Why the graph does not hold for these inputs, or ""."""
        for i, (x, kind) in enumerate(zip(inputs, self.kinds, strict=True)):
            if not isinstance(x, Tensor) or x.dim() != len(kind.shape):
                return f"input {i} is no tensor of {len(kind.shape)} axes"
            if x.dtype != kind.dtype or x.device != kind.device:
                return f"input {i} is {x.dtype} on {x.device}; the graph is of {kind.dtype} on {kind.device}"
            for axis, (size, wanted, (least, most)) in enumerate(zip(x.shape, kind.shape, kind.limits, strict=True)):
                if wanted is not None and size != wanted:
                    return f"input {i} has size {size} at axis {axis}; the graph is of {wanted}"
                if not least <= size <= most:
                    return f"input {i} has size {size} at axis {axis}; the graph takes {least} to {most}"
        try:
            if self.guards is not None:
                self.guards(*inputs)
        except AssertionError as error:
            return first_line(error)
        return ""


class Untraceable(Exception):
    """No tracer gives a graph of the model; the text says why."""


def trace(model: nn.Module, inputs: tuple[Tensor, ...], sizes: Sizes) -> Traced:
    """The graph of ``model(*inputs)``.

    ``torch.export`` traces, with free batch, height and width of the inputs if ``sizes`` is "free", with a free batch
    where that fails, else with the sizes of the inputs. ``make_fx`` traces where export fails.

    Raises:
        Untraceable: neither can, with the reason of each.
    """
    with quiet(logging.CRITICAL, printed=False):  # the notes say why a tracer fails; other threads may print
        return _first(model, inputs, sizes)


def _first(model: nn.Module, inputs: tuple[Tensor, ...], sizes: Sizes) -> Traced:
    """What the first tracer gives that can."""
    notes: list[str] = []
    attempts = [(0, 2, 3), (0,), ()] if sizes == "free" else [()]
    for axes in attempts:
        try:
            return _exported(model, inputs, axes, tuple(notes))
        except Exception as error:  # whatever a model raises under a tracer
            what = {3: "free sizes", 1: "a free batch", 0: "torch.export"}[len(axes)]
            notes.append(f"{what}: {_reason(error)}")
    try:
        return _made_by_fx(model, inputs, tuple(notes))
    except Exception as error:
        notes.append(f"make_fx: {_reason(error)}")
    raise Untraceable("; ".join(notes))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"[:200]


def _exported(model: nn.Module, inputs: tuple[Tensor, ...], axes: tuple[int, ...], notes: tuple[str, ...]) -> Traced:
    from torch.export import Dim, export  # seconds, paid here only

    if axes:  # a batch of one would be taken for a constant
        inputs = tuple(torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x for x in inputs)
    free = tuple({axis: Dim.AUTO for axis in axes if axis < x.dim()} for x in inputs)
    program = export(model, inputs, dynamic_shapes=free if axes else None, strict=False)
    try:
        module = program.module()
        plain = _plain(module)
    except ValueError:  # it writes to views: torch can tell such writes apart, in one more trace
        module = program.run_decompositions({}).module()
        plain = _plain(module)
    guards = next((node for node in module.graph.nodes if node.op == "call_module"), None)
    check = None if guards is None else module.get_submodule(str(guards.target))
    ranges = {str(symbol): (int(r.lower), _most(r.upper)) for symbol, r in program.range_constraints.items()}
    given = [node.meta["val"] for node in plain.graph.nodes if node.op == "placeholder"]
    kinds = tuple(_kind(like, ranges) for like in given)
    if check is None and any(None in kind.shape for kind in kinds):
        raise RuntimeError("this version of torch names no guards")
    names = {0: "batch", 2: "height", 3: "width"}
    fixed = {names[a] for kind in kinds for a in axes if a < len(kind.shape) and kind.shape[a] is not None}
    told = tuple(f"{name} is not free: the model takes its size for a constant" for name in sorted(fixed))
    return Traced(plain, Holds(kinds, check), program.call_spec.out_spec.unflatten, (*notes, *told))


def _kind(like: Tensor, ranges: dict[str, tuple[int, int]]) -> Kind:
    shape: list[int | None] = []
    limits = []
    for axis, size in enumerate(like.shape):
        fixed = type(size) is int
        least, most = (size, size) if fixed else ranges.get(str(size), (0, 0))
        shape.append(size if fixed else None)
        # export takes no example of one image, since it would take 1 for a constant; a free batch may be 1
        limits.append((1 if axis == 0 and least == 2 and not fixed else least, most))
    return Kind(tuple(shape), tuple(limits), like.dtype, like.device)


def _most(bound: Any) -> int:
    return 2**62 if "oo" in str(bound) else int(bound)


def _made_by_fx(model: nn.Module, inputs: tuple[Tensor, ...], notes: tuple[str, ...]) -> Traced:
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        # stand-ins without values: a model that asks for one would be traced along one of its ways
        tracer = make_fx(
            lambda *args: model(*args), tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True
        )
        module = tracer(*inputs)
        kinds = tuple(_kind(x, {}) for x in inputs)
    return Traced(_plain(module), Holds(kinds, None), _as_it_is, notes)


def _as_it_is(result: Any) -> Any:
    return result


def _plain(module: fx.GraphModule) -> fx.GraphModule:
    """The graph without guards and in-place writes; its tensors have plain names.

    Raises:
        ValueError: a write reaches what another call reads, or what outlives the call.
    """
    graph, tensors = fx.Graph(), dict[str, Tensor]()
    names: dict[int, str] = {}
    values: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            held = _attribute(module, str(node.target))
            if not isinstance(held, Tensor):
                raise ValueError(f"the graph holds {type(held).__name__}, {node.target}")
            name = names.setdefault(id(held), f"held_{len(names)}")
            tensors[name] = held.detach()
            values[node] = graph.get_attr(name)
            values[node].meta["val"] = tensors[name]
        elif node.op == "call_function" and node.target in DROPOUTS and not argument(node, "train"):
            values[node] = values[node.args[0]]
        elif node.op == "call_module":
            if node.users:
                raise ValueError(f"the graph calls a module, {node.target}")
        else:
            values[node] = graph.node_copy(node, lambda old: values[old])
    _without_writes(graph)
    graph.eliminate_dead_code()
    return assemble(graph, tensors)


def _attribute(module: nn.Module, target: str) -> Any:
    found: Any = module
    for part in target.split("."):
        found = getattr(found, part)
    return found


def _without_writes(graph: fx.Graph) -> None:
    """Replace calls that write in place by those that do not, where a later reader has their result anyway."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
        if schema is None or not schema.is_mutable:
            continue
        written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        target = node.args[0] if node.args else None
        if [each.name for each in written] != [schema.arguments[0].name]:
            raise ValueError(f"{node.target} writes in place")
        if not isinstance(target, fx.Node) or not _fresh(target) or _read_later(target, node, order):
            raise ValueError(f"{node.target} writes to what others read")
        node.target = _out_of_place(node)


def _out_of_place(node: fx.Node) -> Any:
    name, overload = str(node.target).split(".")[-2:]  # aten.relu_.default
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    found = getattr(packet, overload, None)
    if not name.endswith("_") or found is None:
        raise ValueError(f"{node.target} writes in place")
    return found


def _fresh(node: fx.Node) -> bool:
    """True if the node's result is memory of its own."""
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    return all(each.alias_info is None for each in schema.returns)


def _read_later(node: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """True if what is written to, or a view of it, is read after the write."""
    return any(user is not write and (order[user] > order[write] or not _fresh(user)) for user in node.users)
