"""Maps that are cheap to make again: what would keep one for its backward keeps what it was made of instead.

A convolution keeps its input. Where that is ``act(norm(z))``, z is kept by the norm already; so the convolution keeps a
recipe, and its backward makes the same bits again, with one read and one write. Saved-tensor hooks of others
(checkpoints, offloading, counters) see z in the place of the map.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary


class Recipe(NamedTuple):
    """``make(source)`` is the map, as it was at ``version``."""

    make: Callable[[Tensor], Tensor]
    source: Tensor
    version: int


class _Kept(NamedTuple):
    """In the place of a map: its recipe's ``make``, and the source as the hooks around ours have packed it."""

    make: Callable[[Tensor], Tensor]
    source: Any


_recipes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # gone with the map


def remember(y: Tensor, source: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """``y``, of which is known from now on that it is ``make(source)``."""
    _recipes[y] = Recipe(make, source.detach(), y._version)
    return y


@contextmanager
def kept_as_recipe(x: Tensor) -> Iterator[None]:
    """Inside the block, what saves ``x`` for its backward keeps its recipe, if it has one."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a compiler decides by itself what it keeps
        yield
        return
    recipe = _recipes.get(x)
    hooked = torch.is_grad_enabled() and torch._C._autograd._saved_tensors_hooks_is_enabled()
    if recipe is None or recipe.version != x._version or not hooked:
        yield
        return
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    pack_outer, unpack_outer = outer or (lambda t: t, lambda t: t)
    storage, form = x.untyped_storage()._cdata, (x.shape, x.stride(), x.storage_offset())

    def pack(t: Tensor):
        same = t.untyped_storage()._cdata == storage and (t.shape, t.stride(), t.storage_offset()) == form
        return _Kept(recipe.make, pack_outer(recipe.source)) if same else pack_outer(t)

    def unpack(kept):
        if not isinstance(kept, _Kept):
            return unpack_outer(kept)
        with torch.no_grad():
            return kept.make(unpack_outer(kept.source))

    with saved_tensors_hooks(pack, unpack):
        yield
