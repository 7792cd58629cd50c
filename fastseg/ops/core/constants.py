"""Tensors that depend on sizes and dtypes alone: made once, as ordinary tensors in every mode."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch

from fastseg.ops.core.torch_private import plain_modes

T = TypeVar("T")


@contextmanager
def plainly() -> Iterator[None]:
    """No gradients, no inference mode, no default device but the CPU, no fake or traced tensors."""
    with ExitStack() as stack:
        for leave in plain_modes():
            stack.enter_context(leave())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        yield


def constant(maxsize: int | None = None) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """``functools.lru_cache`` for functions that make tensors on a CPU or on a device that they name.

    Without it, a tensor first made in inference mode, under fake tensors or on ``torch.device("meta")`` would be handed
    to every later call.
    """

    def decorate(make: Callable[..., T]) -> Callable[..., T]:
        if not plain_modes():  # then what is made may belong to a mode: it is made at each call
            return make

        @functools.lru_cache(maxsize)
        @functools.wraps(make)
        def kept(*args):
            with plainly():
                return make(*args)

        return kept

    return decorate
