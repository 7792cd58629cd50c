"""``optimize``: a model's evaluation graph with everything fused that fastseg knows how to fuse."""

import copy
import inspect
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastseg.nn.fuse.watch import ON_ALL_MODULES
from fastseg.ops.core.marks import Marks
from fastseg.ops.core.torch_private import tree_leaves
from fastseg.ops.cpu.packed import PackedWeights
from fastseg.ops.logits import classes_of, logits_of
from fastseg.optimizing.bound import bound
from fastseg.optimizing.graph import Constants, Work
from fastseg.optimizing.passes.order import PASSES
from fastseg.optimizing.passes.upsample_argmax import class_graph
from fastseg.optimizing.proof import counted, difference, failure
from fastseg.optimizing.report import Counts, Row, table
from fastseg.optimizing.trace import Holds, Sizes, Untraceable, trace

TRACED_HOOKS = ("transformers",)  # libraries whose own hooks only hand on what forward gives: a trace holds them


def optimize(model: nn.Module, example: Tensor | tuple[Tensor, ...], *, sizes: Sizes = "free") -> "Optimized":
    """A module that gives what ``model.eval()`` gives, from a graph with fused calls.

    The model is traced in evaluation, and passes rewrite its graph: norms are folded, convolutions take their
    activation and residual, decoders multiply before they upsample. Each pass is proved on ``example``: results that
    differ from the model's by more than rounding (2e-4 of the largest value in fp32, 1e-10 in fp64) undo it.

    The result is a snapshot: it holds the weights as they are now, folded, and does not see later changes;
    ``Optimized.stale`` says if there were any, and a ``fastseg.inference.Runner`` looks at each call. It runs without
    gradients, and is always in evaluation.

    Args:
        model: any module; it is not changed.
        example: the input, or the inputs, of one call, tensors on the model's device.
        sizes: "free" traces with free batch, height and width as far as the model allows; "given" with those of the
            example, in less time. Calls of other sizes run the model as it is.

    Returns:
        ``Optimized``, with the model's signature and structure of results. A model that cannot be traced runs as it
        is; ``explain`` says why.

    Raises:
        TypeError: ``model`` is no module, or ``example`` no tensor and no tuple of tensors.
        ValueError: ``sizes`` is unknown.

    Example:
        >>> fast = fastseg.optimize(model, torch.rand(1, 3, 512, 512))  # doctest: +SKIP
        >>> print(fast.explain())  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: model is a {type(model).__qualname__}; give a torch.nn.Module")
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError("optimize: example must be a tensor or a tuple of tensors")
    if sizes not in ("free", "given"):
        raise ValueError(f'optimize: sizes is {sizes!r}; use "free" or "given"')
    own = copy.deepcopy(model).eval().requires_grad_(False)
    return Optimized(own, tuple(x.detach() for x in inputs), sizes=sizes, marks=Marks(model, "samples"))


class Optimized(nn.Module):
    """A model and its optimised graph; made by ``optimize``.

    Calls that the graph does not hold for (other sizes than it allows, further arguments, inputs that want gradients)
    run the model as it was.

    Attributes:
        model: the model in evaluation.
        rows: what each pass did.
        notes: what the graph does not hold for, and why; the reason if there is no graph.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Tensor, ...],
        *,
        sizes: Sizes = "free",
        marks: Marks | None = None,
        constants: Constants | None = None,
        passes: Sequence[ModuleType] = PASSES,
    ):
        super().__init__()
        self.model = model.eval()
        self.rows: list[Row] = []
        self.notes: tuple[str, ...] = ()
        self.holds: Holds | None = None
        self.fused: Any = None
        self.classes: Any = None  # of the class map, if the graph ends in a bilinear resize
        self._marks = marks
        self._made_of = (model, inputs, sizes)
        self._names = _names(model)
        if hooked := _hooked(model):
            self.notes = (f"runs as it is: {hooked} has hooks, which a graph would not call",)
            return
        with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            try:
                traced = trace(model, inputs, sizes)
            except Untraceable as error:
                self.notes = (f"runs as it is: {error}",)
                return
            work, self.rows, why = improved(Work(traced.module, constants or Constants()), model, inputs, passes)
        if why:
            self.notes = (*traced.notes, f"runs as it is: {why}")
            return
        self.notes, self.holds, self.unflatten, self.fused = traced.notes, traced.holds, traced.unflatten, work.module
        ending = class_graph(work, self._logits(inputs))
        self.classes = None if ending is None else ending.module
        for module in (work.module, self.classes):
            for node in () if module is None else module.graph.nodes:
                node.meta.clear()

    def _logits(self, inputs: tuple[Tensor, ...]) -> int | None:
        """Which of the graph's results is the map of logits."""
        found = list(self.fused(*inputs))
        logits = logits_of(self.unflatten(found))
        return next((i for i, each in enumerate(found) if each is logits), None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``model(*args, **kwargs)`` returns."""
        inputs = self._inputs(args, kwargs)
        if inputs is None:
            return self.model(*args, **kwargs)
        with torch.no_grad():
            return self.unflatten(self.fused(*inputs))

    def predict(self, x: Tensor, *, confidence: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Class of each pixel of x (N, C, H, W), as ``fastseg.predict(model, x)``.

        Returns:
            (N, H, W), uint8 for up to 256 classes, else int64. With ``confidence`` a pair: it, and the probability of
            each pixel's class, (N, H, W) float32.

        Raises:
            TypeError: the output holds no logits (N, classes, h, w).
        """
        with torch.no_grad():
            if self.classes is not None and not confidence and not self.why_not(x):
                found = self.classes(x)
                if found.shape[-2:] == x.shape[-2:]:
                    return found
            return classes_of(self(x), (x.shape[-2], x.shape[-1]), type(self.model).__name__, confidence=confidence)

    def why_not(self, *args: Any, **kwargs: Any) -> str:
        """Why a call with these arguments runs the model as it was, or ""."""
        if self.fused is None or self.holds is None:
            return self.notes[-1]
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values())
        ):
            return "an input wants a gradient"
        if any(ON_ALL_MODULES):
            return "all modules have hooks, which a graph would not call"
        inputs = (*args, *kwargs.values())
        if tuple(self._names[len(args) : len(inputs)]) != tuple(kwargs) or len(inputs) != len(self.holds.kinds):
            return "other arguments than the example's"
        return self.holds.why_not(inputs)

    def _inputs(self, args: tuple, kwargs: dict) -> tuple | None:
        return None if self.why_not(*args, **kwargs) else (*args, *kwargs.values())

    def bound(self, inputs: tuple[Tensor, ...], packs: PackedWeights) -> "Optimized":
        """The same for inputs of these shapes alone, its convolutions bound to ``packs``: for calls inside
        ``packed_weights(packs)`` where ``may_bind`` says so."""
        new = Optimized.__new__(Optimized)
        vars(new).update(vars(self))
        new._modules = dict(self._modules)
        new.fused = bound(self.fused, inputs, packs)
        new.classes = None if self.classes is None else bound(self.classes, inputs, packs)
        return new

    def stale(self) -> bool:
        """True if the model that ``optimize`` was given has changed since, as far as 1 MiB of its numbers shows it."""
        return self._marks is not None and not self._marks.are_current()

    def explain(self) -> str:
        """A table: each pass, what it matched, and products, bytes and launches of the example before and after."""
        return "\n".join([table(self.rows), *self.notes])

    def train(self, mode: bool = True) -> "Optimized":
        """Stays in evaluation."""
        return self

    def __reduce__(self) -> tuple:
        """Pickled and copied are the model and the example; the graph is made again."""
        return _again, self._made_of


