"""The quick interpreter against Triton's own steps: type, shape, bits and handle of every result, and every refusal."""

import inspect
import operator
import re
import types
import warnings

import numpy as np
import pytest
import quick_interpreter
import triton
import triton.language as tl
import triton.runtime.interpreter as I

from fastseg.ops.core.dispatch import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="of the interpreter"),
    pytest.mark.skipif(not hasattr(I, "_LangPatchScope"), reason="this Triton runs as it is"),
]
core = tl.core
AS_IT_IS = "operators, loads and stores of this Triton run as they are"
VALUES = np.array([0, 1, -1, 3, -7, 2.5, float("nan"), float("inf"), 1e5, -0.0, 200, 2.0**31])
OTHERS = [tl.int8, tl.uint8, tl.int16, tl.uint32, tl.int64, tl.uint64, tl.float16, tl.bfloat16, tl.float64, tl.float8e5]
NUMBERS = [0, 1, -1, 3, True, 300, 2**31, 2**33, -(2**40), 2**70, 0.5, -0.0, float("nan"), float("inf"), 1e300]
ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "and_", "or_", "xor", "lshift", "rshift")
BINARY = {name: getattr(operator, name) for name in (*ARITHMETIC, "lt", "le", "gt", "ge", "eq", "ne")}
FUNCTIONS = {"minimum": lambda a, b: tl.minimum(a, b), "maximum": lambda a, b: tl.maximum(a, b)}
UNARY = {
    "neg": operator.neg,
    "invert": operator.inv,
    "column": lambda a: a[:, None],
    "row": lambda a: a[None, :],
    "planes": lambda a: a[:, None, None],
    "whole": lambda a: a[:],
    **{f"to {dtype}": lambda a, dtype=dtype: a.to(dtype) for dtype in [tl.int1, tl.int32, tl.float32, *OTHERS]},
}


def launched(function):
    """As in a launch: the language's functions are the interpreter's."""
    scope = I._patch_lang(launched)
    try:
        return function()
    finally:
        scope.restore()


def tensor(dtype, shape=(), first=0):
    """Of values that lie at the edges of their type; a pointer's are addresses."""
    size = int(np.prod(shape, dtype=int)) or 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = np.resize(np.roll(VALUES, -first), size).astype(I._get_np_dtype(dtype))
    data = data.reshape(shape or (1,))
    return core.tensor(I.TensorHandle(data, dtype), core.block_type(dtype, list(shape)) if shape else dtype)


def inputs():
    made = [tensor(dtype, shape, first) for dtype in OTHERS for shape, first in [((), 3), ((4,), 2)]]
    for dtype in (tl.int1, tl.int32, tl.float32):
        made += [tensor(dtype, shape) for shape in [(), (1,), (4,), (2, 1), (2, 4), (8,)]]
    made += [tensor(core.pointer_type(dtype), shape) for dtype, shape in [(tl.float32, ()), (tl.int8, (4,))]]
    made += launched(lambda: [tensor(dtype, (), 3) > 0 for dtype in (tl.int32, tl.float32)])  # their handles say int32
    return made


def outcome(function, args):
    """All that can be seen of the result, or the kind of the error."""
    try:
        made = function(*args)
    except Exception as error:
        return type(error)
    if type(made) is not core.tensor or type(made.handle) is not I.TensorHandle:
        return made
    data, nan = made.handle.data, None
    if data.dtype.kind == "f":  # of NaN the bits are the machine's
        nan = np.isnan(data).tolist()
        data = np.where(nan, np.zeros_like(data), data)
    shape = [size.value for size in made.shape]
    said = (str(made.type), str(made.dtype), shape, made.numel.value, str(made.handle.dtype), made.handle.attr)
    return said, data.dtype.str, data.shape, data.tobytes(), nan


@pytest.fixture
def compare():
    """Collects calls; the test ends with all of them made by the quick interpreter, and then by Triton's own."""
    if not quick_interpreter.compared():
        pytest.skip(AS_IT_IS)
    calls = []
    yield lambda function, *args: calls.append((function, args))
    assert len(calls) > 10
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        quick = launched(lambda: [outcome(*call) for call in calls])
        with quick_interpreter.plain():
            plain = launched(lambda: [outcome(*call) for call in calls])
    for (function, args), a, b in zip(calls, quick, plain, strict=True):
        assert a == b, (function, [(str(x.type), x.handle) if isinstance(x, core.tensor) else x for x in args])
    assert any(isinstance(result, tuple) for result in plain)


@pytest.mark.parametrize("name", [*BINARY, *FUNCTIONS])
def test_two_operands(name, compare, pytestconfig):
    """Each with every second of the others, which differ from operator to operator; with --long with all."""
    function = {**BINARY, **FUNCTIONS}[name]
    tensors = inputs()
    for i, a in enumerate(tensors):
        others = tensors if pytestconfig.getoption("--long") else tensors[(i + len(name)) % 2 :: 2]
        for b in [*others, core.constexpr(3), core.constexpr(0.5)]:
            compare(function, a, b)
        for b in [*NUMBERS, None]:
            compare(function, a, b)
            compare(function, b, a)


