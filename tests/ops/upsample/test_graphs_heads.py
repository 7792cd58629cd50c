"""The fused heads among torch's tools: compile, export, torch.func.

Runs in two processes. With the interpreter captured graphs hold the registered ops, and these the kernels; without it
a CPU tensor takes torch's two steps in captured graphs, and rows of them in eager mode.
"""

import pytest
import torch
from head_inputs import interpolate
from rows import shared, with_the_interpreter
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.nn.loss import UpsampleCrossEntropyLoss
from fastseg.nn.upsampling import UpsampleArgmax
from fastseg.ops import upsample_cross_entropy
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.core.register import DECOMPOSITIONS

CL, NCHW = torch.channels_last, torch.contiguous_format
argmax_op = torch.ops.fastseg.upsample_argmax.default
fwd_op = torch.ops.fastseg.upsample_cross_entropy.default
bwd_op = torch.ops.fastseg.upsample_cross_entropy_bwd.default


class Heads(nn.Module):
    """A classifier with both heads behind it."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Conv2d(2, 9, 1)
        self.argmax = UpsampleArgmax(align_corners=True)
        self.loss = UpsampleCrossEntropyLoss(torch.rand(9), ignore_index=255, label_smoothing=0.1, align_corners=True)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.classifier(x)
        return self.loss(logits, target), self.argmax(logits, target.shape[-2:])


def arguments(N=1, h=3, w=4, layout=CL) -> tuple[Tensor, Tensor]:
    target = torch.randint(9, (N, 4 * h, 4 * w), dtype=torch.uint8)
    target[:, 1:3] = 255
    return torch.randn(N, 2, h, w).contiguous(memory_format=layout), target


def step(run, net: nn.Module, x: Tensor, target: Tensor) -> list[Tensor]:
    net.zero_grad()
    x = x.clone().requires_grad_()
    loss, classes = run(x, target)
    loss.backward()
    return [loss.detach(), classes, x.grad, *(p.grad.clone() for p in net.parameters())]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-5)


def ops_in(graph: torch.fx.Graph) -> list[str]:
    return sorted(str(node.target) for node in graph.nodes if "fastseg" in str(node.target))


HELD = ["fastseg.upsample_argmax.default", "fastseg.upsample_cross_entropy.default"] * INTERPRETED


def sample(layout=NCHW, N=1) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(N, 9, 3, 2).to(memory_format=layout)
    return logits, torch.randint(9, (N, 6, 4)), torch.rand(9)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_plain_implementations_are_the_op(reduction):
    """Only programs exported elsewhere call them: against the two steps, and autograd through those."""
    logits, target, weight = sample(layout=CL)
    logits.requires_grad_()
    target[:, 1] = 3
    rest = (target, weight, 3, reduction, 0.1, True, False, True)
    loss, lse, total = DECOMPOSITIONS[fwd_op](logits.detach(), *rest)
    full = interpolate(logits, True, (6, 4))
    want = F.cross_entropy(full, target, weight, ignore_index=3, reduction=reduction, label_smoothing=0.1)
    torch.testing.assert_close(loss, want.detach())
    dy = torch.randn_like(want)
    got = DECOMPOSITIONS[bwd_op](dy, lse, total, logits.detach(), *rest)
    torch.testing.assert_close(got, torch.autograd.grad(want, logits, dy)[0])
    assert got.stride() == logits.stride()
    classes = DECOMPOSITIONS[argmax_op](logits.detach(), 6, 4, 0.0, 0.0, True, False)
    assert torch.equal(classes.long(), full.argmax(1))


@with_the_interpreter  # of torch's own ops: integration/test_compile_ops.py
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.long), True], ids=["static", "dynamic"])
def test_compile(dynamic):
    net = Heads()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((1, 3, 4), (2, 4, 3))[: 1 + dynamic]:
        args = arguments(*shape)
        assert_same(step(compiled, net, *args), step(net, net, *args))


def test_graphs_hold_the_ops_exactly_where_kernels_run():
    graphs = []

    def keep(module: torch.fx.GraphModule, _):
        graphs.append(module.graph)
        return module.forward

    torch.compile(Heads(), fullgraph=True, backend=keep)(*arguments())
    assert ops_in(graphs[0]) == HELD


@pytest.mark.parametrize("strict", shared([True, False], interpreted=[False], plain=[True]))
def test_export(strict):
    net, args = Heads(), arguments()
    program = torch.export.export(net, args, strict=strict)
    assert ops_in(program.graph) == HELD
    want = step(net, net, *args)
    assert_same(step(program.module(), net, *args), want)
    plain = program.run_decompositions(DECOMPOSITIONS)
    assert not ops_in(plain.graph)
    assert_same(plain.module()(*args), want[:2])


def test_exported_without_bounds():
    """Named sizes need no bound: what a kernel cannot take is found when the exported program runs."""
    h, w = (torch.export.Dim(name, min=2) for name in "hw")
    argmax = torch.export.export(
        UpsampleArgmax(scale_factor=4), (torch.randn(1, 9, 3, 4),), dynamic_shapes=({2: h, 3: w},)
    )
    loss = torch.export.export(
        UpsampleCrossEntropyLoss(), sample()[:2], dynamic_shapes=({2: h, 3: w}, {1: 2 * h, 2: 2 * w})
    )
    for size in ((3, 4), (7, 2)):
        logits, target = torch.randn(1, 9, *size), torch.randint(9, (1, 2 * size[0], 2 * size[1]))
        full = interpolate(logits, False, None, 4)
        assert torch.equal(argmax.module()(logits).long(), full.argmax(1))
        want = F.cross_entropy(interpolate(logits, False, target.shape[1:]), target)
        torch.testing.assert_close(loss.module()(logits, target), want)


def test_reference_under_torch_func():
    """Transforms see torch's own ops: where no kernel runs, per-sample gradients work."""
    if INTERPRETED:
        pytest.skip("the registered op has no rule for them")
    logits, target, _ = sample(N=3)
    loss = lambda x, t: upsample_cross_entropy(x[None], t[None])
    per_sample = torch.func.vmap(torch.func.grad(loss))(logits, target)
    for i in range(3):
        torch.testing.assert_close(per_sample[i], torch.func.grad(loss)(logits[i], target[i]))
