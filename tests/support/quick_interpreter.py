"""Triton's interpreter without the work that it throws away: the same results in a fraction of the time.

``install()`` changes how long a launch takes and nothing that it computes or checks:

- The overflow test of every integer sum and product (both operands and the result in i64, two comparisons) feeds an
  assertion that the interpreter drops, for its option ``debug`` is off. Offsets past 32 bits are found in the compiled
  code (``tests/kernels/aot``).
- Operands of equal shape are broadcast in a dozen steps that return them as they were.
- The language's functions are replaced by the interpreter's for each launch, and once more by each device function,
  after a search through all of their names.
- Operators, loads and stores decide anew what follows from the types alone: ``quick_operators``, ``quick_memory``.
- The names of a kernel's parameters are read from its signature twice for each launch.
- A reduction with a function of the kernel's own calls it for each element; here for each slice along the axis.
- The table of numpy's dtypes is built anew at each look-up, and the shape of each tensor is checked and wrapped anew,
  though there are few shapes.

A Triton whose classes hold other fields runs them as they are. Operators, loads, stores and reductions are quick with
the versions in ``COMPARED`` alone: 3.9 keeps the sign of -0.0, has sums of int1 modulo 2, and names other types in its
handles.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator

import numpy as np
import quick_memory
import quick_operators
import triton
import triton.language as tl
import triton.runtime.interpreter as I

core = tl.core
COMPARED = ("3.7.",)  # beginnings of the versions whose every step tests/kernels/test_quick_interpreter.py was run on

_replaced: list[tuple[object, str, object, object]] = []  # object, name, what it was, what it is


def install() -> None:
    """For this process. Does nothing the second time."""
    if _replaced:
        return
    options, semantic = I.interpreter_builder.options, I.interpreter_semantic
    _replace(I, "_get_np_dtype", _remembered(I._get_np_dtype))
    if not options.debug:
        _replace(I.interpreter_builder, "options", dataclasses.replace(options, sanitize_overflow=False))
    _replace(semantic, "broadcast_impl_value", _unless_equal(semantic.broadcast_impl_value))
    if getattr(I, "inspect", None) is inspect:
        _replace(I, "inspect", _Inspect())
    block = core.block_type(tl.int32, [2])
    if set(vars(block)) == {"element_ty", "shape", "numel", "name"}:
        _replace(core.block_type, "__init__", _block_type(core.block_type.__init__))
    if set(vars(core.tensor(None, block))) != {"handle", "shape", "numel", "type", "dtype"}:
        return
    _replace(core.tensor, "__init__", _tensor(core.tensor.__init__))
    if not hasattr(I, "_LangPatchScope") or vars(I._LangPatchScope()) != {"_changes": []}:
        return
    _replace(I, "_patch_lang", _patched_once(I._patch_lang))
    handle = [field.name for field in dataclasses.fields(I.TensorHandle)]
    members = len(inspect.signature(I._patch_attr).parameters)
    if compared() and handle == ["data", "dtype", "attr"] and members == 5 and not options.debug:
        _replace(semantic, "to_tensor", quick_memory.to_tensor(semantic.to_tensor))
        _replace(I, "_patch_attr", _quick_members(I._patch_attr))
        _replace(I.ReduceOps, "generic_reduce", _by_slices(I.ReduceOps.generic_reduce))


def compared() -> bool:
    """Whether this Triton's operators, loads and stores are those that the quick ones were made from."""
    return triton.__version__.startswith(COMPARED)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Triton's own steps, between launches."""
    for obj, name, was, _ in reversed(_replaced):
        setattr(obj, name, was)
    try:
        yield
    finally:
        for obj, name, _, becomes in _replaced:
            setattr(obj, name, becomes)


def _replace(obj: object, name: str, becomes: object) -> None:
    _replaced.append((obj, name, getattr(obj, name), becomes))
    setattr(obj, name, becomes)


class _Inspect:
    """Python's ``inspect``, which remembers the parameters of the functions that it was asked for."""

    getfullargspec = staticmethod(functools.cache(inspect.getfullargspec))

    def __getattr__(self, name: str) -> object:
        return getattr(inspect, name)

    def getcallargs(self, function: Callable, /, *args, **kwargs) -> dict[str, object]:
        spec = self.getfullargspec(function)
        names, defaults = spec.args, spec.defaults or ()
        given = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))
        given |= dict(zip(names, args, strict=False)) | kwargs
        usual = not (spec.varargs or spec.varkw or spec.kwonlyargs) and len(args) <= len(names)
        if not usual or kwargs.keys() & set(names[: len(args)]) or given.keys() != set(names):
            return inspect.getcallargs(function, *args, **kwargs)
        return given


