"""Atrous convolutions among torch's tools: compile, export, the switch.

Runs in two processes. With the interpreter captured graphs hold the registered ops, and these the kernels; without it a
CPU tensor takes the reference, in captured graphs too.
"""

import pytest
import torch
from torch import Tensor, nn

import fastseg
from fastseg.ops import atrous_conv2d
from fastseg.ops.atrous_conv2d import atrous_branches
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.core.register import DECOMPOSITIONS
from fastseg.ops.registered.atrous_conv import fwd_op
from fastseg.testing import check_op

CL, NCHW = torch.channels_last, torch.contiguous_format


class Net(nn.Module):
    """Two branches, and one convolution with a residual behind them."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=2, dilation=2)])
        self.last = nn.Conv2d(8, 8, 3, padding=3, dilation=3)

    def forward(self, x: Tensor) -> Tensor:
        weights, biases = [m.weight for m in self.branches], [m.bias for m in self.branches]
        x = atrous_branches(x, weights, biases, [1, 2], "relu")
        return atrous_conv2d(x, self.last.weight, self.last.bias, 3, act="leaky_relu", residual=x)


def image(N=1, H=3, W=2, layout=CL) -> Tensor:
    return torch.randn(N, 3, H, W).contiguous(memory_format=layout)


def ops_in(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "fastseg" in str(node.target)]


HELD = ["fastseg.atrous_branches.default"] * 2 * INTERPRETED


class Capture:
    """A torch.compile backend: runs the graph as it is and keeps it."""

    def __init__(self):
        self.graphs: list[torch.fx.Graph] = []

    def __call__(self, module: torch.fx.GraphModule, _):
        self.graphs.append(module.graph)
        return module.forward


def step(run, net: nn.Module, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in net.parameters())]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=2e-5, rtol=2e-5)


def arguments(layout=NCHW, residual=False) -> tuple:
    x = torch.randn(2, 3, 2, 3).to(memory_format=layout)
    weights = [torch.randn(4, 3, K, K).requires_grad_() for K in (1, 3)]
    biases = [torch.randn(4).requires_grad_() for _ in weights]
    y = torch.randn(2, 8, 2, 3).to(memory_format=layout)
    return x.requires_grad_(), weights, biases, y if residual else None, [1, 2]


@pytest.mark.parametrize("residual", [False, True])
def test_the_registered_op_has_the_gradients_of_torch(residual):
    """Without the interpreter the plain formulas run: nothing else compares them with autograd's."""
    x, weights, biases, residual, dilations = arguments(CL, residual=residual)
    run = lambda x, a, b, c, d, r: fwd_op(x, [a, b], [c, d], r, dilations, "relu6")
    ref = lambda *args: fastseg.reference()(
        lambda x, a, b, c, d, r: atrous_branches(x, [a, b], [c, d], [1, 2], "relu6", r)
    )(*args)
    check_op(run, ref, [x, *weights, *biases, residual], terms=60)


def test_compiled_training():
    eager, net = Net(), Net()
    net.load_state_dict(eager.state_dict())
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape, layout in (((2, 3, 2), CL), ((3, 2, 4), NCHW)):
        x = image(*shape, layout)
        assert_same(step(compiled, net, x), step(eager, eager, x))


def test_compiled_inference_holds_the_op_and_follows_the_switch():
    net, capture, x = Net().eval(), Capture(), image()
    compiled = torch.compile(net, fullgraph=True, backend=capture)
    with torch.no_grad():
        before = compiled(x)
        with fastseg.reference():
            inside = compiled(x)
        want = net(x)
    assert [ops_in(graph) for graph in capture.graphs][:2] == (
        [HELD, []] if INTERPRETED else [[]] * len(capture.graphs)
    )
    for got in (before, inside):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert before.stride() == want.stride()


def test_export_and_decomposition():
    net, x = Net().eval(), image()
    program = torch.export.export(net, (x,))
    assert ops_in(program.graph) == HELD
    plain = program.run_decompositions(DECOMPOSITIONS)
    assert not ops_in(plain.graph)
    for run in (program.module(), plain.module()):
        torch.testing.assert_close(run(x), net(x), atol=1e-5, rtol=1e-5)
