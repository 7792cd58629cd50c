"""U-Net and UNet++ among torch's tools: one graph under torch.compile, export to other sizes, autocast."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from fastseg.models import create
from fastseg.ops.core.dispatch import INTERPRETED

# tests/ops/*/test_graphs*.py capture the kernels one by one, and tests/models runs them in the whole net.
pytestmark = pytest.mark.skipif(INTERPRETED, reason="a graph of the whole net is the same without the interpreter")
NETS = {
    "unet": ("unet", {"widths": (4, 8)}),
    "unet++": ("unetplusplus", {"norm": True, "up": "bilinear", "widths": (4, 8, 8), "deep_supervision": True}),
}


@pytest.fixture(params=NETS)
def model(request) -> nn.Module:
    torch._dynamo.reset()
    name, options = NETS[request.param]
    return create(name, 3, **options).eval()


def test_compile_in_one_graph(model):
    x, target = torch.randn(1, 3, 44, 44), torch.randint(3, (1, 44, 44))
    graph = lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(graph(model)(x), model(x), rtol=1e-4, atol=1e-5)
    model.train()
    learnt = list(model.parameters())
    want = torch.autograd.grad(model.loss(x, target), learnt)
    for got, grad in zip(torch.autograd.grad(graph(model.loss)(x, target), learnt), want, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()) + 1e-6)


def test_export(model):
    """The program takes other sizes than the traced one, and holds our registered ops or torch's, no cuDNN call."""
    sides = {0: Dim("n", max=8), 2: 4 * Dim("h", min=11, max=40), 3: 4 * Dim("w", min=11, max=40)}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 48),), dynamic_shapes=(sides,))
    assert not any("cudnn" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_autocast(model):
    x, target = torch.randn(1, 3, 44, 48), torch.randint(3, (1, 44, 48))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            logits = model(x)
        model.train().loss(x, target).backward()
    assert logits.dtype == torch.bfloat16
    with torch.no_grad():
        want = model.eval()(x)
    assert all(p.grad is not None for p in model.parameters())
    assert want.dtype == torch.float32 and logits.shape == want.shape
