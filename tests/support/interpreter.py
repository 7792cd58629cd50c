"""A checker for Triton's interpreter: out-of-bounds accesses and races between programs; and
bf16 ``tl.dot`` and ``tl.fma`` put right.

``install()`` hooks the interpreter's memory functions. Every access of a launch must lie inside the span of one tensor
argument, and is logged; after the launch, an address that two programs touched, at least one of them writing, is a race
unless all accesses were atomic. Not seen: accesses to the gaps of a strided view; scratch memory of ``set_allocator``;
accesses of different widths that overlap without starting at one address. A lock around plain accesses is a false race.
"""

import bisect
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as I
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

LOAD, STORE, ATOMIC = "load", "store", "atomic"


class OutOfBoundsError(InterpreterError):
    """A load, store or atomic outside every tensor argument."""


class RaceError(InterpreterError):
    """Two programs touched one address, not only by loads and not only by atomics."""


class Access(NamedTuple):
    kind: str
    span: int  # index into the launch's spans
    addresses: np.ndarray  # of the active elements, as uint64, in any order, with repetitions
    width: int  # bytes per element
    program: int  # running number
    line: int


class Launch:
    """One launch: the address spans of its arguments, and the accesses made."""

    def __init__(self, fn: Callable):
        self.name = fn.__name__
        self.file = fn.__code__.co_filename
        self.lo: list[int] = []  # first byte of each span, ascending
        self.hi: list[int] = []  # one past its last byte
        self.programs: list[tuple[int, int, int]] = []
        self.log: list[Access] = []
        self.patched: dict[Callable, Any] = {}

    def add_spans(self, tensors: list[Tensor]) -> None:
        """The bytes that the launch may touch; overlapping arguments (aliases) make one span."""
        for lo, hi in sorted(_byte_span(t) for t in tensors):
            if self.hi and lo < self.hi[-1]:
                self.hi[-1] = max(self.hi[-1], hi)
            else:
                self.lo.append(lo)
                self.hi.append(hi)

    def access(self, kind: str, ptrs: Any, mask: Any, width: int) -> None:
        """Check one access of the running program, and log it."""
        addresses = np.asarray(ptrs, dtype=np.uint64)
        if mask is not None:
            # of a descriptor's load it is the array's memory; a scalar i1 that was splat is int32 (Triton 3.7)
            mask = np.asarray(mask).astype(bool, copy=False)
            if not mask.all():
                addresses = addresses[mask if mask.shape == addresses.shape else np.broadcast_to(mask, addresses.shape)]
        addresses = addresses.reshape(-1)
        if addresses.size == 0:
            return
        program = I.interpreter_builder.grid_idx
        if not self.programs or self.programs[-1] != program:
            self.programs.append(program)
        line = self._line()
        number = len(self.programs) - 1
        span = bisect.bisect_right(self.lo, int(addresses.min())) - 1
        if span >= 0 and int(addresses.max()) + width <= self.hi[span]:
            self.log.append(Access(kind, span, addresses, width, number, line))
            return
        spans = np.searchsorted(np.array(self.lo, dtype=np.uint64), addresses, side="right").astype(np.int64) - 1
        ends = np.array([0, *self.hi], dtype=np.uint64)[spans + 1]
        bad = addresses + np.uint64(width) > ends
        if bad.any():
            raise OutOfBoundsError(
                f"{self.name}: {kind} of {int(bad.sum())} elements outside every tensor argument, in program "
                f"{program}, {self.file}:{line}; the first is {self._nearest(int(addresses[bad][0]))}"
            )
        for span in np.unique(spans):
            self.log.append(Access(kind, int(span), addresses[spans == span], width, number, line))

    def check_races(self) -> None:
        """Raise for the first address that two programs touched in conflict."""
        written = {a.span for a in self.log if a.kind != LOAD}
        if len(self.programs) < 2 or not written:
            return
        for span in sorted(written):
            self._check_span(span)

    def _check_span(self, span: int) -> None:
        log = [a for a in self.log if a.span == span]
        size, lo = self.hi[span] - self.lo[span], np.uint64(self.lo[span])
        first = np.full(size, -1, dtype=np.int32)  # program that touched the address first
        shared, wrote, plain = (np.zeros(size, dtype=bool) for _ in range(3))
        for a in log:
            at = (a.addresses - lo).astype(np.int64)
            earlier = first[at]
            shared[at] |= (earlier >= 0) & (earlier != a.program)
            first[at] = np.where(earlier < 0, a.program, earlier)
            if a.kind != LOAD:
                wrote[at] = True
            if a.kind != ATOMIC:
                plain[at] = True
        race = shared & wrote & plain
        if race.any():
            address = self.lo[span] + int(race.argmax())
            seen = {(a.kind, self.programs[a.program], a.line): None for a in log if (a.addresses == address).any()}
            accesses = "; ".join(f"{kind} by program {program}, line {line}" for kind, program, line in list(seen)[:4])
            raise RaceError(
                f"{self.name}: race on {int(race.sum())} addresses, in {self.file}: on the first, {accesses}"
                + (f" and {len(seen) - 4} more" if len(seen) > 4 else "")
            )

    def _line(self) -> int:
        frame = sys._getframe(3)
        while frame is not None and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        return frame.f_lineno if frame is not None else 0

    def _nearest(self, address: int) -> str:
        after = bisect.bisect_right(self.lo, address)
        near = [(max(address - hi, 0), "past the end of an argument") for hi in self.hi[:after][-1:]]
        near += [(lo - address, "before the start of an argument") for lo in self.lo[after:][:1]]
        distance, where = min(near, default=(address, "from nothing: no argument has elements"))
        return f"{distance} bytes {where}"


