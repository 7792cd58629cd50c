"""Tensors derived from a model's weights: made at each call, or kept inside ``frozen``.

Outside ``frozen`` there is no state. A weight may be written to in ways that nothing counts, and folded weights must
not outlive their model.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastseg.ops.core.torch_private import transforms_active, tree_leaves

T = TypeVar("T")


class Kept:
    """What was derived from ``tensors``, or from other derived tensors; nothing else is kept.

    It holds a reference to all of them, so no id and no address is reused. A counted write to any of them ends the
    keeping.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        self._known: dict[int, tuple[Tensor, Tensor, tuple]] = {}  # the tensor, its storage, its mark
        self._made: dict[tuple, Any] = {}
        for t in tensors:
            self._learn(t)

    def _learn(self, t: Tensor) -> None:
        self._known[id(t)] = (t, t.detach(), mark(t))

    def knows(self, sources: Iterable[Tensor | None]) -> bool:
        """True if all ``tensors`` are its own and none was written to."""
        known = self._known
        for t in sources:
            if t is not None:
                own = known.get(id(t))
                if own is None or own[2] != mark(t):
                    return False
        return True

    def made(self, sources: tuple[Tensor | None, ...], key: tuple, make: Callable[[], T]) -> T:
        """The result of the first ``make()``, if it ``knows(sources)``; ``key`` names all else that it depends on."""
        place = (key, *map(id, sources))
        if place in self._made:
            return self._made[place]
        with torch.inference_mode(False), torch.no_grad():
            new = make()
        leaves = [t for t in tree_leaves(new) if isinstance(t, Tensor)]
        if any(type(t) is not Tensor for t in leaves):  # of a mode with stand-in tensors
            return new
        for t in leaves:
            self._learn(t)
        return self._made.setdefault(place, new)


def mark(t: Tensor) -> tuple[int | None, int]:
    """The version counter and the data address of ``t``: they change with every write that torch counts."""
    version = None if t.is_inference() else t._version  # made in inference mode: writes are not counted
    try:
        return version, t.data_ptr()
    except RuntimeError:  # it has no storage: a fake tensor, or one of which the process holds a shard
        return version, 0


keepers: ContextVar[tuple[Kept, ...]] = ContextVar("fastseg_kept", default=())


@contextmanager
def keeping(kept: Kept) -> Iterator[None]:
    """In this thread, what is made of the tensors of ``kept`` is kept there."""
    token = keepers.set((*keepers.get(), kept))
    try:
        yield
    finally:
        keepers.reset(token)


@contextmanager
def frozen(*models: torch.nn.Module) -> Iterator[None]:
    """Keep what is derived from the weights of ``models``, such as folded norms, while the block runs.

    Outside, and in other threads, it is made at each call. It counts in evaluation without gradients; results are the
    same up to rounding: a norm whose folding does not pay at each call is folded here. Leaving drops all of it, by an
    exception too. Blocks may be nested.

    Parameters and buffers must not be written to in the block. Writes that torch counts, replaced tensors, changed
    options and hooks are noticed all the same; writes through ``p.data`` and to tensors made in inference mode are not.
    A CUDA graph captured inside reads the folded weights, so it must not be replayed after the block.

    Args:
        models: any modules.

    Example:
        >>> with torch.no_grad(), fastseg.frozen(model):  # doctest: +SKIP
        ...     maps = [model.predict(x) for x in batches]
    """
    for model in models:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"frozen: {type(model).__name__} is not a torch.nn.Module; give models")
    with keeping(Kept(t for model in models for t in tensors_of(model))):
        yield


def tensors_of(model: torch.nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of the modules."""
    yield from model.parameters()
    yield from model.buffers()


def keeper(sources: tuple[Tensor | None, ...]) -> Kept | None:
    """The keeper for these tensors in this thread, or None; a captured graph and a transform keep nothing."""
    return None if torch.compiler.is_compiling() else eager_keeper(sources)


def eager_keeper(sources: tuple[Tensor | None, ...]) -> Kept | None:
    """``keeper`` outside of captured graphs."""
    active = keepers.get()
    if not active or transforms_active():
        return None
    return next((kept for kept in reversed(active) if kept.knows(sources)), None)


def made_once(sources: tuple[Tensor | None, ...], key: tuple, make: Callable[[], T]) -> T:
    """``make()``; if the sources are frozen, the result of the first call.

    Args:
        sources: every tensor that the result depends on.
        key: name of the result, and every option that it depends on.
    """
    kept = keeper(sources)
    return make() if kept is None else kept.made(sources, key, make)
