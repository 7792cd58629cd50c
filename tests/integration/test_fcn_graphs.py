"""FCN among torch's tools: one graph under torch.compile, export, autocast; kernels where the interpreter is on."""

import pytest
import torch
from torch.export import Dim

from fastseg.models import FCN
from fastseg.ops.core.dispatch import INTERPRETED


@pytest.fixture
def model() -> FCN:
    torch._dynamo.reset()
    return FCN(3, "resnet18", 4, width=0.02).eval()


@pytest.mark.skipif(INTERPRETED, reason="a graph of the whole net is the same without the interpreter")
def test_compile_in_one_graph(model):
    x, target = torch.randn(1, 3, 33, 32), torch.randint(3, (1, 33, 32))
    compiled = lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(model.predict)(x), model.predict(x))
    model.loss(x, target).backward()
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    want = {key: p.grad.clone() for key, p in parameters.items()}
    model.zero_grad()
    compiled(model.loss)(x, target).backward()
    for key, p in parameters.items():
        torch.testing.assert_close(p.grad, want[key], rtol=1e-4, atol=1e-5 * float(want[key].abs().max()) + 1e-7)


@pytest.mark.skipif(not INTERPRETED, reason="without kernels: test_every_model.py")
def test_export(model):
    """Other sizes than the traced one; the graph holds the transposed convolution as one op, not as a dense one."""
    sides = {0: Dim("n", max=8), 2: 32 * Dim("h", min=2, max=16), 3: 32 * Dim("w", min=2, max=16)}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(sides,))
    names = [str(node.target) for node in program.graph.nodes]
    assert any("bilinear" in name for name in names)
    x = torch.randn(3, 3, 96, 128)
    with torch.no_grad():  # where norms are folded, and in the graph are not
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_autocast(model):
    x, target = torch.randn(2, 3, 32, 64), torch.randint(3, (2, 32, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, classes, loss = model(x), model.predict(x), model.loss(x, target)
    assert (scores.dtype, classes.dtype) == (torch.bfloat16, torch.uint8)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(model(x), target), rtol=0.05, atol=0.05)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