_launch: Launch | None = None  # the one that is running
listeners: list[Callable[[Launch], None]] = []  # called after each launch that passed


def install() -> None:
    """Switch the checker, the bf16 dot and the fma on, for this process. Does nothing the second time."""
    if isinstance(I._interpreter, _CheckedMemory):
        return
    I._interpreter = _CheckedMemory(I._interpreter)
    I.GridExecutor._init_args_hst = _recording(I.GridExecutor._init_args_hst)
    I.GridExecutor.__call__ = _checking(I.GridExecutor.__call__)
    I.InterpreterBuilder.create_dot = _widening(I.InterpreterBuilder.create_dot)
    I.InterpreterBuilder.create_masked_load = _undefined_where_masked(I.InterpreterBuilder.create_masked_load)
    I.InterpreterBuilder.create_fma = _rounded_once
    I._patch_lang = _once_per_launch(I._patch_lang)


def _rounded_once(self, x, y, z):
    """``tl.fma``, which Triton's interpreter rounds twice."""
    wide = np.float64 if x.data.dtype.itemsize < 8 else np.longdouble
    result = x.data.astype(wide) * y.data + z.data
    return I.TensorHandle(result.astype(x.data.dtype), z.dtype.scalar)


def installed() -> bool:
    """Whether launches are being checked."""
    return isinstance(I._interpreter, _CheckedMemory)


class _CheckedMemory:
    """The interpreter's native module; its memory functions check first."""

    def __init__(self, native: Any):
        self._native = native

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def load(self, ptrs, mask, other, dtype):
        if _launch is not None:
            _launch.access(LOAD, ptrs, mask, np.dtype(dtype).itemsize)
        return self._native.load(ptrs, mask, other, dtype)

    def store(self, ptrs, value, mask):
        if _launch is not None:
            _launch.access(STORE, ptrs, mask, value.dtype.itemsize)
        return self._native.store(ptrs, value, mask)

    def atomic_rmw(self, op, ptrs, val, mask, sem):
        if _launch is not None:
            _launch.access(ATOMIC, ptrs, mask, val.dtype.itemsize)
        return self._native.atomic_rmw(op, ptrs, val, mask, sem)

    def atomic_cas(self, ptrs, cmp, val, sem):
        if _launch is not None:
            _launch.access(ATOMIC, ptrs, None, val.dtype.itemsize)
        return self._native.atomic_cas(ptrs, cmp, val, sem)


def _recording(original: Callable) -> Callable:
    @functools.wraps(original)
    def init_args_hst(self, args_dev, kwargs):
        args, kwargs = original(self, args_dev, kwargs)
        if _launch is not None:
            _launch.add_spans([t for t in _tensors([*args, *kwargs.values()]) if t.numel() > 0])
        return args, kwargs

    return init_args_hst


def _checking(original: Callable) -> Callable:
    @functools.wraps(original)
    def call(self, *args, **kwargs):
        global _launch
        launch = _launch = Launch(self.fn)
        try:
            original(self, *args, **kwargs)
        except InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OutOfBoundsError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None  # the interpreter wraps what a kernel raises, once per device function
        finally:
            _launch = None
        launch.check_races()
        for listener in listeners:
            listener(launch)

    return call


def _widening(original: Callable) -> Callable:
    @functools.wraps(original)
    def create_dot(self, a, b, *args):
        return original(self, _widened(a), _widened(b), *args)

    return create_dot


def _widened(handle: Any) -> Any:
    """A bf16 operand in fp32: the interpreter keeps the 16 bits as integers, and would multiply those."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.view(np.uint16).astype(np.uint32) << np.uint32(16)
    return I.TensorHandle(bits.view(np.float32), tl.float32)


def _undefined_where_masked(original: Callable) -> Callable:
    """A masked load without ``other`` gives 0 in the interpreter, anything on a GPU: here NaN, or -1 of integers."""

    @functools.wraps(original)
    def create_masked_load(self, ptrs, mask, other, *args, **kwargs):
        if other is None and _launch is not None:
            dtype = I._get_np_dtype(ptrs.get_element_ty())
            ones = np.frombuffer(b"\xff" * np.dtype(dtype).itemsize, dtype)[0]
            other = I.TensorHandle(np.full(np.shape(ptrs.data), ones, dtype), ptrs.get_element_ty())
        return original(self, ptrs, mask, other, *args, **kwargs)

    return create_masked_load


def _once_per_launch(original: Callable) -> Callable:
    """Triton replaces the functions of ``tl`` anew at each call of a device function: half of a light kernel's time."""

    @functools.wraps(original)
    def patch_lang(fn):
        if _launch is None:
            return original(fn)
        if fn not in _launch.patched:
            _launch.patched[fn] = original(fn)
        return _launch.patched[fn]

    return patch_lang


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, TensorDescriptor):
            yield from _tensors([value.base])
        elif hasattr(value, "data_ptr"):
            yield I._unwrap_tensor(value)


def _byte_span(t: Tensor) -> tuple[int, int]:
    elements = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + elements * t.element_size()
