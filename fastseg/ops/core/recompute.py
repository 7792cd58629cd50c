"""Recompute cheap activations in the backward instead of saving them.

A convolution saves its input. If the input is ``act(norm(z))``, the norm saves z already. The convolution then saves a
recipe, and its backward recomputes the same bits with one read and one write. The recipe of a concatenated or unpooled
map names the sources of the recipes of its parts. Other saved-tensor hooks (checkpointing, offloading, counters) see
the sources in place of the map.
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
    """``make(*sources)`` recomputes the map as it was at ``version``, from the sources at ``source_versions``."""

    make: Callable[..., Tensor]
    sources: tuple[Tensor, ...]
    version: int
    source_versions: tuple[int, ...]

    @property
    def holds(self) -> bool:
        """True if no source has been written to."""
        return all(t._version == v for t, v in zip(self.sources, self.source_versions, strict=True))


class _Kept(NamedTuple):
    """Saved in place of a map: its recipe's ``make``, and the sources as packed by the hooks around ours."""

    make: Callable[..., Tensor]
    sources: tuple[Any, ...]
    versions: tuple[int, ...]


_recipes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # dies with the map


def remember(y: Tensor, sources: Sequence[Tensor], make: Callable[..., Tensor]) -> Tensor:
    """Return ``y`` and remember that it is ``make(*sources)``; a source with a recipe is recomputed by it."""
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
    """The recipe of a map, if it has one that still holds."""
    recipe = _recipes.get(y)
    return recipe if recipe is not None and recipe.version == y._version and recipe.holds else None


def _as_it_is(y: Tensor) -> Recipe:
    return Recipe(lambda same: same, (y,), y._version, (y._version,))


@contextmanager
def kept_as_recipe(x: Tensor) -> Iterator[None]:
    """Inside the block, save the recipe of ``x`` in its place, if it has one."""
    if followed(x):  # a compiler decides by itself what to save
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
                    "a map that fastseg recomputes in the backward has a source that was modified by an "
                    "inplace operation since; write to a copy of it"
                )
        with torch.no_grad():
            return kept.make(*sources)

    with saved_tensors_hooks(pack, unpack):
        yield
