"""Every private name of torch that fastseg uses, each with a fallback that costs speed and gives the same results.

A version of torch without one of the names is no error: tests/test_private_names.py hides each of them in turn.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastseg.kernels.runtime.torch_private import (
    TorchDispatchMode,
    constant_while_compiling,
    find,
    is_tracing,
    tree_leaves,
)

__all__ = [
    "NORMS",
    "VALUES_ASKED_FOR",
    "FakeTensorMode",
    "TorchDispatchMode",
    "aoti_compiler",
    "aoti_loader",
    "assert_async",
    "constant_while_compiling",
    "deterministic",
    "dispatch_modes",
    "end_allocate_to_pool",
    "foreach_copy_",
    "forward_ad_level",
    "functional_mode",
    "hooks_enabled",
    "inductor_patch",
    "inside_jvp",
    "is_bare",
    "is_batched",
    "is_tracing",
    "mkldnn_convolution",
    "mkldnn_reorder",
    "mkldnn_reorder_transposed",
    "mkldnn_transposed_convolution",
    "outer_hooks",
    "plain_modes",
    "pool_with_index",
    "register_pytree_node",
    "transforms_active",
    "tree_leaves",
    "tree_map_only",
    "unpool3d_to",
    "unpool_to",
    "wrap_triton",
]  # fmt: skip

_always = lambda *args: True

# --- what follows a call: where it cannot be asked, something always does, and torch's own ops run

_interpreter: Callable[[], Any] | None = find("torch._C._functorch.peek_interpreter_stack", None)
transforms_active: Callable[[], bool] = find(
    "torch._C._are_functorch_transforms_active",
    _always if _interpreter is None else lambda: _interpreter() is not None,
)
"""Whether a transform of ``torch.func`` is running."""

forward_ad_level: Callable[[], int] = functools.partial(getattr, forward_ad, "_current_level", 0)
"""The level of forward-mode AD; below 0 there is none."""

_eager_transforms: Any = find("torch._functorch.eager_transforms", None)


def inside_jvp() -> bool:
    """Whether ``torch.func.jvp`` runs, or what is built on it: what reaches a device then shows no tangents."""
    return getattr(_eager_transforms, "JVP_NESTING", 0) > 0


is_batched: Callable[[Tensor], bool] = find("torch._C._functorch.is_legacy_batchedtensor", _always)
"""Whether a tensor is of ``torch.autograd.grad(..., is_grads_batched=True)``, whose vmap is not ``torch.func``'s."""

dispatch_modes: Callable[[], int] = find("torch._C._len_torch_dispatch_stack", _always)
"""How many dispatch modes look on in this thread."""

# --- saved tensors

outer_hooks: Callable[[bool], tuple | None] | None = find("torch._C._autograd._top_saved_tensors_default_hooks", None)
"""The innermost hooks of ``saved_tensors_hooks``."""

hooks_enabled: Callable[[], bool] = bool
"""Whether saved-tensor hooks may be set here. Without them the maps are kept as they are."""

if outer_hooks is not None:
    hooks_enabled = find("torch._C._autograd._saved_tensors_hooks_is_enabled", bool)

# --- modes left for a while

_leaving: list[Callable[[], AbstractContextManager] | None] = [
    find("torch.utils._python_dispatch._disable_current_modes", None),
    find("torch._C._DisableFuncTorch", None),
    find("torch._C.DisableTorchFunction", None),
]


def plain_modes() -> list[Callable[[], AbstractContextManager]]:
    """Context managers that together leave every mode and transform; none of them where one is missing."""
    return [] if None in _leaving else [leave for leave in _leaving if leave is not None]


# --- the dispatcher


def _keys(*names: str) -> int:
    sets = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return functools.reduce(operator.or_, sets).raw_repr()


