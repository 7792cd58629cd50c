"""Pooling, unpooling and SegNet among torch's tools: compile, export, ONNX, autocast, forward-mode AD.

Runs in two processes, as the other files here: with the interpreter captured graphs hold the registered ops.
"""

import io

import pytest
import torch
from rows import shared, with_the_interpreter
from torch import Tensor, nn

import fastseg
from fastseg.models import SegNetBasic
from fastseg.nn import MaxPool2d, MaxUnpool2d
from fastseg.ops import BatchNormArgs, batch_norm_act_max_pool2d, max_pool2d, max_unpool2d
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.core.register import DECOMPOSITIONS
from fastseg.ops.registered.pooling import Geometry, pick_op, pool_op, unpool_op

CL, NCHW = torch.channels_last, torch.contiguous_format
pytestmark = pytest.mark.filterwarnings("ignore:max_unpool")

GEOMETRY = Geometry([5, 6], [3, 3], [2, 2], [2, 2], [0, 0], [1, 1])  # ceil mode
OVERLAP = Geometry([5, 6], [3, 3], [3, 3], [2, 2], [1, 1], [1, 1])


class Net(nn.Module):
    """Down and up again, from int64 or from compact indices."""

    def __init__(self, index_format: str, ceil_mode: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.pool = MaxPool2d(2, 2, ceil_mode=ceil_mode, return_indices=True, index_format=index_format)
        self.unpool = MaxUnpool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        values, indices = self.pool(y)
        return self.unpool(values * 2, indices, output_size=y.shape[-2:])


def image(N=2, H=7, W=6, layout=CL) -> Tensor:
    return torch.randn(N, 3, H, W).contiguous(memory_format=layout)


def ops_in(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target).split(".")[1] for node in graph.nodes if "fastseg" in str(node.target)]


def step(run, net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return {"y": y.detach(), "dx": x.grad} | {name: p.grad.clone() for name, p in net.named_parameters()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, g in got.items():
        torch.testing.assert_close(g, want[name], atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def views(shape=(2, 5, 5, 6)) -> list[Tensor]:
    x = torch.randn(shape)
    wide = torch.randn(2, 8, *shape[2:]).contiguous(memory_format=CL)
    return [x, x.contiguous(memory_format=CL), wide[:, :5], x.bfloat16()]


def test_plain_implementations_equal_the_kernels():
    """The plain forms serve exported programs: each against what this process runs, int64 and codes."""
    for geometry, bits in ((GEOMETRY, 2), (GEOMETRY, 64), (OVERLAP, 4), (OVERLAP, 64)):
        for x in views():
            last = x.stride(1) == 1
            y, index = pool_op(x, *geometry, bits)
            for got, want in zip(DECOMPOSITIONS[pool_op.op](x, *geometry, bits), (y, index), strict=True):
                assert torch.equal(got, want) and got.stride() == want.stride()
            for add in (False, True):
                args = (y, index, *geometry, bits, last, add, False)
                got, want = DECOMPOSITIONS[unpool_op.op](*args), unpool_op(*args)
                torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-5)
                assert got.stride() == want.stride()
            got, want = (op(x, index, *geometry, bits, last) for op in (DECOMPOSITIONS[pick_op.op], pick_op))
            assert torch.equal(got, want) and got.stride() == want.stride()


# A size of its own is the easier half: with --long. Of torch's own ops: integration/test_compile_ops.py.
@with_the_interpreter
@pytest.mark.parametrize("index_format", ["int64", "compact"])
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.long), True], ids=["static", "dynamic"])
def test_compiled(dynamic, index_format):
    net = Net(index_format)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape, layout in (((2, 7, 6), CL), ((3, 8, 9), NCHW))[: 1 + dynamic]:
        x = image(*shape, layout)
        assert_same(step(compiled, net, x), step(net, net, x))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x))


def test_compiled_code_returns_compact_indices():
    pool = MaxPool2d(2, return_indices=True, index_format="compact")
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=CL)
    values, indices = torch.compile(pool, fullgraph=True, backend="aot_eager")(x)
    want, want_indices = pool(x)
    assert torch.equal(values, want) and torch.equal(indices.codes, want_indices.codes)
    assert torch.equal(indices.to_torch(), want_indices.to_torch()) and indices.shape == want_indices.shape


