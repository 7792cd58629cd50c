"""Run a model for evaluation many times over: everything that can be prepared is prepared once."""

import copy
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastseg.inference.classes import class_map, is_ours
from fastseg.inference.gate import Gate
from fastseg.inference.graphs import captured
from fastseg.inference.kept_memory import KeptMemory
from fastseg.io.images import first_line
from fastseg.nn.fuse.watch import ON_ALL_MODULES
from fastseg.ops.core.kept import Kept, keeping, tensors_of
from fastseg.ops.core.marks import CHECKS, Check, Marks
from fastseg.ops.core.torch_private import NORMS, tree_map_only
from fastseg.ops.cpu.onednn import why_not
from fastseg.ops.cpu.packed import PackedWeights, packed_weights
from fastseg.optimizing import Optimized
from fastseg.optimizing.bound import may_bind
from fastseg.optimizing.graph import Constants

FORWARD, PREDICT = "forward", "predict"
_OF_A_PROCESS = ("_lock", "_state", "_gate", "_memory", "_done")


class Runner:
    """Run ``model.eval()(x)`` and its class maps as fast as the device allows, without gradients.

    The runner works on a channels_last copy of the model and keeps its folded norms. A model that is not fastseg's runs
    as its optimised graph (``fastseg.optimize``), or as it is where it cannot be traced (``explain`` says why). On CUDA
    the launches of a call become one graph per shape. On a CPU, convolutions use weights packed once, and 3x3
    convolutions of 32 to 64 channels or more use Winograd's form; results differ from the model's by about 1e-5 of the
    largest output, and by more at pixels where a SegNet's pooling nearly ties. All is prepared for the shape of
    ``example``, and for another shape at its second use.

    The model stays the caller's and may be trained and changed. Each call compares it with the copy and copies it again
    if they differ in parameters and buffers, their memory, version counters, options of modules, submodules, or hooks.
    ``check`` says how to look for writes that torch does not count, through ``p.data`` in place; docs/runner.md has the
    cost of each. After a change that neither can see, such as one of a function that a module calls, call ``refresh``.

    On a CPU under glibc, a runner whose maps exceed 32 MiB keeps their memory between its calls, and gives it back when
    it goes (docs/runner.md).

    Results are the caller's to keep. A runner may be called from several threads and streams, in and out of inference
    mode; on CUDA calls run one after the other. It can be pickled and deep-copied, with its model.

    Args:
        model: any module that takes one (N, C, H, W) tensor.
        example: an input, on the model's device; run once.
        dtype: dtype of the copy: None keeps the model's; ``torch.bfloat16`` and ``torch.float16`` convert all but
            norms.
        exact: True if a CPU must not use Winograd's form: results then differ from the model's by the rounding of
            another order of summation.
        winograd: ``exact`` is ``not winograd``; deprecated.
        winograd_bytes: limit on transformed filters over all shapes, in bytes; for one shape they are 4 times the
            weights.
        max_shapes: shapes whose graphs or packed weights are kept; the least recently used are dropped.
        check: of numbers, at each call: "counts", torch's count of writes alone; "samples", 1 MiB of numbers too, the
            smaller tensors whole; "values", all numbers. None: "samples" on a CPU, "counts" elsewhere, where reading
            numbers would wait for the device. Of tensors made in inference mode all numbers are compared.

    Raises:
        TypeError: ``example`` is not a floating-point tensor.
        ValueError: ``example`` is not (N, C, H, W) or is on another device than the model; ``check`` is unknown.

    Example:
        >>> runner = Runner(model, torch.rand(1, 3, 512, 512))  # doctest: +SKIP
        >>> logits, classes = runner(x), runner.predict(x)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        *,
        dtype: torch.dtype | None = None,
        exact: bool = False,
        winograd: bool | None = None,
        winograd_bytes: int = 512 * 2**20,
        max_shapes: int = 4,
        check: Check | None = None,
    ):
        if max_shapes < 1:
            raise ValueError(f"Runner: max_shapes is {max_shapes}; give 1 or more")
        if check is not None and check not in CHECKS:
            raise ValueError(f"Runner: check is {check!r}; use one of {', '.join(CHECKS)}, or None")
        self.model, self.dtype, self.max_shapes, self.check = model, dtype, max_shapes, check
        if winograd is not None:
            warnings.warn("Runner: winograd= is deprecated; give exact=True for winograd=False", DeprecationWarning, 2)
            exact = not winograd
        self.exact, self.winograd_bytes = exact, winograd_bytes
        self._seen: OrderedDict[tuple, None] = OrderedDict()  # shapes, the last used last
        self._start()
        self._check(example)
        self._seen[tuple(example.shape)] = None
        self(example)

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._state: _State | None = None
        self._gate = Gate()
        self._memory = KeptMemory()
        self._done: torch.cuda.Event | None = None  # of the last replay, on whatever stream

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _OF_A_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def __call__(self, x: Tensor, *, out: Tensor | None = None) -> Any:
        """``model.eval()(x)`` for x (N, C, H, W), which is converted to the runner's dtype if it has another.

        ``out`` receives the result, if that is one tensor; it must have its shape.
        """
        return self._run(FORWARD, x, out)

    def predict(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The class map of x (N, C, H, W): ``model.predict(x)`` of fastseg's models, of any other its logits' argmax
        at the size of ``x``."""
        return self._run(PREDICT, x, out)

    def explain(self) -> str:
        """What the graph of the last shape that was prepared is made of; see ``fastseg.optimize``."""
        found = [] if self._state is None else [made for made, _ in self._state.shapes.values()]
        text = found[-1].explain() if found else "no graph: a model of fastseg, or one that was just changed"
        on_cpu = all(t.device.type == "cpu" for t in tensors_of(self.model))
        why = why_not(self.dtype) if on_cpu and self.dtype is not None else ""
        return (
            f"{text}\n{self.dtype} is not packed on this processor and may be slower than float32: {why}"
            if why
            else text
        )

    def refresh(self) -> None:
        """Copy the model again at the next call."""
        with self._lock:
            self._drop()

    def _run(self, method: str, x: Tensor, out: Tensor | None) -> Any:
        self._check(x)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if not captures(x):  # nothing is shared except what is prepared once: calls may overlap
                returns, state = self._returns(x), self._current()
                if returns and state.wants(x):
                    with self._gate.alone():  # a tracer changes what every thread's modules do
                        state.prepare(x)
                with self._gate, self._memory.call(again=returns):
                    result = state.call(method, x, packed=returns)
                return result if out is None else _into(out, result)
            with self._lock, torch.cuda.device_of(x):
                stream = torch.cuda.current_stream()
                if self._done is not None:
                    stream.wait_event(self._done)  # its stream may still read what is written now
                result = self._replay(method, x, out)
                self._done = torch.cuda.Event()
                self._done.record(stream)
                return result

    def _replay(self, method: str, x: Tensor, out: Tensor | None) -> Any:
        """Start the device before the host checks if the model has changed; if it has, start again."""
        returns, state = self._returns(x), self._state
        called = any(ON_ALL_MODULES)  # a graph would not call the modules' hooks
        graph = None if state is None or called else state.graph(method, x)
        if graph is not None:
            result = graph(x)
            if state.marks.are_current():
                return _owned(result, out)
            torch.cuda.current_stream().synchronize()  # it reads what goes now
        state = self._current()
        if returns and state.wants(x):
            state.prepare(x)
        graph = state.captured(method, x) if returns and not called else None
        if graph is not None:
            return _owned(graph(x), out)
        result = state.call(method, x, packed=False)
        return result if out is None else _into(out, result)

    def _returns(self, x: Tensor) -> bool:
        """True if the shape was seen before."""
        with self._lock:
            shape = tuple(x.shape)
            returns = shape in self._seen
            _use(self._seen, shape, None, 8 * self.max_shapes)
            return returns

    def _current(self) -> "_State":
        """The copy of the model in its present state."""
        with self._lock:
            if self._state is None or not self._state.marks.are_current():
                again = self._state is not None
                self._drop()  # its memory goes before the new copy comes
                self._state = _State(self, changing=again)
            return self._state

    def _drop(self) -> None:
        if self._done is not None:
            self._done.synchronize()  # a replay on another stream may still read the copy
            self._done = None
        self._state = None

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"Runner: x is a {type(x).__module__}.{type(x).__qualname__}; give a floating-point tensor")
        if not x.is_floating_point():
            raise TypeError(f"Runner: x is {x.dtype}; give a floating-point tensor")
        if x.dim() != 4:
            raise ValueError(f"Runner: x is {tuple(x.shape)}; it must be (N, C, H, W)")
        device = next(chain(self.model.parameters(), self.model.buffers()), x).device
        if x.device != device:
            raise ValueError(f"Runner: x is on {x.device}, the model on {device}; move one of them")

    def __repr__(self) -> str:
        dtype = "" if self.dtype is None else f", dtype={self.dtype}"
        return f"Runner({type(self.model).__name__}{dtype}, max_shapes={self.max_shapes})"


