"""All private names of torch and Triton that fastseg uses, each with a fallback."""

import functools
import operator
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter


def _keys(*names: str) -> int:
    sets = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return functools.reduce(operator.or_, sets).raw_repr()


# The dispatch keys of an ordinary call, outside and inside inference mode: of the thread, and of a tensor.
_THREAD = {_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect")}


_TENSOR = {
    _keys(device, f"Autocast{device}", *more)
    for device in ("CPU", "CUDA")
    for more in ((), ("ADInplaceOrView", f"Autograd{device}"))
}


def _is_bare(args: Iterable) -> bool:
    """True if the dispatcher would only forward a call to the implementation, which takes it 4 to 10 us.

    It would do more under a mode, a tracer, a function transform, forward-mode AD, a tensor subclass, a lazily negated
    view, or a profiler that asks for names, and when a gradient is recorded.
    """
    if (
        torch._C._dispatch_tls_local_include_set().raw_repr() not in _THREAD
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    ):
        return False
    grad, keys_of = torch.is_grad_enabled(), torch._C._dispatch_keys
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            if (grad and arg.requires_grad) or keys_of(arg).raw_repr() not in _TENSOR:
                return False
        elif kind is list or kind is tuple:
            if arg and type(arg[0]) is not int and not _is_bare(arg):
                return False
        elif isinstance(arg, Tensor):
            return False
    return True
