"""Tensors that depend on sizes and dtypes alone, made once: ordinary ones, whatever mode asks for them first."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

T = TypeVar("T")


@contextmanager
def plainly() -> Iterator[None]:
    """No gradients, no inference mode, no default device but the CPU, no fake or traced tensors."""
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
    """``functools.lru_cache`` for functions that make tensors on a CPU, or on a device that they name.

    A tensor made in inference mode, under fake tensors or on ``torch.device("meta")`` would be met by every later call.
    """

    def decorate(make: Callable[..., T]) -> Callable[..., T]:
        @functools.lru_cache(maxsize)
        @functools.wraps(make)
        def kept(*args):
            with plainly():
                return make(*args)

        return kept

    return decorate
