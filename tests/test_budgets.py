"""What a call costs the host, in calls of Python functions: a number that no load of the machine changes."""

import subprocess
import sys

import pytest
import torch

from benchmarks.studies import host_cost
from fastseg.kernels.runtime.launch import intercept

# As counted, and a few to spare; each takes 0.2 to 0.4 us with what stands between them
# (`python -m benchmarks.studies.host_cost`).
MOST = {
    "SeparableConv2d": 80,
    "ConvNormAct2d": 75,  # its norm is folded in each call
    "ASPP": 455,  # its norms are folded, and the tables of its regions written, in each call
    "BatchNormAct2d": 46,
    "MaxPool2d, indices": 49,
    "UpsamplingBilinear2d": 49,
    "UpsampleArgmax": 90,
}


@pytest.mark.parametrize("name", MOST)
def test_calls_up_to_the_launch(name):
    ours, _ = host_cost.pairs()[name]
    x = host_cost.sample()
    with intercept(lambda *launch: None), torch.no_grad():
        assert host_cost.python_calls(lambda: ours(x)) <= MOST[name]


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