def _again(model: nn.Module, inputs: tuple[Tensor, ...], sizes: Sizes) -> Optimized:
    return Optimized(model, inputs, sizes=sizes, marks=Marks(model, "samples"))


def improved(
    work: Work, model: nn.Module, inputs: tuple[Tensor, ...], passes: Sequence[ModuleType]
) -> tuple[Work, list[Row], str]:
    """The graph after every pass that holds, what each did, and why the trace itself does not hold, or ""."""
    want = tree_leaves(model(*inputs))
    rows: list[Row] = []
    try:
        got, before = counted(work, inputs)
    except Exception as error:
        return work, rows, f"the trace fails: {failure(error)}"
    wrong = difference(got, [each for each in want if each is not None])
    if wrong:
        return work, rows, f"the trace {wrong}"
    for each in passes:
        work, row = _after(each, work, inputs, got, before)
        rows.append(row)
        before = row.after if row.after is not None and not row.note else before
    return work, rows, ""


def _after(each: ModuleType, work: Work, inputs: tuple[Tensor, ...], want: list, before: Counts) -> tuple[Work, Row]:
    devices = getattr(each, "DEVICES", None)
    if devices is not None and inputs[0].device.type not in devices:
        return work, Row(each.NAME, (), note=f"pays on {', '.join(devices)} only")
    new, after, matches = work.clone(), None, ()
    try:
        matches = tuple(each.run(new))
        if not matches:
            return work, Row(each.NAME, ())
        new.clean()
        got, after = counted(new, inputs)
        wrong = difference(got, want)
    except Exception as error:  # a pass that fails is undone
        wrong = failure(error)
    if wrong:
        return work, Row(each.NAME, matches, before, after, f"undone: {wrong}")
    return new, Row(each.NAME, matches, before, after)


def _hooked(model: nn.Module) -> str:
    """The name of a module with forward hooks, or ""."""
    if any(ON_ALL_MODULES):
        return "every module"
    for name, each in model.named_modules():
        hooks = (*each._forward_hooks.values(), *each._forward_pre_hooks.values())
        if any(getattr(hook, "__module__", "").split(".")[0] not in TRACED_HOOKS for hook in hooks):
            return name or type(each).__name__
    return ""


def _names(model: nn.Module) -> list[str]:
    """The names of the arguments by place."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [each.name for each in parameters if each.kind in kinds]
