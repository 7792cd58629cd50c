"""What a call costs the host, in calls of Python functions: a number that no load of the machine changes."""

import ast
import subprocess
import sys

import pytest
import torch
from syntax import SOURCES

from benchmarks.studies import host_cost
from fastseg.kernels.runtime.launch import intercept

# As counted, and a few to spare; each takes 0.2 to 0.4 us with what stands between them
# (`python -m benchmarks.studies.host_cost`).
MOST = {
    "SeparableConv2d": 80,  # it asks if its taps are kept, folded and in the order of the kernel
    "ConvNormAct2d": 56,  # its norm is folded in each call
    "ASPP": 250,  # seven launches: the tables of its regions, two norms and two folds are its own in each call
    "BatchNormAct2d": 38,
    "MaxPool2d, indices": 37,
    "UpsamplingBilinear2d": 45,
    "UpsampleArgmax": 49,
}


@pytest.mark.parametrize("name", MOST)
def test_calls_up_to_the_launch(name):
    ours, _ = host_cost.pairs()[name]
    x = host_cost.sample()
    with intercept(lambda *launch: None), torch.no_grad():
        assert host_cost.python_calls(lambda: ours(x)) <= MOST[name]


def test_an_aspp_asks_few_times_who_looks_on():
    """Whether a compiler does, that is; ten of its functions once did, for one input."""
    aspp, _ = host_cost.pairs()["ASPP"]
    x = host_cost.sample()
    with intercept(lambda *launch: None), torch.no_grad():
        assert 0 < host_cost.python_calls(lambda: aspp(x), named="is_compiling") <= 8


def test_few_places_ask_for_a_compiler():
    """A list of forms asks once for its op; what is left asks for lists, records, sizes and gradients."""
    calls = [line for path in SOURCES for line in path.read_text().splitlines() if "compiler.is_compiling()" in line]
    assert 0 < len(calls) <= 8


def test_no_launcher_falls_back():
    """What launches has been chosen: it holds no second decision for plain PyTorch."""
    found, launchers = [], 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.lstrip("_").startswith(("launch", "kernel_")):
                launchers += 1
                names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
                found += [f"{path.name}: {node.name} uses {name}" for name in names if "plain" in name]
    assert launchers > 20 and not found


def test_every_module_is_counted():
    assert MOST.keys() == host_cost.pairs().keys()


def test_import_leaves_the_compiler_alone():
    """torch._dynamo takes over a second to import; only `torch.compile` needs it."""
    code = """if True:
        import sys, fastseg, fastseg.nn, fastseg.ops, fastseg.inference
        fastseg.models.create
        dear = {"torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "sympy"} & set(sys.modules)
        assert not dear, f"imported: {dear}"
    """
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)
