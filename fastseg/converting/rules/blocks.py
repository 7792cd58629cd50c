"""Rules for torch's own modules: ``Sequential`` of convolution, norm and activation anywhere; pooling with indices."""

from collections.abc import Callable

from torch import Tensor, nn

from fastseg import ops
from fastseg.converting.rule import Rule
from fastseg.nn.fuse.children import not_fusible
from fastseg.nn.fuse.norm import watched_norm
from fastseg.nn.fuse.separable import run_separable
from fastseg.nn.fuse.sequential import Group, next_group, run_layers
from fastseg.nn.fuse.watch import watched
from fastseg.ops.core.dispatch import kernels_run

NOTHING = "nothing to fuse"


def is_sequential(module: nn.Module | None) -> bool:
    """True if the module calls its children one after the other, whatever its class is called."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def layers_of(module: nn.Sequential) -> list[nn.Module]:
    """Its children; in place of a plain ``Sequential`` of depthwise and pointwise convolutions, those."""
    layers: list[nn.Module] = []
    for child in module:
        halves = list(child) if is_sequential(child) and not watched(child, type(child)) else []
        depthwise = len(halves) == 2 and all(type(half) is nn.Conv2d for half in halves)
        layers.extend(halves if depthwise and not not_fusible(halves[0], None, halves[1], None) else [child])
    return layers


def block_of(module: nn.Module | None) -> Group | str:
    """Convolution, norm and activation of a ``Sequential`` that is no more than that, or why it is not.

    A norm or an activation of another class is returned too, to be called; ``nn.Identity`` counts as none.
    """
    if not is_sequential(module) or watched(module, type(module)):
        return f"a block is {type(module).__name__}, not a plain Sequential, or has hooks"
    layers = [child for child in module if not isinstance(child, nn.Identity) or watched(child, nn.Identity)]
    if not layers or watched(layers[0], nn.Conv2d):
        return "a block does not begin with a plain convolution"
    rest = layers[1:]
    norm = rest.pop(0) if rest and isinstance(rest[0], NORMS) else None
    act = rest.pop(0) if rest else None
    if rest:
        return f"a block holds a {type(rest[0]).__name__} after its activation"
    return Group(layers[0], norm, act, len(layers))


NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, nn.SyncBatchNorm)


def separable_group(layers: list[nn.Module], place: int) -> tuple[Group, Group] | None:
    """Depthwise and pointwise convolution with their norms and activations, if they begin at ``place``."""
    first = next_group(layers, place)
    if first.conv is None or first.conv.groups == 1:
        return None
    second = next_group(layers, first.stop)
    if second.conv is None or not_fusible(first.conv, first.norm, second.conv, second.norm):
        return None
    return first, second


def run_all(x: Tensor, layers: list[nn.Module]) -> Tensor:
    """Run the modules one after the other, in groups; where kernels run, a separable convolution is one op."""
    place, start = 0, 0
    while kernels_run(x) and place < len(layers):
        halves = separable_group(layers, place)
        if halves is None:
            place += 1
            continue
        (dw, mid, mid_act, _), (pw, post, post_act, stop) = halves
        x = run_separable(run_layers(x, layers[start:place]), dw, mid, mid_act, pw, post, post_act)
        place = start = stop
    return run_layers(x, layers[start:])


def _refuses(module: nn.Module) -> str:
    layers, why = layers_of(module), NOTHING
    for place in range(len(layers)):
        conv, norm, act, _ = next_group(layers, place)
        if conv is None or (norm is None and act is None):
            continue
        found = watched(conv, nn.Conv2d) or ("" if norm is None else watched_norm(norm))
        found = found or ("" if act is None else watched(act, type(act)))
        if not found:
            return ""
        why = found
    return why


def _takes(module: nn.Module) -> list[nn.Module]:
    layers, taken = layers_of(module), []
    taken += [child for child in module if child not in layers]
    for place in range(len(layers)):
        taken += [part for part in next_group(layers, place)[:3] if part is not None]
    return taken


def _run(module: nn.Module, original: Callable, input: Tensor) -> Tensor:
    return run_all(input, layers_of(module))


def _pool_refuses(module: nn.Module) -> str:
    return "" if module.return_indices else NOTHING


def _pool(module: nn.Module, original: Callable, input: Tensor):
    options = (module.kernel_size, module.stride, module.padding, module.dilation)
    return ops.max_pool2d(input, *options, ceil_mode=module.ceil_mode, return_indices=True, index_format="int64")


def _unpool(module: nn.Module, original: Callable, input: Tensor, indices, output_size=None) -> Tensor:
    return ops.max_unpool2d(input, indices, module.kernel_size, module.stride, module.padding, output_size)


def nothing_taken(module: nn.Module) -> tuple[nn.Module, ...]:
    return ()


RULES = (
    Rule(
        "sequential",
        "torch",
        ("Sequential",),
        _refuses,
        _run,
        _takes,
        "convolution, norm and activation as one",
        fuses_only=True,
    ),
    Rule("max_pool", "torch", ("MaxPool2d",), _pool_refuses, _pool, nothing_taken, "pooling with indices"),
    Rule("max_unpool", "torch", ("MaxUnpool2d",), lambda m: "", _unpool, nothing_taken, "unpooling, deterministic"),
)
