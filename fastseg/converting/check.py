"""Run each converted block on its real inputs, old against new, forward and gradient.

In float64, on copies of the block: in evaluation without and with gradients, and in training, outputs, gradients at
inputs and parameters, and buffers must agree to ``FLOAT64``, relative to the largest value (a gradient also passes
below 1e-12 of the largest gradient, as that of a bias in front of a batch norm, which is zero but for rounding).
Dropout is off in the copies. In the model's own dtype the output must keep its dtype and shape and agree to ``OWN``.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastseg.converting.classes import fused_everywhere
from fastseg.measure.counting import products_and_bytes
from fastseg.nn.modes import evaluating
from fastseg.ops.core.torch_private import tree_leaves, tree_map_only

FLOAT64 = 1e-9
OWN = {torch.float64: 1e-9, torch.float32: 5e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
MOST_BYTES = 1.25  # times those of the original, where products do not fall: what folding a norm into small maps takes
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Checked(NamedTuple):
    why: str  # why the block must be put back, or ""
    products: tuple[int, int] | None = None
    bytes: tuple[int, int] | None = None
    error: float | None = None


class _Wrong(Exception):
    pass


def check(model: nn.Module, example: Any, placed: Sequence[nn.Module]) -> dict[int, Checked]:
    """Check the converted blocks ``placed``, by id; a block that the model did not call on the example is absent.

    Raises:
        Exception: what the model itself raises on the example.
    """
    found: dict[int, Checked] = {}
    busy: list[nn.Module] = []

    def call(module: nn.Module, args: tuple, kwargs: dict):
        own = module.fastseg_original.forward
        if busy or id(module) in found:
            return own(module, *args, **kwargs)
        busy.append(module)
        try:
            found[id(module)] = _checked(module, args, kwargs)
        finally:
            busy.clear()
        return own(module, *args, **kwargs)

    classes: dict[type, type] = {}
    for module in placed:
        made = type(module)
        if made not in classes:
            members = {"forward": lambda self, *args, **kwargs: call(self, args, kwargs), "__module__": made.__module__}
            classes[made] = type(made)(made.__name__, (made,), members)
    try:
        for module in placed:
            module.__class__ = classes[type(module)]
        with evaluating(model), torch.no_grad(), seeded(), fused_everywhere(), _uncompiled():
            run_example(model, example)
    finally:
        back = {check: made for made, check in classes.items()}
        for module in placed:
            module.__class__ = back[type(module)]
    return found


def run_example(model: nn.Module, example: Any):
    """``model`` on a tensor, a tuple of arguments, or a dict of named ones."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


