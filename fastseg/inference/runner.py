"""A model that is run for evaluation many times over: everything that can be made once is made once."""

import copy
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastseg.inference.graphs import captured
from fastseg.inference.images import first_line
from fastseg.ops._cpu_conv import PackedWeights, packed_weights

FORWARD, PREDICT = "forward", "predict"


class Runner:
    """Runs ``model.eval()(x)`` and ``model.predict(x)`` as fast as the device does them, without gradients.

    It works on a copy of the model in channels_last, whose norms are folded. On CUDA the launches of a call become one
    graph per shape. On a CPU convolutions take weights packed once, and 3x3 convolutions of 32 to 64 channels and more
    Winograd's form (differences to the model of about 1e-5 of the largest output, more at pixels where a SegNet's
    pooling nearly ties); that is done for ``example``'s shape and for those that come a second time.

    The model stays the caller's: it may be trained on. A call compares versions and addresses of its parameters and
    buffers with those of the copy, and copies again if one differs. Only writes through ``p.data`` in place, which
    torch does not count, and hooks or submodules that were exchanged are not seen: call ``refresh``.

    Results are the caller's to keep. A runner may be called from several threads and streams; on CUDA one call runs
    after the other.

    Args:
        model: any module that takes one (N, C, H, W) tensor.
        example: an input, on the model's device; run once.
        dtype: of the copy: None keeps the model's; ``torch.bfloat16`` and ``torch.float16`` convert all but norms.
        winograd: whether a CPU may take Winograd's form.
        winograd_bytes: of transformed filters at most, for all shapes; for one they are 4 times the weights.
        max_shapes: whose graphs or packed weights are kept; the least recently used are dropped.

    Raises:
        TypeError: ``example`` is no floating-point tensor.
        ValueError: it is not (N, C, H, W), or on another device than the model.

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
        winograd: bool = True,
        winograd_bytes: int = 512 * 2**20,
        max_shapes: int = 4,
    ):
        if max_shapes < 1:
            raise ValueError(f"Runner: max_shapes is {max_shapes}; give 1 or more")
        self.model, self.dtype, self.max_shapes = model, dtype, max_shapes
        self.winograd, self.winograd_bytes = winograd, winograd_bytes
        self._lock = threading.RLock()
        self._state: _State | None = None
        self._done: torch.cuda.Event | None = None  # of the last replay, on whatever stream
        self._check(example)
        self._current().seen[tuple(example.shape)] = None
        self(example)

    def __call__(self, x: Tensor) -> Any:
        """``model.eval()(x)``, x (N, C, H, W); converted to the runner's dtype if it has another."""
        return self._run(FORWARD, x)

    def predict(self, x: Tensor) -> Tensor:
        """``model.predict(x)``: the class map of x (N, C, H, W)."""
        if not hasattr(self.model, "predict"):
            raise TypeError(f"Runner: {type(self.model).__name__} has no predict")
        return self._run(PREDICT, x)

    def refresh(self) -> None:
        """Copy the model again at the next call."""
        with self._lock:
            self._state = None

    def _run(self, method: str, x: Tensor) -> Any:
        self._check(x)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if not captures(x):  # nothing is shared but what is made once: calls may overlap
                return self._current().call(method, x)
            with self._lock, torch.cuda.device_of(x):
                stream = torch.cuda.current_stream()
                if self._done is not None:
                    stream.wait_event(self._done)  # its stream may still read what is written or dropped now
                result = self._current().replay(method, x)
                self._done = torch.cuda.Event()
                self._done.record(stream)
                return result

    def _current(self) -> "_State":
        """The copy of the model as it is now."""
        with self._lock:
            if self._state is None or not self._state.is_current():
                seen = None if self._state is None else self._state.seen
                self._state = None  # its memory goes before the new copy comes
                self._state = _State(self.model, self.dtype, self.max_shapes, self.winograd, self.winograd_bytes, seen)
            return self._state

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"Runner: x is {getattr(x, 'dtype', type(x).__name__)}; give a floating-point tensor")
        if x.dim() != 4:
            raise ValueError(f"Runner: x is {tuple(x.shape)}; it must be (N, C, H, W)")
        device = next(chain(self.model.parameters(), self.model.buffers()), x).device
        if x.device != device:
            raise ValueError(f"Runner: x is on {x.device}, the model on {device}; move one of them")

    def __repr__(self) -> str:
        dtype = "" if self.dtype is None else f", dtype={self.dtype}"
        return f"Runner({type(self.model).__name__}{dtype}, max_shapes={self.max_shapes})"


def captures(x: Tensor) -> bool:
    """Whether calls become graphs."""
    return x.device.type == "cuda"


