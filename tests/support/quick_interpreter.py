"""Triton's interpreter without the work that it throws away: the same results in half of the time.

``install()`` changes how long a launch takes and nothing that it computes or checks:

- The overflow test of every integer sum and product (both operands and the result in i64, two comparisons) feeds an
  assertion that the interpreter drops, for its option ``debug`` is off. Offsets past 32 bits are found in the compiled
  code (``tests/kernels/aot``).
- Operands of equal shape are broadcast in a dozen steps that return them as they were.
- The table of numpy's dtypes is built anew at each look-up, and the shape of each tensor is checked and wrapped anew,
  though there are few shapes.

A Triton whose classes hold other fields runs them as they are.
"""

import dataclasses
import functools
from collections.abc import Callable

import triton.language as tl
import triton.runtime.interpreter as I

core = tl.core


def install() -> None:
    """For this process. Does nothing the second time."""
    if hasattr(I._get_np_dtype, "__wrapped__"):
        return
    I._get_np_dtype = _remembered(I._get_np_dtype)
    options = I.interpreter_builder.options
    if not options.debug:
        I.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    semantic = I.interpreter_semantic
    semantic.broadcast_impl_value = _unless_equal(semantic.broadcast_impl_value)
    block = core.block_type(tl.int32, [2])
    if set(vars(block)) == {"element_ty", "shape", "numel", "name"}:
        core.block_type.__init__ = _block_type(core.block_type.__init__)
    if set(vars(core.tensor(None, block))) == {"handle", "shape", "numel", "type", "dtype"}:
        core.tensor.__init__ = _tensor(core.tensor.__init__)


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
