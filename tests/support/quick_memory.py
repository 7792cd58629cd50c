"""The interpreter's loads, stores and constant blocks, as ``quick_operators`` has its operators."""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as I
from quick_operators import NUMBERS, NUMPY, converts, is_block, make, splat

core, semantic, builder = tl.core, I.interpreter_semantic, I.interpreter_builder
OPTIONS = {"cache_modifier", "eviction_policy"}
ELEMENTS = {*NUMPY, "bf16"} - {"int1"}  # a pointer to int1 is one to int8


def _spread(data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if data.shape == shape:
        return data
    whole = np.empty(shape, data.dtype)
    whole[...] = data
    return whole


def _pointers(pointer: Any) -> bool:
    """Whether these are pointers one by one, to elements as they are."""
    if type(pointer) is not core.tensor or type(pointer.handle) is not I.TensorHandle:
        return False
    element = pointer.dtype
    return type(element) is core.pointer_type and element.element_ty.name in ELEMENTS and element.address_space == 1


def _is_mask(mask: Any) -> bool:
    return type(mask) is core.tensor and mask.dtype.name == "int1"


def _data(x: Any) -> np.ndarray:
    return x.handle.data if is_block(x) else splat(x.handle)


def load(slow: Callable) -> Callable:
    constants: dict[tuple[type, Any, str], np.ndarray] = {}

    def fill(other: Any, element: Any) -> np.ndarray | None:
        """What masked elements become, in the type of the others."""
        if type(other) is core.tensor:
            if other.dtype.name not in NUMPY:
                return None
            if other.dtype.name == element.name:
                return _data(other)
            return _data(other).astype(NUMPY[element.name]) if converts(other.dtype.name, element.name) else None
        if type(other) not in NUMBERS or other != other:
            return None
        key = type(other), other, element.name
        if key not in constants:
            constants[key] = semantic.cast(semantic.to_tensor(other), element).handle.data
        return constants[key]

    def quick(pointer, mask=None, other=None, *args, _semantic=None, **kwargs):
        def own():
            return slow(pointer, mask, other, *args, **kwargs)

        if args or not kwargs.keys() <= OPTIONS or not _pointers(pointer):
            return own()
        element, block = pointer.dtype.element_ty, is_block(pointer)
        cache = semantic._str_to_load_cache_modifier(kwargs.get("cache_modifier"))
        eviction = semantic._str_to_eviction_policy(kwargs.get("eviction_policy"))
        if mask is None:
            if other is not None:
                return own()
            handle = builder.create_load(pointer.handle, cache, eviction, False)
            return make(handle.data, handle.dtype, element, block)
        if not block or not _is_mask(mask):
            return own()
        at, active = pointer.handle.data, _data(mask)
        values = None if other is None else fill(other, element)
        if values is None and other is not None:
            return own()
        shape = at.shape
        try:
            if active.shape != shape or (values is not None and values.shape != shape):
                shape = np.broadcast(at, active, *([] if values is None else [values])).shape
        except ValueError:
            return own()
        if at.size == 1 or len(shape) != at.ndim:
            return own()
        pointers = I.TensorHandle(_spread(at, shape), pointer.handle.dtype.scalar)
        masks = I.TensorHandle(_spread(active, shape).astype(bool, copy=False), tl.int1)
        others = None if values is None else I.TensorHandle(_spread(values, shape), element)
        handle = builder.create_masked_load(pointers, masks, others, cache, eviction, False)
        return make(handle.data, handle.dtype, element, True)

    return quick


def store(slow: Callable) -> Callable:
    def quick(pointer, value, mask=None, *args, _semantic=None, **kwargs):
        def own():
            return slow(pointer, value, mask, *args, **kwargs)

        if args or not kwargs.keys() <= OPTIONS or not _pointers(pointer) or pointer.dtype.const:
            return own()
        if not is_block(pointer) or (mask is not None and not _is_mask(mask)):
            return own()
        element, shape = pointer.dtype.element_ty, pointer.handle.data.shape
        given = semantic.to_tensor(value)
        if given.dtype.name == element.name:
            data = _data(given) if element.name in NUMPY else given.handle.data
        elif converts(given.dtype.name, element.name):
            data = _data(given).astype(NUMPY[element.name])
        elif given.dtype.name in NUMPY:
            data = semantic.cast(given, element).handle.data
        else:
            return own()
        active = None if mask is None else _data(mask)
        for part in (data, active):
            if part is None or part.shape == shape:
                continue
            try:
                if np.broadcast(part, pointer.handle.data).shape != shape:
                    return own()
            except ValueError:
                return own()
        cache = semantic._str_to_store_cache_modifier(kwargs.get("cache_modifier"))
        eviction = semantic._str_to_eviction_policy(kwargs.get("eviction_policy"))
        values = I.TensorHandle(_spread(data, shape), element)
        if active is None:
            return core.tensor(builder.create_store(pointer.handle, values, cache, eviction), tl.void)
        masks = I.TensorHandle(_spread(active, shape).astype(bool, copy=False), tl.int1)
        return core.tensor(builder.create_masked_store(pointer.handle, values, masks, cache, eviction), tl.void)

    return quick


def full(slow: Callable) -> Callable:
    def quick(shape, value, dtype, _semantic=None):
        given = value.value if type(value) is core.constexpr else value
        if type(given) not in NUMBERS or type(dtype) is not core.dtype or type(shape) not in (list, tuple):
            return slow(shape, value, dtype)
        if not shape or (dtype.name not in NUMPY and (given != 0 or dtype.name != "bf16")):
            return slow(shape, value, dtype)
        sizes = [size.value if type(size) is core.constexpr else size for size in shape]
        if any(type(size) is not int for size in sizes):
            return slow(shape, value, dtype)
        kind = np.uint16 if dtype.name == "bf16" else NUMPY[dtype.name]
        try:
            constant = np.array([0 if given == 0 else given], kind)
        except OverflowError:
            return slow(shape, value, dtype)
        return make(np.full(sizes, constant, kind), dtype, dtype, True)

    return quick


def arange(slow: Callable) -> Callable:
    known = set()  # what passed Triton's checks

    def quick(start, end, _semantic=None):
        if type(start) is not int or type(end) is not int:
            return slow(start, end)
        if (start, end) in known:
            return make(np.arange(start, end, dtype=np.int32), tl.int32, tl.int32, True)
        made = slow(start, end)
        known.add((start, end))
        return made

    return quick


def to_tensor(slow: Callable) -> Callable:
    """Of the semantic: every assignment in a kernel goes through it."""

    def quick(x, check_type=True):
        kind = type(x)
        if kind is core.tensor:
            return x
        if kind is core.constexpr:
            x = x.value
            kind = type(x)
        if kind is not int or not -(2**31) <= x < 2**31:
            return slow(x, check_type)
        return make(np.array([x], np.int32), tl.int32, tl.int32, False)

    return quick


def functions() -> dict[str, Callable]:
    """Of ``tl``: name -> what makes the quick function of Triton's own."""
    return {"load": load, "store": store, "full": full, "arange": arange}
