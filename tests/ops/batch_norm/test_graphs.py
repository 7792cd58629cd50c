"""Batch norm + residual + activation among torch's tools: compile, export, autocast.

Runs in two processes, as the other files here: with the interpreter captured graphs hold the registered ops.
"""

import copy
import io

import pytest
import torch
from rows import shared
from torch import Tensor, nn

from fastseg.models.encoders.resnet import BasicBlock
from fastseg.nn import BatchNormAct2d
from fastseg.ops import BatchNormArgs, batch_norm_act
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.core.register import DECOMPOSITIONS
from fastseg.ops.registered.batch_norm_act import bwd_input_op, bwd_reduce_op, fwd_op, stats_op

CL, NCHW = torch.channels_last, torch.contiguous_format
ACTS = ("none", "relu", "relu6", "leaky_relu")


class Net(nn.Module):
    """The end of a residual block, and a norm without activation."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = BatchNormAct2d(4, act="leaky_relu")
        self.last = BatchNormAct2d(4, act=None, momentum=0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.last(self.norm(y, residual=y * 2))


def image(N=2, H=7, W=6, layout=CL) -> Tensor:
    return torch.randn(N, 3, H, W).contiguous(memory_format=layout)


def ops_in(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target).split(".")[1] for node in graph.nodes if "fastseg" in str(node.target)]


def assert_same_step(run, net: nn.Module, x: Tensor) -> None:
    """One step of ``run`` and of ``net`` from the same state: result, gradients, buffers."""
    state, found = copy.deepcopy(net.state_dict()), []
    for forward in (run, net):
        net.load_state_dict(state)
        net.zero_grad()
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        tensors = {"y": y.detach(), "dx": leaf.grad} | {n: p.grad.clone() for n, p in net.named_parameters()}
        found.append(tensors | {n: b.clone() for n, b in net.named_buffers()})
    for name, got in found[0].items():
        torch.testing.assert_close(got, found[1][name], atol=1e-5, rtol=1e-5, msg=lambda t, name=name: f"{name}: {t}")


def views() -> list[Tensor]:
    x = torch.randn(2, 5, 4, 3)
    wide = torch.randn(2, 8, 4, 3).contiguous(memory_format=CL)
    return [x, x.contiguous(memory_format=CL), wide[:, :5], x.bfloat16()]


def vectors(grad: bool = False) -> tuple[Tensor, ...]:
    mean, var, weight, bias = (torch.rand(5) + 0.5 for _ in range(4))
    return mean, var, weight.requires_grad_(grad), bias.requires_grad_(grad)


def test_plain_implementations_equal_the_ops():
    """The plain forms serve exported programs and groups of processes: each against what this process runs."""
    for x, act in zip(views(), ACTS, strict=True):
        close = {"rtol": 2e-2, "atol": 2e-2} if x.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        r, dy, sums = torch.randn_like(x), torch.randn_like(x), torch.randn(2, 5)
        for affine in (vectors(), (*vectors()[:2], None, None)):
            y = fwd_op(x, *affine, r, True, 1e-5, act)
            calls = [(fwd_op, (x, *affine, residual, True, 1e-5, act)) for residual in (None, r)]
            calls += [(bwd_reduce_op, (dy, x, *affine, None, 1e-5, act, True))]
            calls += [(bwd_reduce_op, (dy, x, *affine, y, 1e-5, act, False))]
            calls += [(bwd_input_op, (dy, x, *affine, sums, means, 1e-5, act)) for means in (True, False)]
            for op, args in [*calls, (stats_op, (x,))]:
                got, want = DECOMPOSITIONS[op.op](*args), op(*args)
                for g, w in zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]:
                    torch.testing.assert_close(g, w, **close)
                    assert g.stride() == w.stride() or g.numel() == 0, op


@pytest.mark.parametrize("training, dynamic", [(True, True), (False, False)])
def test_compiled(training, dynamic):
    net = Net().train(training)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape, layout in (((2, 7, 6), CL), ((3, 8, 9), NCHW))[: 1 + dynamic]:
        assert_same_step(compiled, net, image(*shape, layout))


def test_graphs_hold_the_ops_exactly_where_kernels_run():
    graphs: list[torch.fx.Graph] = []

    def keep(module: torch.fx.GraphModule, _):
        graphs.append(module.graph)
        return module.forward

    torch.compile(Net(), fullgraph=True, backend=keep)(image())
    assert ops_in(graphs[0]) == ["batch_norm_stats", "batch_norm_act"] * 2 * INTERPRETED


def test_compiled_block_of_a_model():
    net = BasicBlock(3, 8, 2, 1, True).to(memory_format=CL)
    assert_same_step(torch.compile(net, fullgraph=True, backend="aot_eager"), net, image(2, 9, 8))


@pytest.mark.parametrize("strict", shared([True, False], interpreted=[True], plain=[False]))
def test_export(strict):
    net, x, buffer = Net().eval(), image(), io.BytesIO()
    sizes = {"x": {0: torch.export.Dim("N"), 2: torch.export.Dim("H", min=4), 3: torch.export.Dim("W", min=4)}}
    program = torch.export.export(net, (x,), strict=strict, dynamic_shapes=sizes)
    assert ops_in(program.graph) == ["batch_norm_act"] * 2 * INTERPRETED
    torch.export.save(program, buffer)
    buffer.seek(0)
    other = image(3, 11, 8)
    torch.testing.assert_close(torch.export.load(buffer).module()(other), net(other), atol=1e-5, rtol=1e-5)
    plain = program.run_decompositions(DECOMPOSITIONS)
    assert not ops_in(plain.graph)
    torch.testing.assert_close(plain.module()(other), net(other), atol=1e-5, rtol=1e-5)


def test_symbolic_trace():
    net, x = Net().eval(), image()
    traced = torch.fx.symbolic_trace(net)
    called = [net.get_submodule(str(node.target)) for node in traced.graph.nodes if node.op == "call_module"]
    assert sum(isinstance(module, BatchNormAct2d) for module in called) == 2
    torch.testing.assert_close(traced(x), net(x))


def test_autocast_follows_the_input():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 4, 4, 4, dtype=dtype).contiguous(memory_format=CL)
        with torch.autocast("cpu", torch.bfloat16):
            assert batch_norm_act(x, BatchNormArgs(torch.zeros(4), torch.ones(4)), "relu", x).dtype == dtype
            assert BatchNormAct2d(4)(x).dtype == dtype


def test_checkpointing_and_inference_mode():
    net, x = Net().eval(), image()  # a forward that runs twice would update the running statistics twice
    assert_same_step(lambda x: torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False), net, x)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), net(x.clone()))