class _State:
    """A copy of a model, and all that was made for it."""

    def __init__(self, model: nn.Module, dtype, max_shapes: int, winograd: bool, winograd_bytes: int, seen):
        self.marks = _marks(model)
        self.copy = _converted(model, dtype)
        self.dtype = next((p.dtype for p in self.copy.parameters() if p.is_floating_point()), None)
        self.max_shapes = max_shapes
        self.lock = threading.Lock()  # of the next two
        self.seen: OrderedDict[tuple, None] = OrderedDict() if seen is None else seen  # shapes, the last used last
        self.packs: OrderedDict[tuple, PackedWeights] = OrderedDict()
        self.graphs: OrderedDict[tuple, _Graph | None] = OrderedDict()  # None: it could not be captured
        self.winograd, self.winograd_bytes = winograd, winograd_bytes

    def is_current(self) -> bool:
        """Whether nobody wrote to the model since."""
        for holder, name, tensor, address, version in self.marks:
            if holder.get(name) is not tensor or tensor.data_ptr() != address:
                return False
            if version is not None and tensor._version != version:
                return False
        return True

    def call(self, method: str, x: Tensor) -> Any:
        """The method's result, its convolutions with packed weights where ``x`` has a shape that returns."""
        packs = self._packs(tuple(x.shape)) if x.device.type == "cpu" else None
        x = x.to(dtype=self.dtype or x.dtype, memory_format=torch.channels_last)
        run = self.copy if method == FORWARD else self.copy.predict
        if packs is None:
            return run(x)
        with packed_weights(packs):
            return run(x)

    def _packs(self, shape: tuple) -> PackedWeights | None:
        """The packed weights for a shape; None at its first call."""
        with self.lock:
            returns = shape in self.seen
            _use(self.seen, shape, None, 8 * self.max_shapes)
            if not returns:
                return None
            packs = self.packs.get(shape)
            if packs is None:
                left = self.winograd_bytes - sum(other.transformed for other in self.packs.values())
                packs = PackedWeights(winograd=self.winograd, most_bytes=left)
            _use(self.packs, shape, packs, self.max_shapes)
            return packs

    def replay(self, method: str, x: Tensor) -> Any:
        """The method's result as a graph, captured at the first call of a shape."""
        key = (method, tuple(x.shape))
        graph = self.graphs[key] if key in self.graphs else self.capture(method, x)
        _use(self.graphs, key, graph, self.max_shapes)
        return self.call(method, x) if graph is None else graph(x)

    def capture(self, method: str, x: Tensor) -> "_Graph | None":
        """A graph for inputs like ``x``, or None, with a warning: calls then launch one by one."""
        function = lambda static: self.call(method, static)
        x = x.to(dtype=self.dtype or x.dtype, memory_format=torch.channels_last)
        try:
            return _Graph(function, x)
        except torch.OutOfMemoryError:
            self.graphs.clear()  # their memory may be all that is missing
            torch.cuda.empty_cache()
        except RuntimeError as error:
            return _not_captured(x, error)
        try:
            return _Graph(function, x)
        except RuntimeError as error:
            torch.cuda.empty_cache()
            return _not_captured(x, error)


def _not_captured(x: Tensor, error: RuntimeError) -> None:
    warnings.warn(f"Runner: no graph for {tuple(x.shape)}, calls launch one by one: {first_line(error)}", stacklevel=6)


class _Graph:
    """One captured call with buffers of its own."""

    def __init__(self, function: Callable[[Tensor], Any], x: Tensor):
        self.input = x.clone(memory_format=torch.channels_last)
        self.replay = captured(lambda: function(self.input))

    def __call__(self, x: Tensor) -> Any:
        """The result for ``x``, in memory of its own."""
        self.input.copy_(x)
        return tree_map_only(Tensor, torch.clone, self.replay())


def _use(kept: OrderedDict, key: tuple, value: Any, most: int) -> None:
    """Keep ``value`` as the last used; drop the least recently used past ``most``."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)


class _Mark(NamedTuple):
    """Where a module holds a parameter or buffer, where its numbers lie, and how often they were written to."""

    holder: dict[str, Tensor | None]
    name: str
    tensor: Tensor  # held, so that no other takes its place in memory
    address: int
    version: int | None  # None: made in inference mode, where writes are not counted


def _marks(model: nn.Module) -> list[_Mark]:
    return [
        _Mark(holder, name, t, t.data_ptr(), None if t.is_inference() else t._version)
        for module in model.modules()
        for holder in (module._parameters, module._buffers)
        for name, t in holder.items()
        if t is not None
    ]


def _converted(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy for evaluation, in channels_last; all but its norms in ``dtype``."""
    out = copy.deepcopy(model).eval().requires_grad_(False)
    if dtype is not None:
        norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
        for module in out.modules():
            if not isinstance(module, norms):
                for tensors in (module._parameters, module._buffers):
                    for name, t in tensors.items():
                        if t is not None and t.is_floating_point():
                            cast = t.to(dtype)
                            tensors[name] = nn.Parameter(cast, False) if isinstance(t, nn.Parameter) else cast
    return out.to(memory_format=torch.channels_last)