@pytest.mark.parametrize("name", UNARY)
def test_one_operand(name, compare):
    for a in inputs():
        compare(UNARY[name], a)


def test_where(compare):
    conditions = [tensor(tl.int1, shape, 1) for shape in [(), (4,), (2, 1), (2, 4)]]
    conditions += [tensor(tl.int32, (4,)), *launched(lambda: [tensor(tl.float32, (), 3) > 0, 1])]
    values = [tensor(dtype, shape, 2) for dtype in (tl.int1, tl.int64, tl.float16, tl.float32) for shape in [(), (4,)]]
    values += [tensor(tl.bfloat16, (4,)), tensor(core.pointer_type(tl.int8), (4,)), *inputs()[-2:], 0, 2.5, -1, 2**40]
    for condition in conditions:
        for x in values:
            for y in values:
                compare(lambda c, x, y: tl.where(c, x, y), condition, x, y)


MEMORY = [tl.int1, tl.int8, tl.int32, tl.int64, tl.float16, tl.bfloat16, tl.float32, tl.float64]
MASKS = [(), (4,), (1, 4), (2, 1), (2, 4), (8,)]


def pointers(dtype, memory, shape, const=False):
    """To neighbouring elements of ``memory``, which they keep: one of them or a block."""
    size = int(np.prod(shape, dtype=int)) or 1
    data = memory.ctypes.data + memory.itemsize * np.arange(size, dtype=np.uint64).reshape(shape or (1,))
    of = core.pointer_type(dtype, const=const)
    made = core.tensor(I.TensorHandle(data, of), core.block_type(of, list(shape)) if shape else of)
    made.memory = memory
    return made


@pytest.mark.parametrize("dtype", MEMORY, ids=str)
def test_load(dtype, compare):
    memory = tensor(dtype, (8,)).handle.data.copy()
    masks = [None, True, *(tensor(tl.int1, shape, 1) for shape in MASKS), *inputs()[-2:], tensor(tl.int32, (4,))]
    others = [None, 0, 0.0, -1, 2.5, float("nan"), -float("inf"), core.constexpr(0)]
    others += [tensor(of, shape, 2) for of in (dtype, tl.float32, tl.int64) for shape in [(), (4,), (2, 4)]]
    for shape in [(), (1,), (4,), (2, 4)]:
        at = pointers(dtype, memory, shape)
        compare(lambda at: tl.load(at, cache_modifier=".cg", eviction_policy="evict_last"), at)
        compare(lambda at: tl.load(at, cache_modifier="none"), at)
        for mask in masks:
            for other in others:
                compare(lambda at, mask, other: tl.load(at, mask=mask, other=other), at, mask, other)


@pytest.mark.parametrize("dtype", MEMORY, ids=str)
def test_store(dtype, compare):
    start = tensor(dtype, (8,), 5).handle.data
    values = [0, -1, 2.5, float("nan"), core.constexpr(3)]
    values += [tensor(of, shape, 2) for of in (dtype, tl.float32, tl.int64, tl.int1) for shape in [(), (4,), (2, 4)]]
    memory = start.copy()

    def store(at, value, mask):
        memory[:] = start
        tl.store(at, value, mask=mask)
        return tuple(memory.tobytes())

    compare(store, pointers(dtype, memory, (4,), const=True), 0, None)
    for shape in [(), (1,), (4,), (2, 4)]:
        at = pointers(dtype, memory, shape)
        for mask in [None, *(tensor(tl.int1, size, 1) for size in MASKS), inputs()[-1], tensor(tl.int32, (4,))]:
            for value in values:
                compare(store, at, value, mask)


def test_constant_blocks(compare):
    for dtype in [tl.int1, tl.int32, tl.float32, *OTHERS]:
        for value in [*NUMBERS, core.constexpr(2), None]:
            for shape in [(4,), [2, 4], (3,), (), (core.constexpr(4),)]:
                compare(lambda shape, value, dtype: tl.full(shape, value, dtype), shape, value, dtype)
    for start, end in [(0, 8), (0, 8), (2, 4), (0, 6), (4, 0), (0, 8.0), (0, core.constexpr(4))]:
        compare(lambda start, end: tl.arange(start, end), start, end)
    for index in [0, None, slice(0, 2), (None, 0), (0, None)]:
        compare(lambda index: tensor(tl.int32, (4,))[index], index)
    for x in [*NUMBERS, None, "text", tl.int32, core.constexpr(5), core.constexpr(0.5), tensor(tl.int8)]:
        compare(lambda x: I.interpreter_semantic.to_tensor(x, False), x)
        compare(lambda x: I.interpreter_semantic.to_tensor(x), x)


@triton.jit
def least(a, b):
    return tl.where(a < b, a, b)


@triton.jit
def halves(a, b):
    return a * 0.5 + b  # in another order it is another sum