def captures(x: Tensor) -> bool:
    """True if calls become graphs."""
    return x.device.type == "cuda"


def _owned(result: Any, out: Tensor | None) -> Any:
    """A graph's result in memory of its own, or in ``out``."""
    return tree_map_only(Tensor, torch.clone, result) if out is None else _into(out, result)


def _into(out: Tensor, result: Any) -> Tensor:
    if not isinstance(result, Tensor) or out.shape != result.shape or out.device != result.device:
        what = f"{tuple(result.shape)} on {result.device}" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"Runner: out is {tuple(out.shape)} on {out.device}, the result {what}; they must be alike")
    return out.copy_(result)


class _State:
    """A copy of a model, and everything that was prepared for it."""

    def __init__(self, runner: Runner, *, changing: bool = False):
        model = runner.model
        on_cpu = all(t.device.type == "cpu" for t in tensors_of(model))
        self.marks = Marks(model, runner.check or ("samples" if on_cpu else "counts"))
        self.copy = _converted(model, runner.dtype)
        self.kept = Kept(tensors_of(self.copy))
        self.dtype = next((p.dtype for p in self.copy.parameters() if p.is_floating_point()), None)
        self.max_shapes, self.exact, self.winograd_bytes = runner.max_shapes, runner.exact, runner.winograd_bytes
        self.lock = threading.RLock()  # of the packed weights and the optimised graphs
        self.shapes: OrderedDict[tuple, tuple[Optimized, Kept]] = OrderedDict()
        self.constants = Constants()
        self.ours = is_ours(model)
        self.changing = changing  # the model was written to: a graph is made once it stays the same for a call
        self.packs: OrderedDict[tuple, PackedWeights] = OrderedDict()
        self.bound: OrderedDict[tuple, tuple[PackedWeights, Optimized]] = OrderedDict()
        self.graphs: OrderedDict[tuple, dict[str, _Graph | None]] = OrderedDict()  # None: it could not be captured
        self.pool: tuple[int, int] | None = None  # of all graphs: one is replayed at a time, and its results copied

    def call(self, method: str, x: Tensor, *, packed: bool) -> Any:
        """The method's result, its convolutions with ``packed`` weights on a CPU."""
        shape, self.changing = tuple(x.shape), False
        with self.lock:
            model, kept = self.shapes.get(shape, (self.copy, self.kept))
        packs = self._packs(shape, kept) if packed and x.device.type == "cpu" else None
        x = self.like_copy(x)
        if packs is not None and isinstance(model, Optimized) and model.fused is not None and may_bind(x):
            model = self._bound(shape, model, packs, x)
        with keeping(kept) if packs is None else packed_weights(packs):
            return model(x) if method == FORWARD else class_map(model, x)

    def like_copy(self, x: Tensor) -> Tensor:
        """``x`` in the dtype and the layout of the copy."""
        return x.to(dtype=self.dtype or x.dtype, memory_format=torch.channels_last)

    def wants(self, x: Tensor) -> bool:
        """True if a graph is to be traced for inputs like ``x``."""
        return not (self.ours or self.changing or tuple(x.shape) in self.shapes)

    def prepare(self, x: Tensor) -> None:
        """Trace and optimise the copy for inputs like ``x``; no other thread may run modules meanwhile."""
        with self.lock:
            if self.wants(x):
                inputs = (self.like_copy(x),)
                made = Optimized(self.copy, inputs, sizes="given", constants=self.constants)
                _use(self.shapes, tuple(x.shape), (made, Kept(tensors_of(made))), self.max_shapes)
                self.packs.pop(tuple(x.shape), None)

    def _bound(self, shape: tuple, model: Optimized, packs: PackedWeights, x: Tensor) -> Optimized:
        """The graph for a shape, its convolutions bound to what was packed."""
        with self.lock:
            given, found = self.bound.get(shape, (None, model))
            if given is not packs:
                with packed_weights(packs):
                    found = model.bound((x,), packs)
            _use(self.bound, shape, (packs, found), self.max_shapes)
            return found

    def _packs(self, shape: tuple, kept: Kept) -> PackedWeights:
        """The packed weights for a shape."""
        with self.lock:
            packs = self.packs.get(shape)
            if packs is None:
                left = self.winograd_bytes - sum(other.transformed for other in self.packs.values())
                packs = PackedWeights(kept, winograd=not self.exact, most_bytes=left)
            _use(self.packs, shape, packs, self.max_shapes)
            return packs

    def graph(self, method: str, x: Tensor) -> "_Graph | None":
        """The graph that was captured for inputs like ``x``."""
        graphs = self.graphs.get(tuple(x.shape), {})
        if graphs:
            self.graphs.move_to_end(tuple(x.shape))
        return graphs.get(method)

    def captured(self, method: str, x: Tensor) -> "_Graph | None":
        """The graph for inputs like ``x``, captured now if there is none; None if it cannot be captured."""
        graphs = self.graphs.get(tuple(x.shape), {})
        if method not in graphs:
            graphs[method] = self.capture(method, x)
        _use(self.graphs, tuple(x.shape), graphs, self.max_shapes)
        return graphs[method]

    def capture(self, method: str, x: Tensor) -> "_Graph | None":
        """A graph for inputs like ``x``, or None, with a warning: calls then launch one by one."""
        function = lambda static: self.call(method, static, packed=False)
        x = self.like_copy(x)
        self.pool = torch.cuda.graph_pool_handle() if self.pool is None else self.pool
        try:
            return _Graph(function, x, self.pool)
        except torch.OutOfMemoryError:
            self.graphs.clear()  # their memory may be all that is missing
            torch.cuda.empty_cache()
        except RuntimeError as error:
            return _not_captured(x, error)
        try:
            return _Graph(function, x, self.pool)
        except RuntimeError as error:
            torch.cuda.empty_cache()
            return _not_captured(x, error)


