"""Bilinear upsampling and its transposed convolution among torch's tools: compile, export, decompositions."""

import pytest
import torch
from rows import shared, with_the_interpreter
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastseg
from fastseg.kernels.runtime.launch import intercept
from fastseg.nn import BilinearConvTranspose2d, UpsamplingBilinear2d
from fastseg.ops import bilinear_conv_transpose2d, upsample_bilinear, upsample_concat
from fastseg.ops.bilinear_conv_transpose import bilinear_conv_transpose2d_ref
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.core.register import DECOMPOSITIONS
from fastseg.ops.upsample_bilinear import upsample_bilinear_ref
from fastseg.ops.upsample_concat import upsample_concat_ref
from fastseg.testing import check_op

CL, NCHW = torch.channels_last, torch.contiguous_format
OPS = torch.ops.fastseg
HELD = {"upsample_bilinear", "bilinear_conv_transpose2d", "upsample_concat"}  # by captured graphs of Net


class Net(nn.Module):
    """FCN's way: coarse scores up by two, a cropped skip, up by four by interpolation."""

    def __init__(self):
        super().__init__()
        self.score = nn.Conv2d(3, 4, 1)
        self.up2 = BilinearConvTranspose2d(4, 2, 4, 0, bias=True)
        self.up4 = UpsamplingBilinear2d(scale_factor=2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        y = self.up4(self.up2(self.score(x), skip=skip, skip_offset=1))
        return upsample_concat(self.score(x), [y, y])


def inputs(H=2, W=3, layout=CL) -> tuple[Tensor, Tensor]:
    shapes = (2, 3, H, W), (2, 4, 2 * H + 4, 2 * W + 4)
    return tuple(torch.randn(s).contiguous(memory_format=layout) for s in shapes)


def step(run, net: nn.Module, x: Tensor, skip: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    x, skip = x.clone().requires_grad_(), skip.clone().requires_grad_()
    y = run(x, skip)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, "dskip": skip.grad, **grads}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, g in got.items():
        torch.testing.assert_close(g, want[name], atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def held(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target).split(".")[1] for node in graph.nodes if "fastseg" in str(node.target)}


@pytest.mark.parametrize("layout", [NCHW, CL], ids=["nchw", "nhwc"])
def test_registered_ops_against_autograd(layout):
    """Without the interpreter these are the plain implementations, and only this compares their backward."""
    x = torch.randn(2, 3, 3, 4).to(memory_format=layout).requires_grad_()
    for factor, size, corners in ((None, (5, 7), True), (1.7, (5, 6), False)):
        op = lambda x, f=factor, s=size, c=corners: OPS.upsample_bilinear.default(x, s, c, f, f)
        args = {"size": size} if factor is None else {"scale_factor": factor}
        check_op(op, lambda x, a=args, c=corners: upsample_bilinear_ref(x, align_corners=c, **a), [x], terms=9)
    other = torch.randn(2, 2, 5, 7, requires_grad=True)
    op = lambda x, a, b: OPS.upsample_concat.default(x, [a, b], False, True)
    check_op(op, lambda x, a, b: upsample_concat_ref(x, [a, b], up_first=True), [x, other, other], terms=9)
    skip = torch.randn(2, 3, 9, 10).to(memory_format=layout).requires_grad_()
    bias = torch.randn(3, requires_grad=True)
    for K, padding, size in ((4, 1, (6, 8)), (3, 0, (4, 7)), (4, 5, (2, 3))):
        op = lambda x, k, b, K=K, p=padding, s=size: OPS.bilinear_conv_transpose2d.default(x, k, b, s, 2, K, p, 1)
        ref = lambda x, k, b, K=K, p=padding, s=size: bilinear_conv_transpose2d_ref(
            x, 2, K, p, skip=k, bias=b, skip_offset=1, output_size=s
        )
        check_op(op, ref, [x, skip, bias], terms=9)


def test_registered_ops_have_second_derivatives():
    x = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    for op in (
        lambda x: OPS.upsample_bilinear.default(x, (3, 2), False, None, None),
        lambda x: OPS.bilinear_conv_transpose2d.default(x, None, None, (3, 3), 2, 3, 1, 0),
    ):
        (dx,) = torch.autograd.grad(op(x).pow(3).sum(), x, create_graph=True)
        assert dx.requires_grad
        ((ddx,),) = [torch.autograd.grad(dx.sum(), x)]
        y = op(x.detach())
        want = torch.autograd.functional.jvp(lambda x, op=op: op(x), x.detach(), torch.ones_like(x))[1]
        (want,) = torch.autograd.grad(op(x), x, 6 * y * want)
        torch.testing.assert_close(ddx, want)


@with_the_interpreter  # of torch's own ops: integration/test_compile_ops.py
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.long), True], ids=["static", "dynamic"])
def test_compiled_training(dynamic):
    eager, net = Net(), Net()
    net.load_state_dict(eager.state_dict())
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 3, CL), (3, 4, NCHW))[: 1 + dynamic]:
        x, skip = inputs(*shape)
        assert_same(step(compiled, net, x, skip), step(eager, eager, x, skip))


