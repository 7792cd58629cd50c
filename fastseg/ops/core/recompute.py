"""Maps that are cheap to make again: what would keep one for its backward keeps what it was made of instead.

A convolution keeps its input. Where that is ``act(norm(z))``, z is kept by the norm already; so the convolution keeps a
recipe, and its backward makes the same bits again, with one read and one write. Of maps put side by side, or unpooled,
the recipe names what theirs name. Saved-tensor hooks of others (checkpoints, offloading, counters) see the sources in
the place of the map.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

from fastseg.ops.core.dispatch import followed
from fastseg.ops.core.torch_private import hooks_enabled, outer_hooks


class Recipe(NamedTuple):
    """``make(*sources)`` is the map, as it was at ``version``; of the sources at ``source_versions``."""

    make: Callable[..., Tensor]
    sources: tuple[Tensor, ...]
    version: int
    source_versions: tuple[int, ...]

    @property
    def holds(self) -> bool:
        """Whether the sources are what they were."""
        return all(t._version == v for t, v in zip(self.sources, self.source_versions, strict=True))


class _Kept(NamedTuple):
    """In the place of a map: its recipe's ``make``, and the sources as the hooks around ours have packed them."""

    make: Callable[..., Tensor]
    sources: tuple[Any, ...]
    versions: tuple[int, ...]


_recipes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # gone with the map


def remember(y: Tensor, sources: Sequence[Tensor], make: Callable[..., Tensor]) -> Tensor:
    """``y``, of which is known from now on that it is ``make(*sources)``; a source with a recipe is made by it."""
    recipes = [recipe_of(source) or _as_it_is(source) for source in sources]
    leaves = tuple(leaf.detach() for recipe in recipes for leaf in recipe.sources)
    makes = [recipe.make for recipe in recipes]
    counts = [len(recipe.sources) for recipe in recipes]

    def make_all(*flat: Tensor) -> Tensor:
        parts = iter(flat)
        return make(*(each(*islice(parts, count)) for each, count in zip(makes, counts, strict=True)))

    _recipes[y] = Recipe(make_all, leaves, y._version, tuple(leaf._version for leaf in leaves))
    return y


def recipe_of(y: Tensor) -> Recipe | None:
    """Its recipe, if it has one that still holds."""
    recipe = _recipes.get(y)
    return recipe if recipe is not None and recipe.version == y._version and recipe.holds else None


def _as_it_is(y: Tensor) -> Recipe:
    return Recipe(lambda same: same, (y,), y._version, (y._version,))


@contextmanager
def kept_as_recipe(x: Tensor) -> Iterator[None]:
    """Inside the block, what saves ``x`` for its backward keeps its recipe, if it has one."""
    if followed(x):  # a compiler decides by itself what it keeps
        yield
        return
    recipe = recipe_of(x)
    hooked = torch.is_grad_enabled() and hooks_enabled()
    if recipe is None or not hooked:
        yield
        return
    outer = outer_hooks(False)
    pack_outer, unpack_outer = outer or (lambda t: t, lambda t: t)
    storage, form = x.untyped_storage()._cdata, (x.shape, x.stride(), x.storage_offset())

    def pack(t: Tensor):
        same = t.untyped_storage()._cdata == storage and (t.shape, t.stride(), t.storage_offset()) == form
        if not same:
            return pack_outer(t)
        return _Kept(recipe.make, tuple(map(pack_outer, recipe.sources)), recipe.source_versions)

    def unpack(kept):
        if not isinstance(kept, _Kept):
            return unpack_outer(kept)
        sources = [unpack_outer(packed) for packed in kept.sources]
        for source, packed, version in zip(sources, kept.sources, kept.versions, strict=True):
            if source is packed and source._version != version:  # autograd counts the writes to the map alone
                raise RuntimeError(
                    "a map that fastseg makes again for the backward was made of one that has been modified by an "
                    "inplace operation since; write to a copy of it"
                )
        with torch.no_grad():
            return kept.make(*sources)

    with saved_tensors_hooks(pack, unpack):
        yield