@triton.jit
def first_of_equal(a, i, b, j):
    take = (b > a) | ((a == b) & (j < i))
    return tl.where(take, b, a), tl.where(take, j, i)


@triton.jit
def by_elements(a, b):
    return a if a > b else b


@pytest.mark.parametrize("function", [least, halves, by_elements], ids=lambda function: function.fn.__name__)
def test_reduce(function, compare):
    for dtype in (tl.int32, tl.float16, tl.float32, tl.int8):
        for shape in [(4, 2), (8, 4), (1, 4), (2, 1), (2, 4, 2), (8,)]:
            for axis in [*range(len(shape)), None]:
                for keep in (False, True):
                    compare(lambda x, axis, keep: tl.reduce(x, axis, function, keep_dims=keep),
                            tensor(dtype, shape, 1), axis, keep)  # fmt: skip


@pytest.mark.parametrize("part", [0, 1])
def test_reduce_of_two(part, compare):
    for shape in [(4, 4), (8, 2), (4, 1), (2, 2, 4)]:
        for axis in range(len(shape)):
            for dtype in (tl.float32, tl.int8):
                compare(lambda x, i, axis: tl.reduce((x, i), axis, first_of_equal)[part],
                        tensor(dtype, shape, 1), tensor(tl.int32, shape, 2), axis)  # fmt: skip


@pytest.mark.skipif(not quick_interpreter.compared(), reason=AS_IT_IS)
def test_a_reduction_calls_its_function_once_a_slice(monkeypatch):
    calls = []
    monkeypatch.setattr(least, "fn", lambda a, b, fn=least.fn: (calls.append(a.shape), fn(a, b))[1])
    launched(lambda: tl.reduce(tensor(tl.float32, (8, 4)), 0, least))
    assert calls == [[4]] * 7


def test_a_launch_leaves_the_language_as_it_was():
    """The second launch of a kind, whose changes are known, as well as the first; those of device functions too."""
    for _ in range(2):
        launched(lambda: tl.sum(tl.cdiv(tl.zeros([4], tl.int32), 2), 0))
    left = []
    for place in (tl, core, tl.math, core.tensor, core.dtype):
        for name, member in vars(place).items():
            function = getattr(member, "fget", member)
            if inspect.isfunction(function) and function.__module__.startswith(("triton.runtime.interp", "quick_")):
                left.append(f"{place.__name__}.{name}")
    assert not left


def test_device_functions_of_files_that_import_other_parts_of_the_language():
    """In any order, and each of them as the one that is launched too."""
    whole, both, part = (
        types.FunctionType((lambda: None).__code__, names) for names in ({"a": tl}, {"a": tl, "b": core}, {"a": core})
    )
    for order in [(both, whole, part), (both, part, whole), (whole, part, both), (whole, both, part), (whole, whole)]:
        for _ in range(2):
            scope = I._patch_lang(order[0])
            try:
                for inner in order[1:]:
                    I._patch_lang(inner)
                places = [tl, tl.math, core.tensor, *([] if part not in order else [core])]
                left = [name for place in places for name, x in vars(place).items() if core.is_builtin(x)]
            finally:
                scope.restore()
            assert not left
            assert core.is_builtin(tl.load) and core.is_builtin(core.load)


@pytest.mark.skipif(not quick_interpreter.compared(), reason=AS_IT_IS)
def test_the_quick_steps_are_taken(monkeypatch):
    """Operators, loads and stores of the usual types never reach Triton's own."""
    taken = []
    for name in ("add", "mul", "and_", "less_than", "where", "load", "store", "binary_op_type_checking_impl"):
        monkeypatch.setattr(I.interpreter_semantic, name, lambda *args, name=name: taken.append(name))
    memory = np.zeros(8, np.float32)

    def kernel():
        offsets = tl.arange(0, 8)
        at = pointers(tl.float32, memory, ()) + offsets
        x = tl.load(at, mask=(offsets < 7) & (offsets >= 0), other=0.0)
        tl.store(at, tl.where(offsets < 4, x * 2.0 + 1, 5.0), mask=offsets < 7)

    launched(kernel)
    assert not taken
    assert memory.tolist() == [1, 1, 1, 1, 5, 5, 5, 0]


def test_the_arguments_of_a_launch():
    def kernel(x, y, BLOCK, FLAG=True):
        pass

    def other(x, *more, flag):
        pass

    seen = 0
    for function in (kernel, other):
        for args in [(), (1,), (1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4, 5)]:
            for kwargs in [{}, {"BLOCK": 4}, {"y": 5, "BLOCK": 4}, {"FLAG": 0}, {"flag": 1}, {"x": 1}]:
                try:
                    want = inspect.getcallargs(function, *args, **kwargs)
                except TypeError as error:
                    with pytest.raises(TypeError, match=re.escape(str(error))):
                        I.inspect.getcallargs(function, *args, **kwargs)
                else:
                    assert I.inspect.getcallargs(function, *args, **kwargs) == want
                    seen += 1
    assert seen > 5
