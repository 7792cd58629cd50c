"""A convolution of an upsampled map among torch's tools: compile, export."""

import pytest
import torch
from torch import Tensor, nn

import fastseg
from fastseg.kernels.runtime.launch import intercept, run
from fastseg.nn.fuse.upsample_concat import run_upsample_concat_conv
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.core.register import DECOMPOSITIONS

CL = torch.channels_last
OPS = torch.ops.fastseg


class Net(nn.Module):
    """The beginning of a decoder."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, deep: Tensor, low: Tensor) -> Tensor:
        return run_upsample_concat_conv(deep, low, self.conv, self.norm, "relu", align_corners=True)


def inputs(h=2, w=2) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(s).contiguous(memory_format=CL) for s in ((2, 3, h, w), (2, 2, 3 * h - 1, 2 * w)))


@pytest.fixture(autouse=True)
def _few_programs():
    if INTERPRETED:
        from fastseg.kernels.runtime.config import override

        with override("upsample_conv_fwd", ROWS=8):
            yield
    else:
        yield


def held(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target).split(".")[1] for node in graph.nodes if "fastseg" in str(node.target)}


def test_no_gradient_past_an_activation():
    taps = torch.randn(3, 1, 1, 1, 3, 2, requires_grad=True)
    y = OPS.upsample_taps.default(taps, None, None, "relu", (2, 2), False)
    with pytest.raises(RuntimeError, match="apply them to its result"):
        y.sum().backward()


def test_compiled():
    """Evaluation, at two sizes; training upsamples first, by ops that have tests of their own."""
    net = Net().eval()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes in ((2, 2), (2, 3)):
        maps = inputs(*sizes)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*maps), net(*maps), atol=1e-5, rtol=1e-5)


def test_graphs_hold_the_op_exactly_where_kernels_run():
    graphs, net = [], Net().eval()
    backend = lambda module, _: graphs.append(module.graph) or module.forward
    for training in (False, True):
        with torch.set_grad_enabled(training):
            torch._dynamo.reset()
            torch.compile(net, fullgraph=True, backend=backend)(*inputs())
        assert ("upsample_concat_conv2d" in held(graphs[-1])) == (INTERPRETED and not training)
    with fastseg.reference(), torch.no_grad():
        torch.compile(net, fullgraph=True, backend=backend)(*inputs())
    assert held(graphs[-1]) == set()


@pytest.mark.skipif(not INTERPRETED, reason="kernels are interpreted")
@pytest.mark.parametrize("form", ["taps", "reference"])
def test_a_graph_decides_as_eager_does(form):
    """Of these sizes the model leaves the kernel out; forced, a graph that was captured before takes it."""
    net, maps = Net().eval(), inputs()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    launches = []
    watch = lambda *launch: (launches.append(launch[0].__name__), run(*launch))
    with torch.no_grad(), intercept(watch):
        compiled(*maps)
        assert "_upsample_conv_fwd_kernel" not in launches
        with fastseg.force("upsample_concat_conv2d", form):
            launches.clear()
            torch.testing.assert_close(compiled(*maps), net(*maps), atol=1e-5, rtol=1e-5)
    assert launches.count("_upsample_conv_fwd_kernel") == 2 * (form == "taps")


def test_exported():
    net, example = Net().eval().requires_grad_(False), inputs(3, 2)
    dims = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(net, example, strict=True, dynamic_shapes=(dims, dims))
    for args in (example, inputs(2, 3)):
        torch.testing.assert_close(program.module()(*args), net(*args), atol=1e-5, rtol=1e-5)
    plain = program.run_decompositions(DECOMPOSITIONS)
    assert "upsample_concat_conv2d" not in held(plain.graph)