def _bare_test() -> Callable[[Iterable], bool]:
    """``is_bare`` of this version of torch."""
    included = find("torch._C._dispatch_tls_local_include_set", None)
    function_modes = find("torch._C._is_torch_function_mode_enabled", None)
    profiler = find("torch._C._autograd._profiler_enabled", None)
    keys_of = find("torch._C._dispatch_keys", None)
    try:
        # What the dispatcher sees of an ordinary call, in and out of inference mode: of the thread, and of a tensor.
        of_thread = {_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect")}
        of_tensor = {
            _keys(device, f"Autocast{device}", *more)
            for device in ("CPU", "CUDA")
            for more in ((), ("ADInplaceOrView", f"Autograd{device}"))
        }
    except (AttributeError, TypeError):
        return lambda args: False
    if included is None or function_modes is None or profiler is None or keys_of is None:
        return lambda args: False

    def bare(args: Iterable) -> bool:
        if included().raw_repr() not in of_thread or function_modes() or profiler() or forward_ad_level() >= 0:
            return False
        grad = torch.is_grad_enabled()
        for arg in args:
            kind = type(arg)
            if kind is Tensor or kind is Parameter:
                if (grad and arg.requires_grad) or keys_of(arg).raw_repr() not in of_tensor:
                    return False
            elif kind is list or kind is tuple:
                if arg and type(arg[0]) is not int and not bare(arg):
                    return False
            elif isinstance(arg, Tensor):
                return False
        return True

    return bare


is_bare = _bare_test()
"""Whether the dispatcher would pass a call on to the implementation as it is, which takes it 4 to 10 us.

It would not where something stands between them: a mode, a tracer, a function transform, forward-mode AD, a subclass, a
view that is to be negated first, a profiler that asks for names; nor where a gradient is recorded.
"""

# --- fake tensors, trees


class _NoFakeTensors:
    def __init__(self, **options: object):
        raise RuntimeError(f"torch {torch.__version__} has no torch._subclasses.fake_tensor.FakeTensorMode")


class _Never(Exception):
    """What is never raised."""


FakeTensorMode: Any = find("torch._subclasses.fake_tensor.FakeTensorMode", _NoFakeTensors)
VALUES_ASKED_FOR: tuple[type[BaseException], ...] = (
    find("torch._subclasses.fake_tensor.DataDependentOutputException", _Never),
    find("torch._subclasses.fake_tensor.DynamicOutputShapeException", _Never),
    find("torch._subclasses.fake_tensor.UnsupportedFakeTensorException", _Never),
)
"""What fake tensors raise where a value is asked for."""


def _mapped(kind: type, function: Callable, tree: Any) -> Any:
    if isinstance(tree, dict):
        return type(tree)({key: _mapped(kind, function, part) for key, part in tree.items()})
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_mapped(kind, function, part) for part in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(_mapped(kind, function, part) for part in tree)
    return function(tree) if isinstance(tree, kind) else tree


tree_map_only: Callable[[type, Callable, Any], Any] = find("torch.utils._pytree.tree_map_only", _mapped)
_nothing = lambda *args, **names: None
register_pytree_node: Callable[..., None] = find("torch.utils._pytree.register_pytree_node", _nothing)

# --- single functions


def _assert_now(valid: Tensor, message: str) -> None:
    if not valid.item():
        raise RuntimeError(message)


def _copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


assert_async: Callable[[Tensor, str], None] = find("torch._assert_async", _assert_now)
"""Raise on the device, later, where ``valid`` is false."""

deterministic: Callable[[], bool] = find(
    "torch._C._get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled
)
"""``torch.are_deterministic_algorithms_enabled``, which is one Python call more."""

foreach_copy_: Callable[[Sequence[Tensor], Sequence[Tensor]], Any] = find("torch._foreach_copy_", _copy_each)

# What torch.nn.functional's poolings end in.
pool_with_index: Callable[..., tuple[Tensor, Tensor]] = find(
    "torch._C._nn.max_pool2d_with_indices", torch.ops.aten.max_pool2d_with_indices.default
)
unpool_to: Callable[..., Tensor] = find("torch._C._nn.max_unpool2d", torch.ops.aten.max_unpool2d.default)
"""(input, indices, (OH, OW))."""
unpool3d_to: Callable[..., Tensor] = find("torch._C._nn.max_unpool3d", torch.ops.aten.max_unpool3d.default)
"""(input, indices, (OD, OH, OW), stride, padding)."""

mkldnn_convolution: Callable[..., Tensor] | None = find("torch.ops.mkldnn._convolution_pointwise", None)
mkldnn_reorder: Callable[..., Tensor] | None = find("torch.ops.mkldnn._reorder_convolution_weight", None)
mkldnn_transposed_convolution: Callable[..., Tensor] | None = find(
    "torch.ops.mkldnn._convolution_transpose_pointwise", None
)
mkldnn_reorder_transposed: Callable[..., Tensor] | None = find(
    "torch.ops.mkldnn._reorder_convolution_transpose_weight", None
)

end_allocate_to_pool: Callable[..., None] = find("torch._C._cuda_endAllocateToPool", _nothing)

NORMS: tuple[type[nn.Module], ...] = (
    find("torch.nn.modules.batchnorm._NormBase", nn.BatchNorm2d),
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)  # fmt: skip
"""Batch and instance norms."""


def aoti_compiler() -> Callable[..., str] | None:
    """AOTInductor's ``(program, *, package_path, inductor_configs) -> path``; None where this torch has none."""
    return find("torch._inductor.aoti_compile_and_package", None)


def aoti_loader() -> Callable[[str], Any] | None:
    """``(path) -> a package of AOTInductor as a callable``; None where this torch has none."""
    return find("torch._inductor.aoti_load_package", None)


def functional_mode() -> Any:
    """The mode in which ``torch.export`` makes a graph functional; None where this torch has none."""
    return find("torch._subclasses.functional_tensor.FunctionalTensorMode", None)


def wrap_triton() -> Callable[[Any], Any] | None:
    """``torch.library.wrap_triton``, which puts a launch into a graph; None where this torch has none."""
    return find("torch.library.wrap_triton", None)


def inductor_patch(**options: object) -> AbstractContextManager:
    """Options of ``torch.compile``'s default backend, set inside the block; imported here, since it takes seconds.

    Raises:
        RuntimeError: this version of torch has no such options.
    """
    patch = find("torch._inductor.config.patch", None)
    if patch is None:
        raise RuntimeError(f"torch {torch.__version__} has no torch._inductor.config.patch")
    return patch(**options)
