"""How a module of somebody else's class gets another ``forward``: it becomes an instance of a subclass of its class.

The subclass differs in ``forward`` alone. Attributes, parameters, buffers, hooks, ``isinstance`` and ``repr`` stay.
Two other ways were set aside. A ``forward`` on the instance is copied with the instance's ``__dict__``, bound to the
module it came from: ``copy.copy`` and ``nn.DataParallel``, which replicates modules so, would compute with another
module's weights. A module in the place of the old one has another identity, class and names of parameters: hooks,
optimizers that hold it, ``isinstance`` and ``state_dict`` break. ``torch.nn.utils.parametrize`` and ``fully_shard``
exchange the class of an instance likewise.

Pickles name the original class and the rule; the subclass is made again where they are read.
"""

import copyreg
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function

from fastseg.converting.rule import Rule
from fastseg.ops.core.dispatch import followed, kernels_run
from fastseg.ops.core.explain import in_reference
from fastseg.ops.core.kept import keepers
from fastseg.ops.cpu.packed import packing

RULES: dict[str, Rule] = {}  # by name, filled by ``fastseg.converting.rules``
_fused_everywhere: ContextVar[bool] = ContextVar("fastseg_fused_everywhere", default=False)
# Elements of a map up to which a fused block's Python, some 50 us, costs more than the norm's pass that it saves: on
# one thread, and on several, which a pass wakes. Blocks of 1x1 and 3x3 filters of 32 to 512 channels.
_FEW_ALONE, _FEW_SHARED = 2**16, 2**14
_made: dict[tuple[type, Rule], type] = {}


class Converted:
    """A module whose ``forward`` a rule computes, where the module is still what the rule knows."""

    fastseg_rule: Rule
    fastseg_original: type[nn.Module]

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(max(2, int(protocol)))
        if reduced[0] is copyreg.__newobj__ and reduced[1][0] is type(self):
            return (_again, (self.fastseg_original, self.fastseg_rule.name, *reduced[1][1:]), *reduced[2:])
        return reduced


def _again(original: type, rule: str, *args) -> nn.Module:
    """Where a pickle is read, and in a deep copy; of a rule that this release lacks, the original."""
    made = converted_class(original, RULES[rule]) if rule in RULES else original
    return made.__new__(made, *args)


def converted_class(original: type[nn.Module], rule: Rule) -> type[nn.Module]:
    """The subclass of ``original`` whose ``forward`` is the rule's."""
    key = original, rule
    if key not in _made:
        own = original.forward

        @functools.wraps(own)
        def forward(self, *args, **kwargs):
            if in_reference() or _costs_more(rule, args) or rule.refuses(self) or _traced(args, kwargs):
                return own(self, *args, **kwargs)
            return rule.run(self, functools.partial(own, self), *args, **kwargs)

        members: dict[str, Any] = {
            "forward": forward,
            "fastseg_rule": rule,
            "fastseg_original": original,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
        }
        _made[key] = type(original)(original.__name__, (Converted, original), members)
    return _made[key]


@contextmanager
def fused_everywhere() -> Iterator[None]:
    """Inside the block, rules that only fuse run on a CPU too: to check them."""
    token = _fused_everywhere.set(True)
    try:
        yield
    finally:
        _fused_everywhere.reset(token)


def _costs_more(rule: Rule, args: tuple) -> bool:
    """True if the rule only fuses, and folding at each call, or the call's own Python, costs more than it saves."""
    if not rule.fuses_only or not args:
        return False
    x = args[0][-1] if isinstance(args[0], (list, tuple)) else args[0]
    if not isinstance(x, Tensor) or not x.is_cpu or kernels_run(x):
        return False
    if followed(x):
        return True
    if _fused_everywhere.get():
        return False
    if not keepers.get():
        return True
    return x.numel() < (_FEW_ALONE if torch.get_num_threads() == 1 else _FEW_SHARED) and not packing()


def _traced(args: tuple, kwargs: dict) -> bool:
    """True for the stand-ins of ``torch.fx``, whose graph must hold the original's calls."""
    flat: list = []
    for value in (*args, *kwargs.values()):
        flat.extend(value if isinstance(value, (list, tuple)) else (value,))
    if not has_torch_function(tuple(flat)):
        return False
    from torch.fx import Proxy

    return any(isinstance(value, Proxy) for value in flat)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module was of before it was converted."""
    return module.fastseg_original if isinstance(module, Converted) else type(module)


def put(module: nn.Module, rule: Rule) -> str:
    """Convert one module in place; return why it cannot be, or ""."""
    try:
        module.__class__ = converted_class(original_class(module), rule)
    except TypeError as error:
        return f"its class cannot be exchanged: {error}"
    return ""


def put_back(module: nn.Module) -> None:
    """Make a converted module an instance of its own class again."""
    if isinstance(module, Converted):
        if type(module) is not converted_class(module.fastseg_original, module.fastseg_rule):
            raise RuntimeError(
                f"revert: {type(module).__name__} was given another class after it was converted, as fully_shard "
                "does; revert before that"
            )
        module.__class__ = module.fastseg_original


def owner_of(cls: type, method: str = "forward") -> type:
    """The class in the order of resolution that defines ``method``."""
    return next((c for c in cls.__mro__ if method in vars(c)), cls)


Original = Callable[..., Any]
