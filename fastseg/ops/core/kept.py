"""What is made of a model's tensors: at each call, or kept inside ``frozen``.

Outside there is no state: a weight may be written to in ways that nothing counts, and folded weights that outlive it
belong to no model at all.
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
    """What was made of ``tensors``, and of what was made of them; of nothing else.

    It holds all of them, so that no identity and no memory is given out again; a counted write ends the keeping.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        self._known: dict[int, tuple[Tensor, Tensor, tuple]] = {}  # itself, what holds its memory, how it was
        self._made: dict[tuple, Any] = {}
        for t in tensors:
            self._learn(t)

    def _learn(self, t: Tensor) -> None:
        self._known[id(t)] = (t, t.detach(), mark(t))

    def knows(self, sources: Iterable[Tensor | None]) -> bool:
        """Whether all of them are its own, and none was written to."""
        known = self._known
        for t in sources:
            if t is not None:
                own = known.get(id(t))
                if own is None or own[2] != mark(t):
                    return False
        return True

    def made(self, sources: tuple[Tensor | None, ...], key: tuple, make: Callable[[], T]) -> T:
        """``make()`` of the first call; ``knows(sources)``, and ``key`` says all else that it depends on."""
        place = (key, *map(id, sources))
        if place in self._made:
            return self._made[place]
        with torch.inference_mode(False), torch.no_grad():
            new = make()
        leaves = [t for t in tree_leaves(new) if isinstance(t, Tensor)]
        if any(type(t) is not Tensor for t in leaves):  # of a mode that stands in for tensors
            return new
        for t in leaves:
            self._learn(t)
        return self._made.setdefault(place, new)


def mark(t: Tensor) -> tuple[int | None, int]:
    """How often ``t`` was written to, and where its numbers lie: other numbers, other marks, where torch counts."""
    version = None if t.is_inference() else t._version  # made in inference mode: nothing is counted
    try:
        return version, t.data_ptr()
    except RuntimeError:  # it has no memory: a fake, a tensor that a process holds a part of
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
    """Inside the block nothing of ``models`` changes: what is made of their weights, such as folded norms, is kept.

    Outside, and in other threads, it is made at each call. It counts in evaluation without gradients; results are the
    same up to rounding: a norm whose folding does not pay at each call is folded here. Leaving drops all of it, by an
    exception too. Blocks may be nested.

    Parameters and buffers must not be written to in the block. Writes that torch counts, new tensors, options and hooks
    are noticed all the same; writes through ``p.data`` and to tensors made in inference mode are not. A CUDA graph
    captured inside must not be replayed after the block, whose folded weights it reads.

    Args:
        models: any modules.

    Example:
        >>> with torch.no_grad(), fastseg.frozen(model):  # doctest: +SKIP
        ...     maps = [model.predict(x) for x in batches]
    """
    for model in models:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"frozen: {type(model).__name__} is no module; give models")
    with keeping(Kept(t for model in models for t in tensors_of(model))):
        yield


def tensors_of(model: torch.nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


def keeper(sources: tuple[Tensor | None, ...]) -> Kept | None:
    """Who keeps what is made of these tensors here, if anybody; a captured graph and a transform keep nothing."""
    if torch.compiler.is_compiling():
        return None
    active = keepers.get()
    if not active or transforms_active():
        return None
    return next((kept for kept in reversed(active) if kept.knows(sources)), None)


def made_once(sources: tuple[Tensor | None, ...], key: tuple, make: Callable[[], T]) -> T:
    """``make()``; where the sources are frozen, that of the first call.

    Args:
        sources: every tensor that the result depends on.
        key: which result, and every option that it depends on.
    """
    kept = keeper(sources)
    return make() if kept is None else kept.made(sources, key, make)
