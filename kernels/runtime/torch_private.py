"""Private names of torch that the launchers' ground uses, each with a fallback; no Triton here.

``fastseg/ops/core/torch_private.py`` holds the names that the library uses, and is built of this one.
"""

import pkgutil
from collections.abc import Callable
from typing import Any

import torch


def find(name: str, fallback: Any) -> Any:
    """The object with this dotted name, or ``fallback`` where this version of torch or Triton has none.

    A fallback gives the same results. It may cost speed.
    """
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, RuntimeError):
        return fallback


def leaves_of(tree: object) -> list:
    """What tuples, lists and dicts hold, in order: the fallback of torch's ``tree_leaves``."""
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    return [leaf for part in tree for leaf in leaves_of(part)] if isinstance(tree, (tuple, list)) else [tree]


def constant_while_compiling(function: Callable) -> Callable:
    """``torch.compiler.assume_constant_result`` without its import of the compiler, which takes over a second.

    A torch that does not know the mark traces the function instead.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class NoDispatchMode:
    """In the place of torch's class: entering it raises."""

    def __enter__(self):
        raise RuntimeError(f"torch {torch.__version__} has no torch.utils._python_dispatch.TorchDispatchMode")

    def __exit__(self, *exc) -> None:
        pass


conv_precision: Callable[[str, str], str] = find(
    "torch._C._get_fp32_precision_getter", lambda backend, op: torch.backends.cudnn.conv.fp32_precision
)
"""("cuda", "conv") -> the precision of fp32 convolutions: what the public attribute reads, in a call less."""

is_tracing: Callable[[], bool] = find("torch._C._is_tracing", torch.jit.is_tracing)
tree_leaves: Callable[[Any], list] = find("torch.utils._pytree.tree_leaves", leaves_of)
TorchDispatchMode: Any = find("torch.utils._python_dispatch.TorchDispatchMode", NoDispatchMode)
