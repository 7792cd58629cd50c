"""Kernels in an exported graph, traced on stand-ins for CUDA tensors: no GPU is asked for anything."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastseg.ops import max_pool2d, separable_conv2d, upsample_bilinear
from fastseg.ops.core.dispatch import HAS_TRITON, INTERPRETED
from fastseg.ops.core.kernels_in_graph import with_kernels

pytestmark = pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="the interpreter's functions are no kernels")


class Pool(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return max_pool2d(x, 3, 2, 1, return_indices=True)


class Decoder(nn.Module):
    def forward(self, x: Tensor, taps: Tensor, pointwise: Tensor) -> Tensor:
        return upsample_bilinear(separable_conv2d(x, taps, pointwise), (24, 32))


def test_two_kernels_in_a_row(monkeypatch):
    """What one kernel writes the next reads; neither is left as an op that would need Python."""
    from fastseg.kernels.runtime import config

    monkeypatch.setattr(config, "table_names", lambda index: ())
    with FakeTensorMode():
        new = lambda *shape: torch.empty(shape, device="cuda", memory_format=torch.channels_last)
        tensors = new(2, 8, 12, 16), new(8, 1, 3, 3), new(16, 8, 1, 1)
    with torch.no_grad():
        program = torch.export.export(Decoder(), tensors, strict=False)
        assert all(f"fastseg.{name}" in str(program.graph) for name in ("separable_conv2d", "upsample_bilinear"))
        opened = with_kernels(program)
    targets = [str(node.target) for node in opened.graph.nodes if node.op == "call_function"]
    assert sum("triton_kernel_wrapper_functional" in target for target in targets) == 2
    assert not any("fastseg" in target for target in targets)


def test_a_package_holds_the_kernel(monkeypatch):
    """One launch, of the sizes of the example, and nothing of fastseg's that would need Python."""
    from fastseg.kernels.runtime import config

    monkeypatch.setattr(config, "table_names", lambda index: ())  # they ask the GPU for its name
    with FakeTensorMode():
        x = torch.empty(2, 8, 12, 16, device="cuda", memory_format=torch.channels_last)
    program = torch.export.export(Pool(), (x,), strict=False)
    assert "fastseg.max_pool" in str(program.graph)
    opened = with_kernels(program)
    targets = [str(node.target) for node in opened.graph.nodes if node.op == "call_function"]
    assert sum("triton_kernel_wrapper_functional" in target for target in targets) == 1
    assert not any("fastseg" in target for target in targets)
    # Without a GPU's driver torch cannot read what a launch writes, and takes x as written, too: one result more.
    values, index = opened.graph.output_node().args[0][-2:]
    assert [tuple(node.meta["val"].shape) for node in (values, index)] == [(2, 8, 6, 8)] * 2
    assert index.meta["val"].dtype == torch.int64
