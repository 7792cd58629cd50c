"""Functions that subclasses of ``Tensor``, modes and tracers can take over, as they can torch's own."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.overrides import handle_torch_function, has_torch_function

P = ParamSpec("P")
R = TypeVar("R")


def overridable(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function so that a ``__torch_function__`` among its arguments, or in their lists, is asked.

    ``torch.fx`` then records the call as one ``call_function``; the choices between kernels would end its trace.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = (*args, *kwargs.values()) if kwargs else args
        if has_torch_function(given):
            return handle_torch_function(call, given, *args, **kwargs)
        for each in given:
            if isinstance(each, (list, tuple)) and has_torch_function(each):
                return handle_torch_function(call, each, *args, **kwargs)
        return function(*args, **kwargs)

    return call