def test_graphs_hold_the_ops_exactly_where_kernels_run():
    graphs: list[torch.fx.Graph] = []

    def keep(module: torch.fx.GraphModule, _):
        graphs.append(module.graph)
        return module.forward

    torch.compile(Net("compact"), fullgraph=True, backend=keep)(image())
    with fastseg.reference():
        torch._dynamo.reset()
        torch.compile(Net("compact"), fullgraph=True, backend=keep)(image())
    assert [ops_in(graph) for graph in graphs] == [["max_pool", "max_unpool"] * INTERPRETED, []]


# In evaluation: test_export, integration/test_every_model.py.
@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.long), True], ids=["eval", "train"])
def test_compiled_segnet(training):
    net = SegNetBasic(3, channels=4).to(memory_format=CL).train(training)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = image(2, 13, 10)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    got = step(compiled, net, x)
    after = {key: value.clone() for key, value in net.state_dict().items()}
    net.load_state_dict(state)
    assert_same(got, step(net, net, x))
    for key, value in net.state_dict().items():
        torch.testing.assert_close(after[key], value, msg=key)


@pytest.mark.parametrize("strict", shared([True, False], interpreted=[False], plain=[True]))
def test_export(strict):
    net, x = SegNetBasic(3, channels=4).to(memory_format=CL).eval(), image(2, 13, 10)
    program = torch.export.export(net, (x,), strict=strict)
    assert bool(ops_in(program.graph)) == INTERPRETED
    torch.testing.assert_close(program.module()(x), net(x), atol=1e-5, rtol=1e-5)
    plain = program.run_decompositions(DECOMPOSITIONS)
    assert not ops_in(plain.graph)
    torch.testing.assert_close(plain.module()(x), net(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("index_format", ["int64", "compact"][: 1 + INTERPRETED])
def test_exported_program_is_saved_and_loaded_with_dynamic_sizes(index_format):
    # torch's own ceil-mode pooling guards on its sizes, and cannot prove the guard for all of them
    net, buffer = Net(index_format, ceil_mode=INTERPRETED).eval(), io.BytesIO()
    sizes = {"x": {0: torch.export.Dim("N"), 2: torch.export.Dim("H", min=4), 3: torch.export.Dim("W", min=4)}}
    torch.export.save(torch.export.export(net, (image(),), dynamic_shapes=sizes), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    x = image(3, 11, 8)
    torch.testing.assert_close(loaded(x), net(x), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="without kernels: integration/test_every_model.py")
def test_onnx(tmp_path):
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module)
    onnxruntime = pytest.importorskip("onnxruntime")
    net, x = SegNetBasic(3, channels=4).eval(), image(1, 13, 10, NCHW)
    program = torch.export.export(net, (x,)).run_decompositions(DECOMPOSITIONS)
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), net(x).detach(), atol=1e-4, rtol=1e-4)


def test_autocast_follows_the_input():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, 4, 4, 4, dtype=dtype).contiguous(memory_format=CL)
        with torch.autocast("cpu", torch.bfloat16):
            values, indices = max_pool2d(x, 2, return_indices=True)
            assert values.dtype == max_unpool2d(values, indices, 2).dtype == dtype
            norm = BatchNormArgs(torch.zeros(4), torch.ones(4))
            assert batch_norm_act_max_pool2d(x, norm, "relu").dtype == dtype


def test_forward_mode_through_the_modules():
    net, x, tangent = Net("compact"), image(), image()
    with torch.autograd.forward_ad.dual_level():
        y = net(torch.autograd.forward_ad.make_dual(x, tangent))
        got = torch.autograd.forward_ad.unpack_dual(y).tangent
    want = torch.autograd.functional.jvp(net, x, tangent)[1]
    torch.testing.assert_close(got, want)


def test_inference_mode_and_symbolic_trace():
    net, x = Net("compact").eval(), image()
    with torch.inference_mode():
        torch.testing.assert_close(net(x), net(x.clone()))
    traced = torch.fx.symbolic_trace(nn.Sequential(MaxPool2d(2)))
    assert torch.equal(traced(x), max_pool2d(x, 2))
