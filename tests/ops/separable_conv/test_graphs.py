"""The separable convolution among torch's tools: compile, export, ONNX, autocast, checkpointing, other processes.

Runs in two processes. With the interpreter captured graphs hold the registered ops, and these the kernels; without it
a CPU tensor takes the reference, in captured graphs too.
"""

import io
import itertools
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from processes import run_two
from rows import shared, with_the_interpreter
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastseg
from fastseg.nn import SeparableConv2d
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.core.register import DECOMPOSITIONS

CL, NCHW = torch.channels_last, torch.contiguous_format


class Net(nn.Module):
    """Two blocks, every kind of part: what a model does with the op."""

    def __init__(self):
        super().__init__()
        self.first = SeparableConv2d(3, 4, stride=2, mid_norm=True, mid_act="relu6")
        self.second = SeparableConv2d(4, 4, bias=True, pre_act="leaky_relu", post_act=None)
        for norm in (self.first.mid_norm, self.first.post_norm, self.second.post_norm):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x, residual=x)


def image(N=2, H=7, W=6, layout=CL) -> Tensor:
    return torch.randn(N, 3, H, W).contiguous(memory_format=layout)


def ops_in(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "fastseg" in str(node.target)]


class Capture:
    """A torch.compile backend: runs the graph as it is and keeps it."""

    def __init__(self):
        self.graphs: list[torch.fx.Graph] = []

    def __call__(self, module: torch.fx.GraphModule, _):
        self.graphs.append(module.graph)
        return module.forward