class _Recorded(list):
    """Stands for a scope while Triton's ``_patch_attr`` says what a member becomes."""

    def set_attr(self, obj: object, name: str, value: object) -> None:
        self.append(value)


def _quick_members(original: Callable) -> Callable:
    known = {}  # Triton's own member -> the quick one
    makers = {core.tensor: quick_operators.members()}
    for module in (tl, core):
        makers[module] = {**quick_operators.functions(), **quick_memory.functions()}

    def patch_attr(obj, name, member, builder, scope):
        maker = makers.get(obj, {}).get(name) if inspect.ismodule(obj) or obj is core.tensor else None
        if maker is None:
            original(obj, name, member, builder, scope)
            return
        if member not in known:
            recorded = _Recorded()
            original(obj, name, member, builder, recorded)
            known[member] = maker(recorded[0])
        scope.set_attr(obj, name, known[member])

    return patch_attr


def _patched_once(original: Callable) -> Callable:
    """What Triton replaces in the language depends on the modules of it that a function's file has imported."""
    known = {}  # those modules, after which others -> (object, name, what it was, what it becomes) of each
    done = []  # in the launch that runs: its scope, and the modules that have been replaced in it

    @functools.wraps(original)
    def patch_lang(fn):
        modules = tuple({id(value): None for value in fn.__globals__.values() if value is tl or value is core})
        if core.is_builtin(tl.load):  # nothing is replaced: a launch begins
            done[:] = [I._LangPatchScope()]
            if id(tl) not in modules:
                done.clear()
                return original(fn)
        elif not done:
            return original(fn)
        scope = done[0]
        if modules in done[1:]:
            return scope
        done.append(modules)
        before = tuple(done[1:])
        if before not in known:
            changes = original(fn)._changes
            known[before] = [(obj, name, was, getattr(obj, name)) for obj, name, was in changes]
            scope._changes += changes
            return scope
        for obj, name, was, becomes in known[before]:
            scope._changes.append((obj, name, was))
            setattr(obj, name, becomes)
        return scope

    return patch_lang


def _no_answer(self) -> bool:
    raise TypeError("a block is neither true nor false")


def _by_slices(original: Callable) -> Callable:
    """The same calls in the same order of each result's elements; a function that cannot take blocks takes elements."""

    @functools.wraps(original)
    def generic_reduce(self, input):
        axis, blocks = self.axis, [one.handle.data for one in input]
        if axis is None or blocks[0].ndim < 2 or any(block.shape != blocks[0].shape for block in blocks):
            return original(self, input)
        made = lambda arrays: [self.to_tensor(a, one.dtype) for a, one in zip(arrays, input, strict=True)]
        found, asks = [block.take(0, axis) for block in blocks], core.tensor.__bool__
        core.tensor.__bool__ = _no_answer  # of a block the interpreter answers for all elements at once
        try:
            for i in range(1, blocks[0].shape[axis]):
                results = self.combine_fn.fn(*made(found), *made([block.take(i, axis) for block in blocks]))
                for one, result in zip(found, results if isinstance(results, tuple) else (results,), strict=True):
                    if result.handle.data.dtype != one.dtype:
                        raise TypeError("another type, to which elements are converted one by one")
                    one[...] = result.handle.data
        except (AttributeError, TypeError, ValueError):
            found = None
        finally:
            core.tensor.__bool__ = asks
        if found is None:
            return original(self, input)
        return made([np.expand_dims(one, axis) for one in found] if self.keep_dims else found)

    return generic_reduce


def _remembered(original: Callable) -> Callable:
    known = {}

    @functools.wraps(original)
    def np_dtype(ty):
        name = ty.scalar.name
        if name not in known:
            known[name] = original(ty)
        return known[name]

    return np_dtype


def _unless_equal(original: Callable) -> Callable:
    @functools.wraps(original)
    def broadcast(lhs, rhs):
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block() and [*left.shape] == [*right.shape]:
            return lhs, rhs
        return original(lhs, rhs)

    return broadcast


def _block_type(original: Callable) -> Callable:
    known = {}  # sizes -> what the check of them gave

    @functools.wraps(original)
    def init(self, element_ty, shape):
        sizes = tuple([size.value if type(size) is core.constexpr else size for size in shape])
        if sizes not in known:
            original(self, element_ty, shape)
            known[sizes] = self.shape, self.numel, str(self.shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, text = known[sizes]
        self.name = f"<{text}, {element_ty}>"

    return init


def _tensor(original: Callable) -> Callable:
    known = {}  # sizes -> the tensor's own shape, of constants

    @functools.wraps(original)
    def init(self, handle, type):
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in known:
            original(self, handle, type)
            known[sizes] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known[sizes]

    return init