def test_graphs_hold_the_ops_exactly_where_kernels_run():
    graphs = []
    net = Net()
    backend = lambda module, _: graphs.append(module.graph) or module.forward
    torch.compile(net, fullgraph=True, backend=backend)(*inputs())
    want = HELD if INTERPRETED else set()
    assert held(graphs[0]) == want
    with fastseg.reference():
        torch.compile(net, fullgraph=True, backend=backend)(*inputs())
    assert held(graphs[-1]) == set()


@pytest.mark.parametrize("strict", shared([False, True], interpreted=[False], plain=[True]))
def test_exported(strict):
    net, example = Net().eval(), inputs(3, 4)
    dims = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(net, example, strict=strict, dynamic_shapes=(dims, dims))
    for args in (example, inputs(4, 5)):
        torch.testing.assert_close(program.module()(*args), net(*args), atol=1e-5, rtol=1e-5)
    assert held(program.graph) == (HELD if INTERPRETED else set())
    plain = program.run_decompositions(DECOMPOSITIONS)
    assert held(plain.graph) == set()
    torch.testing.assert_close(plain.module()(*example), net(*example), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strict", shared([False, True], interpreted=[True], plain=[False]))
def test_exported_without_bounds(strict):
    """Named sizes need no bound: what a kernel cannot take is found when the exported program runs."""
    net = nn.Sequential(BilinearConvTranspose2d(4, 2, bias=True), UpsamplingBilinear2d(scale_factor=2)).eval()
    dims = {2: torch.export.Dim("h", min=1), 3: torch.export.Dim("w", min=1)}
    program = torch.export.export(net, (torch.randn(1, 4, 5, 6),), strict=strict, dynamic_shapes=(dims,))
    for shape in ((1, 4, 5, 6), (1, 4, 3, 11)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), net(x), atol=1e-5, rtol=1e-5)


def test_ops_look_at_sizes_again():
    """A graph of any size meets one that no kernel takes: the registered ops, forward and backward, run torch's."""
    if not INTERPRETED:
        pytest.skip("a CPU tensor: no kernel runs")
    from fastseg.kernels.upsample.bilinear import LARGEST_SIDE

    low, full = (1, LARGEST_SIDE // 2 + 1), (2, LARGEST_SIDE + 2)
    x, dy = torch.randn(1, 1, *low), torch.randn(1, 1, *full)
    calls = {
        OPS.upsample_bilinear.default: (x, full, False, None, None),
        OPS.upsample_bilinear_bwd.default: (dy, low, False, None, None),
        OPS.bilinear_conv_transpose2d.default: (x, dy, None, full, 2, 4, 1, 0),
        OPS.bilinear_conv_transpose2d_bwd.default: (dy, low, 2, 4, 1),
    }
    launched = []
    with intercept(lambda *arguments: launched.append(arguments)):
        for op, args in calls.items():
            torch.testing.assert_close(op(*args), DECOMPOSITIONS[op](*args))
    assert not launched


def test_checkpointed():
    net = Net()
    x, skip = inputs()
    run = lambda x, skip: checkpoint(net, x, skip, use_reentrant=False)
    assert_same(step(run, net, x, skip), step(net, net, x, skip))


def test_only_wanted_gradients_are_computed():
    x, skip = inputs()
    bias = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        assert not upsample_bilinear(x.requires_grad_(), size=3).requires_grad
    y = bilinear_conv_transpose2d(x.detach(), 2, bias=bias)
    y.sum().backward()
    assert bias.grad.shape == (3,)
    assert not skip.requires_grad
