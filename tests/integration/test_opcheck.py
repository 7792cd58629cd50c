"""opcheck of every registered op, on the arguments that it is called with in every layout and mix of dtypes.

Runs in two processes: with the interpreter the ops hold the kernels, without it their plain implementations.
"""

import importlib
import pkgutil
from contextlib import ExitStack

import pytest
import torch
from op_calls import LAYOUTS, ROWS, Draw
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fastseg.ops
from fastseg.ops.core import dispatch as _dispatch
from fastseg.ops.core.dispatch import HAS_TRITON, INTERPRETED
from fastseg.ops.core.register import DECOMPOSITIONS

pytestmark = [
    pytest.mark.filterwarnings("ignore:max_unpool"),
    pytest.mark.skipif(not HAS_TRITON, reason="the public functions ask what kernels take, and the cost models"),
]


class Recorder(TorchDispatchMode):
    """The calls of registered ops, forward and backward, while it is on."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "fastseg":
            assert not kwargs
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _every_op_is_reached(monkeypatch):
    """On a CPU tensor in any layout, whatever the cost models say of maps so small."""
    monkeypatch.setattr(_dispatch, "_no_kernel", lambda x: "")
    forms = [
        ("atrous_branches", "kernel"), ("batch_norm_act_max_pool2d", "kernel"), ("max_unpool_conv2d", "fold"),
        ("upsample_concat_conv2d", "taps"),
    ]  # fmt: skip
    with ExitStack() as stack:
        for op, form in forms:
            stack.enter_context(fastseg.force(op, form))
        if INTERPRETED:
            from fastseg.kernels.runtime.config import override

            stack.enter_context(override("upsample_conv_fwd", ROWS=8))
        yield


def recorded(name: str, layout: str, device: str) -> list[tuple[torch._ops.OpOverload, tuple]]:
    """The registered calls of a row; tensors are leaves, and require grad where the op has a gradient for them."""
    row = ROWS[name]
    draw = Draw(LAYOUTS[layout], row.grad, device=device)
    run, tensors = row.draw(draw)
    # A bare call on a CPU goes straight to torch's op; one that is explained takes the registered op.
    with Recorder() as recorder, fastseg.explain(), torch.set_grad_enabled(row.grad):
        with draw.autocast():
            y = run(*tensors)
        if row.grad:
            y.backward(draw.gradient(y))
    return [(op, _leaves(op, args, row.grad)) for op, args in recorder.calls]


def _leaves(op: torch._ops.OpOverload, args: tuple, grad: bool) -> tuple:
    has_formula = grad and op.has_kernel_for_dispatch_key(torch._C.DispatchKey.Autograd)
    made = []
    for argument, value in zip(op._schema.arguments, args, strict=False):
        wanted = lambda t, n=argument.name: has_formula and t.is_floating_point() and (t.requires_grad or n == "dy")
        made.append(tree_map_only(Tensor, lambda t, w=wanted: t.detach().requires_grad_(w(t)), value))
    return tuple(made)


def described(op: torch._ops.OpOverload, args: tuple) -> tuple:
    """What a check depends on: calls that agree in it are one."""
    known = lambda t: (t.shape, t.stride(), t.dtype, t.device, t.requires_grad)
    return op, *(known(value) if isinstance(value, Tensor) else value for value in tree_leaves(args))


# Interpreted, one cut map and one half type stand for two of each: the plain process has them all.
TWINS = {"every other pixel", "bfloat16"} if INTERPRETED else set()
CASES = [
    pytest.param(name, layout, marks=[pytest.mark.long] if layout in TWINS and set(row.layouts) - TWINS else [])
    for name, row in ROWS.items()
    for layout in row.layouts
]
UNTRACED = ("test_schema", "test_autograd_registration", "test_faketensor")
_passed: set[tuple] = set()  # calls, as described
_traced: set[torch._ops.OpOverload] = set()


def utils_for(op: torch._ops.OpOverload, layout: str, every: bool) -> str | tuple[str, ...]:
    """Traced, an op runs ten times: interpreted, once an op; without kernels, in a layout of each kind.

    Of any size, that is: of one size, the easier half, in one layout and with --long.
    """
    if every and not INTERPRETED and layout == "channels_last":
        return "ALL"
    if not INTERPRETED and layout in ("channels_last", "slice of channels", "half beside float"):
        return *UNTRACED, "test_aot_dispatch_dynamic"
    if layout != "channels_last" or op in _traced:
        return UNTRACED
    _traced.add(op)
    return *UNTRACED, "test_aot_dispatch_dynamic"


@pytest.mark.parametrize("name, layout", CASES)
def test_opcheck(name, layout, pytestconfig):
    check(name, layout, "cpu", pytestconfig.getoption("--long"))


def check(name: str, layout: str, device: str, every: bool) -> None:
    calls = recorded(name, layout, device)
    assert {op.name() for op, _ in calls} == {f"fastseg::{op}" for op in ROWS[name].reaches.split()}
    for op, args in calls:
        call = described(op, args)
        if call not in _passed:
            torch.library.opcheck(op, args, test_utils=utils_for(op, layout, every))
            _passed.add(call)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name, layout", [case for case in CASES if case.values[1] in ("channels_last", "half beside float")]
)
def test_opcheck_on_a_gpu(name, layout):
    check(name, layout, "cuda", True)


def test_every_registered_op_has_samples():
    for module in pkgutil.walk_packages(fastseg.ops.__path__, "fastseg.ops."):
        importlib.import_module(module.name)
    reached = {op for row in ROWS.values() for op in row.reaches.split()}
    assert reached == {op.name().removeprefix("fastseg::") for op in DECOMPOSITIONS}
