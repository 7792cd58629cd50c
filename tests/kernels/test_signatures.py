"""Kernels that could become TensorRT plugins: inputs, integer scalars, outputs, then constants; no float scalars."""

import inspect
import re

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastseg.kernels.runtime.launch import intercept
from fastseg.kernels.runtime.sizes import bits_of
from fastseg.kernels.tools.cases import CASES

PLUGINS = {
    "_upsample_argmax_fwd_kernel",
    "_max_unpool_fwd_kernel",
    "_max_unpool_fwd_foreign_kernel",
    "_batch_norm_act_fwd_kernel",
    "_separable_conv_fwd_fused_kernel",
    "_separable_conv_fwd_dw_kernel",
    "_separable_conv_fwd_pw_kernel",
}


@pytest.fixture(scope="module")
def launches():
    """(kernel, positional arguments, keywords) of every launch of these kernels by an ahead-of-time case."""
    found = {}

    def note(kernel, grid, args, kwargs):
        if kernel.fn.__name__ in PLUGINS:
            found.setdefault(kernel.fn.__name__, []).append((kernel.fn, args, kwargs))

    with intercept(note):
        for case in CASES.values():
            case(torch.float32)
    return found


def fault_of(fn, args, kwargs) -> str:
    """What is wrong with the order or the kinds of a launch's arguments, or ""."""
    kinds = "".join("t" if isinstance(a, Tensor) else "i" if type(a) is int else "?" for a in args)
    if not re.fullmatch("t+i+t+", kinds):
        return f"arguments are {kinds}, not inputs, integers, outputs"
    names = list(inspect.signature(fn).parameters)
    inputs, outputs = names[: kinds.index("i")], names[kinds.rindex("i") + 1 : len(args)]
    stored = set(re.findall(r"tl\.store\(\s*(\w+_ptr)", inspect.getsource(fn)))
    if stored & set(inputs):
        return f"{stored & set(inputs)} are stored to, and stand among the inputs"
    if not any(name.endswith("_ptr") for name in outputs):
        return "no output"
    constants = {name for name, p in inspect.signature(fn).parameters.items() if "constexpr" in str(p.annotation)}
    others = set(kwargs) & set(names) - constants
    return f"{others} are no constants" if others else ""


@pytest.mark.parametrize("kernel", sorted(PLUGINS))
def test_arguments(launches, kernel):
    assert {fault_of(*launch) for launch in launches[kernel]} == {""}


def test_a_fault_is_noticed():
    t = torch.empty(0)

    def kernel(x_ptr, n, y_ptr, EPS: "tl.constexpr"):  # noqa: F821
        tl.store(x_ptr, 0)  # noqa: F821

    assert fault_of(kernel, (t, t, 3), {}) == "arguments are tti, not inputs, integers, outputs"
    assert fault_of(kernel, (t, 1e-5, t), {}) == "arguments are t?t, not inputs, integers, outputs"
    assert fault_of(kernel, (t, 3, t), {"EPS": 1e-5}) == "{'x_ptr'} are stored to, and stand among the inputs"


def test_bits():
    for value in (0.0, 1.0, 0.125, 63 / 511, 1e-30, 3e38, 1e-5):
        assert torch.tensor(bits_of(value), dtype=torch.int64).view(torch.float64).item() == value
