"""Detect changes of a model: its tensors, their values, its options, its modules and their hooks."""

import copy
import operator
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastseg.ops.core.torch_private import tree_leaves

Check = Literal["counts", "samples", "values"]
CHECKS: tuple[str, ...] = get_args(Check)
WHOLE = 2**20  # bytes that "samples" reads at most, apart from one PIECE of each place
SMALL, PIECE = 2**10, 64  # bytes: a tensor that is read whole; what is read of another in each of PLACES
PLACES = 4

_HELD = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # these, other hooks, and ``training``, which a copy has its own of


class Marks:
    """The state of a model at one time. It holds every tensor and its storage, so that no id or address is reused.

    Args:
        model: any module.
        check: what to compare at each call beside tensors, memory, options, modules and hooks: "counts": torch's
            version counters; "samples": the same, and 1 MiB of values: small tensors whole, 4 pieces of each larger
            one; "values": the same as "counts", and all values. Tensors made in inference mode, which have no version
            counter, have all their values compared in any case.
    """

    def __init__(self, model: nn.Module, check: Check):
        modules = list(model.modules())
        held = [vars(module).get(name, {}) for module in modules for name in _HELD]
        self.empty = [one for one in held if not one]
        self.held = [one.values() for one in held if one]
        self.objects = list(chain.from_iterable(self.held))
        self.modules, self.types = modules, list(map(type, modules))
        self.dicts = list(map(vars, modules))
        self.sizes = list(map(len, self.dicts))
        self.getters, self.getters_dicts = _getters(self.dicts)
        self.options = [_as_it_is(getter(one)) for getter, one in zip(self.getters, self.getters_dicts, strict=True)]
        found = [t for t in (*self.objects, *tree_leaves(self.options)) if isinstance(t, Tensor)]
        tensors = list({id(t): t for t in found if _has_memory(t)}.values())
        self.tensors = tensors
        self.memory = [t.detach() for t in tensors]
        self.addresses = [t.data_ptr() for t in tensors]
        self.counted = [t for t in tensors if not t.is_inference()]
        self.versions = [t._version for t in self.counted]
        whole = tensors if check == "values" else [t for t in tensors if t.is_inference()]
        self.whole = [(t, t.detach().clone()) for t in whole]
        self.pieces = [piece.numpy().data for piece in _pieces(self.memory)] if check == "samples" else []
        self.sample = self._sampled()

    def are_current(self) -> bool:
        """True if the model is unchanged."""
        objects = list(chain.from_iterable(self.held))
        if any(self.empty) or len(objects) != len(self.objects) or not all(map(operator.is_, objects, self.objects)):
            return False
        if list(map(len, self.dicts)) != self.sizes or list(map(type, self.modules)) != self.types:
            return False
        try:
            if list(map(operator.call, self.getters, self.getters_dicts)) != self.options:
                return False
        except Exception:  # arrays, tensors: compared number by number, or not at all
            return False
        if list(map(Tensor.data_ptr, self.tensors)) != self.addresses:
            return False
        if [t._version for t in self.counted] != self.versions:
            return False
        if self.pieces and self._sampled() != self.sample:
            return False
        return all(map(_equal, *zip(*self.whole, strict=True))) if self.whole else True

    def _sampled(self) -> bytes:
        return b"".join(self.pieces)  # a fifth of torch.cat's time where torch has two threads


def _getters(dicts: list[dict]) -> tuple[list[Callable[[dict], Any]], list[dict]]:
    """The readers of each module's options, and the dictionaries to read them from."""
    names = [[name for name in one if name not in _OF_EVERY_MODULE] for one in dicts]
    found = [(operator.itemgetter(*own), one) for own, one in zip(names, dicts, strict=True) if own]
    return [getter for getter, _ in found], [one for _, one in found]


def _as_it_is(value: Any) -> Any:
    """Copy containers, so that a change inside shows; their contents are compared as they are."""
    if type(value) in (tuple, list):
        return type(value)(map(_as_it_is, value))
    if isinstance(value, dict | list | set):
        return copy.copy(value)
    return value


def _has_memory(t: Tensor) -> bool:
    """True for an ordinary tensor: a fake one has no memory, a sparse or distributed one has it elsewhere."""
    return type(t) in (Tensor, nn.Parameter, nn.Buffer) and t.layout == torch.strided and not t.is_meta


def _equal(t: Tensor, old: Tensor) -> bool:
    """Equal bit by bit, so that NaN equals NaN."""
    return t.dtype == old.dtype and torch.equal(_bytes(t.detach()), _bytes(old))


def _bytes(t: Tensor) -> Tensor:
    return t.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def _pieces(memory: list[Tensor]) -> Iterator[Tensor]:
    """Views of the tensors' memory as bytes."""
    left = WHOLE
    for t in sorted(memory, key=lambda t: t.nbytes):
        if t.device.type != "cpu" or t.numel() == 0:
            continue
        span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        flat = t.as_strided((span,), (1,)).view(torch.uint8)
        if flat.numel() <= max(SMALL, left):
            left -= flat.numel()
            yield flat
            continue
        for place in range(PLACES):
            start = (flat.numel() - PIECE) * place // (PLACES - 1)
            yield flat[start : start + PIECE]