def _not_captured(x: Tensor, error: RuntimeError) -> None:
    warnings.warn(f"Runner: no graph for {tuple(x.shape)}, calls launch one by one: {first_line(error)}", stacklevel=2)


class _Graph:
    """One captured call with an input buffer of its own."""

    def __init__(self, function: Callable[[Tensor], Any], x: Tensor, pool: tuple[int, int]):
        self.input = x.clone(memory_format=torch.channels_last)
        self.replay = captured(lambda: function(self.input), pool)

    def __call__(self, x: Tensor) -> Any:
        """The result for ``x``, in memory that the next replay writes to."""
        self.input.copy_(x)
        return self.replay()


def _use(kept: OrderedDict, key: tuple, value: Any, most: int) -> None:
    """Store ``value`` as the last used; drop the least recently used beyond ``most``."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)


def _converted(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy for evaluation, in channels_last; all but its norms are in ``dtype``."""
    out = copy.deepcopy(model).eval().requires_grad_(False)
    if dtype is not None:
        norms = (*NORMS, nn.GroupNorm, nn.LayerNorm)
        for module in out.modules():
            if not isinstance(module, norms):
                for tensors in (module._parameters, module._buffers):
                    for name, t in tensors.items():
                        if t is not None and t.is_floating_point():
                            cast = t.to(dtype)
                            tensors[name] = nn.Parameter(cast, False) if isinstance(t, nn.Parameter) else cast
    return out.to(memory_format=torch.channels_last)
