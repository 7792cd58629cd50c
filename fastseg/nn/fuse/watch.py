"""Decide which modules must be called, and which activation a module is.

A fused op replaces modules by what their classes do. A module is called instead if it has a hook, another class (a
wrapper, a parametrisation, another norm), a forward replaced on the instance, or an option that the op lacks.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastseg.ops.core.explain import IN_UNFUSED, UNFUSED_DEPTH, in_unfused
from fastseg.ops.core.norm import ACTIVATIONS, Activation

# torch's hooks on all modules. The names are private; a torch that lacks one of them is assumed to have no such hooks.
ON_ALL_MODULES = tuple(
    getattr(torch_module, name, {})
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
)

FUSED_ACTS: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.LeakyReLU: "leaky_relu"}
SLOPE = 0.01  # of the fused leaky ReLU


def watched(*pairs: Any) -> str:
    """Why a module must be called rather than read for its parameters, or "".

    Args:
        pairs: a module, or None, and the class that it must be of; the next module and its class; and so on.
    """
    unfused = UNFUSED_DEPTH[0] and in_unfused()
    for i in range(0, len(pairs), 2):
        module, plain = pairs[i], pairs[i + 1]
        if module is None:
            continue
        if unfused:
            return IN_UNFUSED
        if type(module) is not plain:
            return f"a child is {type(module).__name__}, not {plain.__name__}"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return "a child has hooks"
        if "forward" in vars(module):  # replaced on the instance, as offloading and adapter libraries do
            return "a child's forward was replaced"
        if module._compiled_call_impl is not None:
            return "a child is compiled by itself"
        if any(ON_ALL_MODULES):
            return "all modules have hooks"
    return ""


def rewritten(*modules: nn.Module) -> bool:
    """True if version counters may miss writes to their parameters: FSDP writes gathered values uncounted.

    ``fully_shard`` is recognised by the hook that it puts on each module whose parameters it shards.
    """
    return any(module._load_state_dict_post_hooks for module in modules)


def split_act(act: "nn.Module | Activation | None") -> tuple[Activation | None, Callable[[Tensor], Tensor] | None]:
    """What a fused op makes of ``act``: the name it is given, and the module to call on its result.

    An unwatched module that is one of the fused activations becomes its name; any other is called.
    """
    if not isinstance(act, nn.Module):
        return act, None
    name = FUSED_ACTS.get(type(act))
    if name is None:
        return None, act
    if why := watched(act, type(act)):
        return None, _out_of_place(act) if act.inplace and why != IN_UNFUSED else act
    if (name == "leaky_relu" and act.negative_slope != SLOPE) or (
        name == "relu6" and (act.min_val, act.max_val) != (0, 6)
    ):
        return None, act
    return name, None


def _out_of_place(act: nn.Module) -> Callable[[Tensor], Tensor]:
    """``act`` without writing into its input: torch's full backward hooks refuse a module that works in place."""

    def call(x: Tensor) -> Tensor:
        vars(act)["inplace"] = False
        try:
            return act(x)
        finally:
            vars(act)["inplace"] = True

    return call


def apply_act(act: "nn.Module | Activation | None", x: Tensor) -> Tensor:
    """``act(x)``, never in place where the module is one of the fused activations: a hook may keep ``x``, and autograd
    forbids writes to what a backward hook has seen."""
    name, module = split_act(act)
    return ACTIVATIONS[name or "none"](x) if module is None else module(x)
