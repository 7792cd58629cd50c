"""ASPP and its functional form in captured graphs: forward, gradients and statistics as without the compiler."""

import copy

import pytest
import torch
from nets import unsettle
from rows import shared
from torch import Tensor, nn

from fastseg.nn import ASPP
from fastseg.ops import aspp

FORMS = {"concat": {}, "sum": {"fusion": "sum", "bias": True}}


def step(run, net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **grads, **{name: b.clone() for name, b in net.named_buffers()}}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, t in got.items():
        torch.testing.assert_close(t, want[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("form", shared(FORMS, interpreted=["concat"], plain=["sum"]))
def test_compiled_whole(form):
    """Training without a graph break, then evaluation, at sizes that the graph does not know."""
    net = unsettle(ASPP(8, 8, (1, 3), **FORMS[form])).float()
    twin = copy.deepcopy(net)
    run = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for sides in ((5, 4), (6, 7)):
        x = torch.randn(2, 8, *sides).to(memory_format=torch.channels_last)
        assert_same(step(run, net, x), step(twin, twin, x))
    net.eval(), twin.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(x), twin(x))


def test_exported():
    net = unsettle(ASPP(8, 8, (1, 3))).float().eval()
    x = torch.randn(2, 8, 5, 4)
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x[:1].repeat(3, 1, 1, 1)), net(x[:1].repeat(3, 1, 1, 1)))


def test_functional_compiles():
    x = torch.randn(2, 8, 5, 4)
    weights = [torch.randn(4, 8, 1, 1), torch.randn(4, 8, 3, 3)]
    call = lambda x: aspp(
        x, weights, (1, 2), project_weight=torch.ones(3, 12, 1, 1), pool_weight=torch.ones(4, 8, 1, 1)
    )
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))
