"""The interpreter's commonest operations in a few steps of numpy, with the results of Triton's own steps.

Triton checks, converts and broadcasts the two operands of an operator in some sixty calls of Python, and makes four
tensors on the way to the fifth. What they decide follows from two types, or from a type and a number: here it is
decided once, and the operator is the conversion, if there is one, and one call of numpy, which broadcasts by itself.

Every result has Triton's type, shape and bits, and what its handle says of it. Types that are not in ``NUMPY``, numbers
out of range and whatever raises go to Triton's own steps. ``tests/kernels/test_quick_interpreter.py`` compares the two.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as I

core, semantic, builder = tl.core, I.interpreter_semantic, I.interpreter_builder
tensor, block_type, pointer_type, constexpr = core.tensor, core.block_type, core.pointer_type, core.constexpr
dtypes = [tl.int1, tl.int8, tl.uint8, tl.int16, tl.uint16, tl.int32, tl.uint32, tl.int64, tl.uint64]
NUMPY = {dtype.name: I._get_np_dtype(dtype) for dtype in [*dtypes, tl.float16, tl.float32, tl.float64]}
ELEMENT = {dtype.name: dtype for dtype in [*dtypes, tl.float16, tl.float32, tl.float64]}
NUMBERS = (int, float, bool)
WHOLE = slice(None)
_fields: dict[tuple[str, tuple[int, ...] | None], dict[str, Any]] = {}  # of a tensor of that element and shape


def make(data: np.ndarray, of_handle: Any, element: Any, block: bool) -> Any:
    """A tensor of ``data``: a block, or a scalar, which the interpreter keeps as an array of one."""
    key = element.name, data.shape if block else None
    fields = _fields.get(key)
    if fields is None:
        fields = vars(tensor(None, block_type(element, list(data.shape)) if block else element))
        fields = _fields[key] = {name: value for name, value in fields.items() if name != "handle"}
    handle = object.__new__(I.TensorHandle)
    handle.data, handle.dtype, handle.attr = data, of_handle, {}
    made = object.__new__(tensor)
    made.__dict__.update(fields)
    made.handle = handle
    return made


def is_block(x: Any) -> bool:
    return type(x.type) is block_type


def splat(handle: Any) -> np.ndarray:
    """The data of a scalar that meets a block: in the type that its handle names, which is not always its own."""
    dtype = NUMPY[handle.dtype.scalar.name]
    return handle.data if handle.data.dtype == dtype else handle.data.astype(dtype)


def converts(source: str, to: str) -> bool:
    """Whether ``astype`` is the whole conversion."""
    return source == to or (source in NUMPY and to in NUMPY and to != "int1")


class Plans:
    """What an operator does with its operands' types: (numpy's type to convert to or None, twice, type of the result).

    ``None`` in place of a plan: Triton's own steps.
    """

    def __init__(self, swapped: bool, divides: bool, wants: str, number_is_tensor: bool):
        self.swapped, self.divides, self.wants, self.number_is_tensor = swapped, divides, wants, number_is_tensor
        self.pairs: dict[tuple[str, str], Any] = {}
        self.numbers: dict[tuple[str, type, Any], Any] = {}

    def common(self, a: str, a_number: bool, b: str, b_number: bool) -> Any:
        if a not in NUMPY or b not in NUMPY:
            return None
        sides = (ELEMENT[a], a_number, ELEMENT[b], b_number)
        try:
            element = semantic.computation_type_impl(*(sides[2:] + sides[:2] if self.swapped else sides), self.divides)
        except TypeError:
            return None
        if element.name not in NUMPY or (self.wants == "int" and not element.is_int()):
            return None
        return None if self.wants == "float" and element.name not in ("fp32", "fp64") else ELEMENT[element.name]

    def pair(self, a: str, b: str) -> Any:
        key = a, b
        if key not in self.pairs:
            to = self.common(a, False, b, False)
            possible = to is not None and converts(a, to.name) and converts(b, to.name)
            self.pairs[key] = (_unless(a, to), _unless(b, to), to) if possible else None
        return self.pairs[key]

    def number(self, a: str, value: float) -> Any:
        key = a, type(value), value
        plan = self.numbers.get(key, self)
        if plan is self:
            if len(self.numbers) > 4096:
                self.numbers.clear()
            plan = self.numbers[key] = self._number(a, value) if value == value else None
        return plan

    def _number(self, a: str, value: float) -> Any:
        try:
            own = semantic.to_tensor_type(value)
        except ValueError:
            return None
        if self.number_is_tensor:
            plan = self.pair(a, own.name)
            if plan is None:
                return None
            return plan[0], _constant(value, own.name).astype(NUMPY[plan[2].name]), plan[2]
        to = self.common(a, False, own.name, True)
        if to is None or not converts(a, to.name):
            return None
        if to.is_int() and not to.get_int_min_value() <= value <= to.get_int_max_value():
            return None
        return _unless(a, to), _constant(value, to.name), to


def _unless(name: str, to: Any) -> Any:
    return None if name == to.name else NUMPY[to.name]


def _constant(value: float, name: str) -> np.ndarray:
    return np.array([0 if value == 0 else value], NUMPY[name])


def operands(plans: Plans, a: Any, b: Any) -> Any:
    """(data of a, data of b, what the handle of the left one says, element, whether the result is a block), or None."""
    kind = type(b)
    if kind is constexpr:
        b = b.value
        kind = type(b)
    handle = a.handle
    block = type(a.type) is block_type
    if kind is tensor:
        plan = plans.pair(a.dtype.name, b.dtype.name)
        if plan is None:
            return None
        to_a, to_b, element = plan
        other = b.handle
        other_block = type(b.type) is block_type
        x = handle.data if to_a is None else handle.data.astype(to_a)
        y = other.data if to_b is None else other.data.astype(to_b)
        if block is not other_block:
            if block and to_b is None:
                y = splat(other)
            elif other_block and to_a is None:
                x = splat(handle)
            block = True
        left, converted = (other, to_b) if plans.swapped else (handle, to_a)
        return x, y, left.dtype.scalar if converted is None else element, element, block
    if kind not in NUMBERS:
        return None
    plan = plans.number(a.dtype.name, b)
    if plan is None:
        return None
    to_a, y, element = plan
    if to_a is None:
        return handle.data, y, element if plans.swapped else handle.dtype.scalar, element, block
    return handle.data.astype(to_a), y, element, element, block


def operator(slow: Callable, function: Callable, plans: Plans, compares: bool = False, fits: bool = True) -> Callable:
    """``slow`` of two operands, by one function of numpy. A result too wide is converted, if ``fits``."""
    swapped = plans.swapped

    def quick(self, other, _semantic=None):
        given = operands(plans, self, other)
        if given is None:
            return slow(self, other)
        x, y, of_handle, element, block = given
        try:
            data = function(y, x) if swapped else function(x, y)
        except (TypeError, ValueError):
            return slow(self, other)
        if data.itemsize > NUMPY[of_handle.name].itemsize:
            if not fits:
                return slow(self, other)
            data = data.astype(NUMPY[of_handle.name])
        return make(data, of_handle, tl.int1 if compares else element, block)

    return quick


def sum_of(slow: Callable, numbers: Callable) -> Callable:
    """``+``, with pointers. An offset counts elements, as 64 bits that wrap."""

    def quick(self, other, _semantic=None):
        a, b = self, other
        if type(a.dtype) is not pointer_type:
            if type(b) is not tensor or type(b.dtype) is not pointer_type:
                return numbers(self, other)
            a, b = b, a
        if type(b) is constexpr:
            b = b.value
        pointer, element = a.handle, a.dtype
        if type(pointer) is not I.TensorHandle or element.address_space != 1:
            return slow(self, other)
        block = is_block(a)
        if type(b) is tensor:
            if b.dtype.name not in NUMPY or not b.dtype.is_int():
                return slow(self, other)
            offset = b.handle.data
            if is_block(b) is not block:
                if block:
                    offset = splat(b.handle)
                block = True
        elif type(b) in (int, bool):
            try:
                offset = np.array([b], NUMPY[semantic.to_tensor_type(b).name])
            except ValueError:
                return slow(self, other)
        else:
            return slow(self, other)
        width = max(1, pointer.get_element_ty().primitive_bitwidth // 8)
        try:
            data = pointer.data + width * offset.astype(np.uint64)
        except ValueError:
            return slow(self, other)
        return make(data, pointer.dtype.scalar if block else pointer.dtype, element, block)

    return quick


def where(slow: Callable) -> Callable:
    plans = {swapped: Plans(swapped, False, "any", False) for swapped in (False, True)}

    def quick(condition, x, y, _semantic=None):
        if type(condition) is not tensor or condition.dtype.name != "int1":
            return slow(condition, x, y)
        swapped = type(x) is not tensor
        if swapped and type(y) is not tensor:
            return slow(condition, x, y)
        given = operands(plans[swapped], *((y, x) if swapped else (x, y)))
        if given is None:
            return slow(condition, x, y)
        a, b, _, element, block = given
        if is_block(condition) and not block:
            a, b = _splat(a, x, y, swapped, element, True), _splat(b, x, y, swapped, element, False)
            block = True
        if swapped:
            a, b = b, a
        last = y if type(y) is tensor else None
        of_handle = element if last is None or last.dtype.name != element.name else last.handle.dtype.scalar
        try:
            data = np.where(condition.handle.data, a, b)
        except ValueError:
            return slow(condition, x, y)
        if data.itemsize > NUMPY[of_handle.name].itemsize:
            data = data.astype(NUMPY[of_handle.name])
        return make(data, of_handle, element, block)

    return quick


def _splat(data: np.ndarray, x: Any, y: Any, swapped: bool, element: Any, first: bool) -> np.ndarray:
    source = (y if swapped else x) if first else (x if swapped else y)
    if type(source) is not tensor or source.dtype.name != element.name:
        return data
    return splat(source.handle)


def item(slow: Callable) -> Callable:
    """``x[:, None]``: a view."""

    def quick(self, slices, _semantic=None):
        index = slices if type(slices) is tuple else (slices,)
        if type(self.type) is not block_type or type(self.handle) is not I.TensorHandle:
            return slow(self, slices)
        for place in index:
            if place is not None and (type(place) is not slice or place != WHOLE):
                return slow(self, slices)
        if index.count(None) == 0 or len(index) > self.handle.data.ndim + index.count(None):
            return slow(self, slices)
        return make(self.handle.data[index], self.handle.dtype.scalar, self.dtype, True)

    return quick


def to(slow: Callable) -> Callable:
    def quick(self, dtype, *args, _semantic=None, **kwargs):
        if args or kwargs or type(dtype) is not core.dtype or self.dtype.name not in NUMPY:
            return slow(self, dtype, *args, **kwargs)
        if dtype.name == self.dtype.name:
            return self
        if not converts(self.dtype.name, dtype.name):
            return slow(self, dtype)
        return make(self.handle.data.astype(NUMPY[dtype.name]), dtype, dtype, is_block(self))

    return quick


def negative(slow: Callable) -> Callable:
    def quick(self, _semantic=None):
        name = self.dtype.name
        if name not in NUMPY or name == "int1":
            return slow(self)
        return make(np.subtract(np.zeros(1, NUMPY[name]), self.handle.data), self.dtype, self.dtype, is_block(self))

    return quick


def smaller_or_larger(slow: Callable, function: Callable) -> Callable:
    """``tl.minimum`` and ``tl.maximum``, of whose ways with NaN the interpreter has one."""
    forwards = operator(slow, function, Plans(False, False, "any", True))
    backwards = operator(lambda y, x: slow(x, y), function, Plans(True, False, "any", True))

    def quick(x, y, *args, _semantic=None, **kwargs):
        if args or kwargs or (type(x) is not tensor and type(y) is not tensor):
            return slow(x, y, *args, **kwargs)
        return forwards(x, y) if type(x) is tensor else backwards(y, x)

    return quick


def members() -> dict[str, Callable]:
    """Of ``tl.tensor``: name -> what makes the quick member of Triton's own."""

    def pair(function: Callable, divides: bool = False, wants: str = "any", fits: bool = True) -> list[Callable]:
        def maker(swapped: bool) -> Callable:
            return lambda slow: operator(slow, function, Plans(swapped, divides, wants, False), fits=fits)

        return [maker(False), maker(True)]

    def comparison(function: Callable) -> Callable:
        return lambda slow: operator(slow, function, Plans(False, False, "any", True), compares=True)

    def quotient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x - np.fmod(x, y)) // y  # rounds to zero

    made: dict[str, Callable] = {"__getitem__": item, "to": to, "__neg__": negative}
    for name, makers in {
        "add": pair(np.add),
        "sub": pair(np.subtract),
        "mul": pair(np.multiply),
        "truediv": pair(np.divide, divides=True, wants="float"),
        "floordiv": pair(quotient, divides=True, wants="int", fits=False),
        "mod": pair(np.fmod, divides=True, wants="int"),
        "and": pair(np.bitwise_and, wants="int"),
        "or": pair(np.bitwise_or, wants="int"),
        "xor": pair(np.bitwise_xor, wants="int"),
    }.items():
        for prefix, maker in zip(("__", "__r"), makers, strict=True):
            made[f"{prefix}{name}__"] = maker
    for name in ("__add__", "__radd__"):
        made[name] = lambda slow, numbers=made[name]: sum_of(slow, numbers(slow))
    functions = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
    for name, function in {**functions, "eq": np.equal, "ne": np.not_equal}.items():
        made[f"__{name}__"] = comparison(function)
    return made


def functions() -> dict[str, Callable]:
    """Of ``tl``: name -> what makes the quick function of Triton's own."""
    return {
        "where": where,
        "minimum": lambda slow: smaller_or_larger(slow, np.minimum),
        "maximum": lambda slow: smaller_or_larger(slow, np.maximum),
    }
