"""Modules that ``torch.fx`` records whole, as it does torch's own."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.overrides import has_torch_function


def leaf(forward: Callable) -> Callable:
    """Decorate a module's ``forward``: among a tracer's stand-ins it is one ``call_module``, not looked into.

    A ``torch.fx.Tracer`` takes for leaves what lies in ``torch.nn``, and would go into a drop-in for it, whose choices
    between kernels no graph of calls can hold. A module that is itself the root of the trace is gone into.
    """

    @functools.wraps(forward)
    def call(self: nn.Module, *args, **kwargs):
        if has_torch_function(args) or (kwargs and has_torch_function(tuple(kwargs.values()))):
            found = recorded(self, args, kwargs)
            if found is not None:
                return found
        return forward(self, *args, **kwargs)

    return call


def recorded(module: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """The call in the graph of the tracer whose stand-ins are among the arguments; None: there is none."""
    from torch.fx import Proxy

    tracers = [value.tracer for value in (*args, *kwargs.values()) if isinstance(value, Proxy)]
    path = tracers[0].path_of_module(module) if tracers else ""
    return tracers[0].create_proxy("call_module", path, args, kwargs) if path else None