@contextmanager
def seeded() -> Iterator[None]:
    """Inside the block, random numbers are those of seed 0; outside they go on as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Inside the block, compiled parts run as they are written: a compiler would capture the check as well."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _checked(module: nn.Module, args: tuple, kwargs: dict) -> Checked:
    old = module.fastseg_original.forward
    forward = type(module).__mro__[1].forward  # of the converted class, under the one that checks
    inputs = (args, kwargs)
    want: list = []
    try:
        p0, b0 = products_and_bytes(lambda: want.append(old(module, *_copied(args), **_copied(kwargs))))
    except Exception:
        return Checked("")  # the model's own error, which follows
    try:
        got: list = []
        run = lambda: got.append(forward(module, *_copied(args), **_copied(kwargs)))
        p1, b1 = products_and_bytes(run)
        _same_kind(got[0], want[0])
        _compare("the output", _floats(got), _floats(want), lambda t: OWN.get(t.dtype, 0.0))
        worst = _in_float64(module, old, forward, inputs)
    except _Wrong as wrong:
        return Checked(str(wrong))
    except Exception as error:
        return Checked(f"the rule fails where the original does not: {type(error).__name__}: {error}")
    counts = (p0, p1), (b0, b1)
    if p1 > p0 or (b1 > MOST_BYTES * b0 and p1 > 0.98 * p0):
        moved = f"{p0 * 1e-6:.4g} -> {p1 * 1e-6:.4g} Mproducts, {b0 * 1e-6:.4g} -> {b1 * 1e-6:.4g} MB"
        return Checked(f"it does not pay on the example: {moved}", *counts, worst)
    return Checked("", *counts, worst)


def _in_float64(module: nn.Module, old: Callable, new: Callable, inputs: tuple) -> float:
    """The largest error of three runs on copies in float64; 0 on a device without it."""
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    if any(t.device.type == "mps" for t in tensors):
        return 0.0
    worst = 0.0
    for training, grad in ((False, False), (False, True), (True, True)):
        runs = []
        for forward in (old, new):
            try:
                runs.append(_run(_twin(module, training), forward, inputs, grad))
            except Exception:
                if forward is new:
                    raise
                break  # such as a batch norm in training with one value a channel
        if len(runs) < 2:
            continue
        where = "in training" if training else "with gradients" if grad else "in evaluation"
        for label, want, got in zip(("the output", "a gradient", "a buffer"), *runs, strict=True):
            worst = max(worst, _compare(f"{label} {where}", got, want, lambda t: FLOAT64))
    return worst


def _twin(module: nn.Module, training: bool) -> nn.Module:
    twin = copy.deepcopy(module).double()
    for part, original in zip(twin.modules(), module.modules(), strict=True):
        part.training = training
        if isinstance(part, DROPOUTS):
            part.p = 0.0
        if isinstance(getattr(original, "drop_prob", None), float):  # stochastic depth, as timm and others write it
            part.drop_prob = 0.0
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    return twin


def _run(twin: nn.Module, forward: Callable, inputs: tuple, grad: bool) -> tuple[list, list, list]:
    """Outputs, gradients and buffers of one run."""
    args, kwargs = _copied(inputs, lambda t: t.double() if t.is_floating_point() else t)
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
    device = leaves[0].device.type if leaves else "cpu"
    with torch.set_grad_enabled(grad), torch.autocast(device, enabled=False), seeded():
        if grad:
            leaves = [t.requires_grad_(True) for t in leaves]
            args, kwargs = tree_map_only(Tensor, lambda t: t.view_as(t), (args, kwargs))  # may be written in place
        outputs = _floats(forward(twin, *args, **kwargs))
        grads: list = []
        if grad:
            wanted = [*leaves, *twin.parameters()]
            outputs_with = [t for t in outputs if t.requires_grad]
            if outputs_with:
                weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).cos().view(t.shape)
                           for t in outputs_with]  # fmt: skip
                grads = list(torch.autograd.grad(outputs_with, wanted, weights, allow_unused=True))
    return [t.detach() for t in outputs], grads, _floats(list(twin.buffers()))


def _copied(inputs: Any, change: Callable[[Tensor], Tensor] = lambda t: t) -> Any:
    return tree_map_only(Tensor, lambda t: change(t.detach()).clone(), inputs)


def _floats(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]


def _same_kind(got: Any, want: Any) -> None:
    shapes = lambda value: [(t.shape, t.dtype) for t in tree_leaves(value) if isinstance(t, Tensor)]
    if type(got) is not type(want) or shapes(got) != shapes(want):
        raise _Wrong(f"the output is another: {shapes(got)}, the original's is {shapes(want)}")


def _compare(label: str, got: Sequence, want: Sequence, tolerance: Callable[[Tensor], float]) -> float:
    """Raise ``_Wrong`` if one of the tensors differs by more than rounding; return the largest relative error."""
    if len(got) != len(want) or any((a is None) != (b is None) for a, b in zip(got, want, strict=True)):
        raise _Wrong(f"{label} is there in one and not in the other")
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if b is not None and b.numel()]
    peaks = [float(b.abs().amax()) for _, b in pairs]
    overall, worst = max(peaks, default=0.0), 0.0
    for (a, b), peak in zip(pairs, peaks, strict=True):
        if not peak < float("inf"):
            raise _Wrong(f"{label} of the original is not finite on the example: nothing can be said")
        error = float((a.double() - b.double()).abs().amax())
        if not (error <= tolerance(b) * peak or error <= 1e-12 * overall or error == 0):
            raise _Wrong(f"{label} differs by {error:.2g} of {peak:.2g}, more than rounding ({tolerance(b):.0e})")
        worst = max(worst, min(error / peak if peak else 0.0, error / overall if overall else 0.0))
    return worst