def step(run, net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One training step of ``net`` through ``run``: output, every gradient, every buffer after it."""
    net.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    results = {"y": y.detach(), "dx": x.grad} | {name: p.grad.clone() for name, p in net.named_parameters()}
    return results | {name: b.clone() for name, b in net.named_buffers()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    missing = {name for name in want.keys() - got.keys() if not name.endswith("num_batches_tracked")}
    assert not missing and got.keys() <= want.keys()  # an exported program drops a count that it does not use
    for name, g in got.items():
        torch.testing.assert_close(g, want[name], atol=2e-5, rtol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


SIZES = pytest.mark.parametrize(  # a size of its own is the easier half: with --long
    "dynamic", [pytest.param(False, marks=pytest.mark.long), True], ids=["static", "dynamic"]
)


@with_the_interpreter  # without it: test_inductor
@SIZES
def test_compiled_training(dynamic):
    eager, net = Net(), Net()
    net.load_state_dict(eager.state_dict())
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape, layout in (((2, 7, 6), CL), ((3, 8, 9), NCHW))[: 1 + dynamic]:
        x = image(*shape, layout)
        assert_same(step(compiled, net, x), step(eager, eager, x))


@SIZES
def test_compiled_inference(dynamic):
    net = Net().eval()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 7, 6), (1, 9, 8)):
        x = image(*shape)
        with torch.no_grad():
            got, want = compiled(x), net(x)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert got.stride() == want.stride()


def test_inductor():
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("Inductor compiles C++ on a CPU, and no compiler is here")
    eager, net = Net(), Net()
    net.load_state_dict(eager.state_dict())
    x = image()
    assert_same(step(torch.compile(net, fullgraph=True), net, x), step(eager, eager, x))


def test_graphs_hold_the_op_exactly_where_kernels_run():
    net, capture = Net(), Capture()
    torch.compile(net, fullgraph=True, backend=capture)(image())
    with torch.no_grad():
        torch.compile(net.eval(), fullgraph=True, backend=capture)(image())
    train, inference = (ops_in(graph) for graph in capture.graphs)
    assert train == ["fastseg.separable_conv2d_train.default"] * 2 * INTERPRETED
    assert inference == ["fastseg.separable_conv2d.default"] * 2 * INTERPRETED


def test_compiled_code_follows_the_switch():
    net, capture, x = Net().eval(), Capture(), image()
    compiled = torch.compile(net, fullgraph=True, backend=capture)
    with torch.no_grad():
        before = compiled(x)
        with fastseg.reference():
            inside = compiled(x)
        after = compiled(x)
    held = [bool(ops_in(graph)) for graph in capture.graphs]
    assert held == [True, False] if INTERPRETED else not any(held)
    torch.testing.assert_close(inside, before, atol=1e-5, rtol=1e-5)
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    "strict, training",
    shared(
        itertools.product([True, False], [True, False]),
        interpreted=[(True, False), (False, True)],
        plain=[(False, False), (True, True)],
    ),
)
def test_export(strict, training):
    net, x = Net().train(training), image()
    twin = Net().train(training)
    twin.load_state_dict(net.state_dict())
    program = torch.export.export(net, (x,), strict=strict)
    assert len(ops_in(program.graph)) == 2 * INTERPRETED
    assert_same(step(program.module(), net, x), step(twin, twin, x))

    plain = program.run_decompositions(DECOMPOSITIONS)
    assert not ops_in(plain.graph)
    run = plain.module()
    twin.load_state_dict(run.state_dict(), strict=False)
    if training and not INTERPRETED:  # torch's own batch norm, decomposed in training, updates what its backward needs
        torch.testing.assert_close(run(x), twin(x), atol=1e-5, rtol=1e-5)
    else:
        assert_same(step(run, run, x), step(twin, twin, x))


def test_exported_program_is_saved_and_loaded_with_dynamic_sizes():
    net, buffer = Net().eval(), io.BytesIO()
    sizes = {"x": {0: torch.export.Dim("N"), 2: torch.export.Dim("H", min=4), 3: torch.export.Dim("W", min=4)}}
    torch.export.save(torch.export.export(net, (image(),), dynamic_shapes=sizes), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    x = image(3, 11, 8)
    torch.testing.assert_close(loaded(x), net(x), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="without kernels: integration/test_every_model.py")
@pytest.mark.parametrize("layout", [pytest.param(NCHW, marks=pytest.mark.long), CL], ids=str)
def test_onnx(layout, tmp_path):
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module)
    onnxruntime = pytest.importorskip("onnxruntime")
    net, x = Net().eval(), image(layout=layout)
    program = torch.export.export(net, (x,)).run_decompositions(DECOMPOSITIONS)
    path = tmp_path / "net.onnx"
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.contiguous().numpy()})
    torch.testing.assert_close(torch.from_numpy(got), net(x).detach().contiguous(), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Around the op in eager mode.


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_activation_checkpointing(reentrant):
    net, x = Net().eval(), image()  # eval: recomputing moves training statistics a second time, torch's too
    wrapped = lambda v: checkpoint(net, v, use_reentrant=reentrant)
    assert_same(step(wrapped, net, x), step(net, net, x))
    net.train()
    state = {name: t.clone() for name, t in net.state_dict().items()}
    got = step(wrapped, net, x)
    net.load_state_dict(state)
    buffers = dict(net.named_buffers())
    want = step(net, net, x)
    assert_same(*({name: t for name, t in results.items() if name not in buffers} for results in (got, want)))


@pytest.mark.parametrize("dtype, compiled", [
    (torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True),
    pytest.param(torch.float16, True, marks=pytest.mark.long),
])  # fmt: skip
def test_autocast_dtypes(dtype, compiled):
    net, x = Net(), image().requires_grad_()
    run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
    want = net.eval()(x)
    with torch.autocast("cpu", dtype=dtype):
        y = run(x)
    assert y.dtype == dtype
    assert (y - want).abs().max() < 8 * torch.finfo(dtype).eps * want.abs().max()
    y.sum().backward()
    assert x.grad.dtype == torch.float32 and {p.grad.dtype for p in net.parameters()} == {torch.float32}


def test_reference_is_scoped_to_its_thread():
    block, x, entered, leave, why = SeparableConv2d(3, 4).eval(), image(), threading.Event(), threading.Event(), {}

    def inside():
        with fastseg.reference(), fastseg.explain() as report:
            entered.set()
            leave.wait(30)
            block(x)
        why["inside"] = next(iter(report)).why

    thread = threading.Thread(target=inside)
    thread.start()
    assert entered.wait(30)
    with fastseg.explain() as report:
        block(x)  # while the other thread is inside
    leave.set()
    thread.join(30)
    (decision,) = report
    assert why["inside"] == "inside fastseg.reference()"
    assert decision.path == "triton" if INTERPRETED else (decision.path, decision.why) == ("reference", "CPU tensor")


def test_state_dict_goes_through_a_file():
    net, twin, buffer = Net(), Net().eval(), io.BytesIO()
    step(net, net, image())
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    x = image()
    assert torch.equal(twin(x), net.eval()(x))


# ---------------------------------------------------------------------------------------------------------------------
# Other processes.

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, fastseg, fastseg.models
from fastseg.nn import SeparableConv2d
torch.manual_seed(0)
block = SeparableConv2d(3, 4, mid_norm=True, mid_act="relu")
x = torch.randn(2, 3, 6, 5)
with fastseg.explain() as report:
    y = block(x)
(decision,) = report
assert (decision.path, decision.why) == ("reference", "Triton is not installed"), decision
want = torch.relu(block.post_norm(block.pointwise(torch.relu(block.mid_norm(block.depthwise(x))))))
torch.testing.assert_close(y, want)
y.square().sum().backward()
assert all(p.grad is not None for p in block.parameters())
w = block.depthwise.weight, block.pointwise.weight
u = torch.ops.fastseg.separable_conv2d(x, *w, *[None] * 11, 1, 1, 1, "none", "none", "none", "none", 0.0, "none", 0.0)
torch.testing.assert_close(u, block.pointwise(block.depthwise(x)))
kernels = {name for name in sys.modules if name.startswith("fastseg.kernels.")}
names = {"fastseg.kernels.runtime" + part for part in ("", ".ceilings", ".sizes", ".torch_private", ".verdict")}
assert kernels <= names, kernels  # numbers and names of torch, no Triton
"""


@pytest.mark.skipif(INTERPRETED, reason="a process of its own: once, in the plain process")
def test_runs_without_triton():
    command = [sys.executable, "-P", "-c", WITHOUT_TRITON]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


DISTRIBUTED = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from fastseg.nn import SeparableConv2d

rank, store, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
block = SeparableConv2d(3, 4, mid_norm=True, mid_act="relu")
block.load_state_dict(torch.load(f"{folder}/block.pt", weights_only=True))
block.post_norm.eval()
block.mid_norm.eval()
x = torch.load(f"{folder}/x.pt", weights_only=True)[2 * rank : 2 * rank + 2]
parallel = DistributedDataParallel(block)
parallel(x).square().mean().backward()
torch.save([p.grad for p in block.parameters()], f"{folder}/grads{rank}.pt")
dist.destroy_process_group()
"""


@with_the_interpreter  # without it: integration/test_converted.py
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_data_parallel(tmp_path):
    block, x = SeparableConv2d(3, 4, mid_norm=True, mid_act="relu"), image(4)
    torch.save(block.state_dict(), tmp_path / "block.pt")
    torch.save(x, tmp_path / "x.pt")
    run_two(DISTRIBUTED, tmp_path)
    block.eval()(x).square().mean().backward()  # fixed statistics: a batch split in two is the same batch
    for rank in range(2):
        grads = torch.load(tmp_path / f"grads{rank}.pt", weights_only=True)
        for got, p in zip(grads, block.parameters(), strict=True):
            torch.testing.assert_close(got, p.grad, atol=1e-6, rtol=1e-5)
