"""Tensors that depend on sizes and dtypes alone: made once, as ordinary tensors in every mode."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

T = TypeVar("T")


@contextmanager
def plainly() -> Iterator[None]:
    """Turn off gradients, inference mode, default devices other than the CPU, and fake or traced tensors."""
    with (
        _disable_current_modes(),
        torch._C._DisableFuncTorch(),
        torch._C.DisableTorchFunction(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        yield


def constant(maxsize: int | None = None) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """``functools.lru_cache`` for functions that make tensors on a CPU or on a device that they name.

    Without it, a tensor first made in inference mode, under fake tensors or on ``torch.device("meta")`` would be handed
    to every later call.
    """

    def decorate(make: Callable[..., T]) -> Callable[..., T]:
        @functools.lru_cache(maxsize)
        @functools.wraps(make)
        def kept(*args):
            with plainly():
                return make(*args)

        return kept

    return decorate
