"""Modules that ``torch.fx`` records as one call, as it does torch's own."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.overrides import has_torch_function

from fastseg.ops.core.explain import UNFUSED_DEPTH, in_unfused


def leaf(forward: Callable) -> Callable:
    """Decorate a module's ``forward`` so that ``torch.fx`` records it as one ``call_module``.

    A ``torch.fx.Tracer`` treats modules from ``torch.nn`` as leaves. It would trace into a drop-in for one, whose
    choices between kernels no graph can hold. A module that is the root of the trace is traced into.
    """

    @functools.wraps(forward)
    def call(self: nn.Module, *args, **kwargs):
        if UNFUSED_DEPTH[0] and (torchs := stood_for(self)) is not None:
            return torchs.forward(self, *args, **kwargs)
        if has_torch_function(args) or (kwargs and has_torch_function(tuple(kwargs.values()))):
            found = recorded(self, args, kwargs)
            if found is not None:
                return found
        return forward(self, *args, **kwargs)

    return call


def stood_for(module: nn.Module) -> type[nn.Module] | None:
    """Inside ``fastseg.unfused()``, the torch class that a drop-in stands for; else None."""
    if not in_unfused():
        return None
    for kind in type(module).__mro__:
        torchs = getattr(nn, kind.__name__, None)
        if torchs is not None and torchs is not kind and issubclass(kind, torchs):
            return torchs
    return None


def recorded(module: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """The call in the graph of the tracer whose stand-ins are among the arguments; None: there is none."""
    from torch.fx import Proxy

    tracers = [value.tracer for value in (*args, *kwargs.values()) if isinstance(value, Proxy)]
    path = tracers[0].path_of_module(module) if tracers else ""
    return tracers[0].create_proxy("call_module", path, args, kwargs) if path else None
