"""``fastseg.unfused()``: every block calls its modules, one after another; drop-ins are torch's modules."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastseg
from fastseg import nn as fnn
from fastseg.nn.fuse.sequential import Sequential
from fastseg.ops.core.explain import UNFUSED_DEPTH

BLOCKS = {
    "ConvNormAct2d": lambda: fnn.ConvNormAct2d(4, 6, 3, padding=1),
    "Sequential": lambda: Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
    "SeparableConv2d": lambda: fnn.SeparableConv2d(4, 6, mid_norm=True, mid_act="relu", pre_act="relu"),
    "ASPP": lambda: fnn.ASPP(4, 6, rates=(1, 2)),
    "ASPP, sum": lambda: fnn.ASPP(4, 6, rates=(1, 2), fusion="sum"),
    "BatchNormAct2d": lambda: fnn.BatchNormAct2d(4, act="relu6"),
}


class Calls(TorchDispatchMode):
    """Names of torch's calls, and of ours."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


def image() -> torch.Tensor:
    return torch.randn(2, 4, 7, 6).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [False, True])
def test_blocks_call_their_modules(name, training):
    """As many convolutions, norms and activations as there are modules; no op of ours; the same result."""
    block, x = BLOCKS[name]().train(training), image()
    with fastseg.unfused(), fastseg.explain() as report:
        block(x)
        with Calls() as calls:
            y = block(x)
    modules = list(block.modules())
    count = lambda word: sum(word in call for call in calls.names)
    assert not count("fastseg::")
    assert count("aten::convolution") == sum(type(m) is nn.Conv2d for m in modules)
    assert count("batch_norm") == sum(isinstance(m, nn.BatchNorm2d) for m in modules)
    assert {d.why for d in report} <= {"inside fastseg.unfused()"}
    if not training:
        torch.testing.assert_close(block(x), y, rtol=1e-4, atol=1e-5)


def test_parameters_and_statistics_are_trained():
    """One step of training, unfused, equals torch's own modules."""
    block, x = fnn.ConvNormAct2d(4, 6, 3, padding=1), image()
    conv, norm = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
    ours = {type(m): m for m in block.modules()}
    conv.load_state_dict(ours[nn.Conv2d].state_dict())
    with fastseg.unfused():
        block(x).square().sum().backward()
    F.relu(norm(conv(x))).square().sum().backward()
    torch.testing.assert_close(ours[nn.Conv2d].weight.grad, conv.weight.grad)
    torch.testing.assert_close(ours[nn.BatchNorm2d].running_var, norm.running_var)
    assert ours[nn.BatchNorm2d].num_batches_tracked == 1


@pytest.mark.parametrize(
    "ours, torchs, args",
    [
        (fnn.MaxPool2d(2, return_indices=True, index_format="compact"), nn.MaxPool2d(2, return_indices=True), ()),
        (fnn.UpsamplingBilinear2d(scale_factor=2), nn.UpsamplingBilinear2d(scale_factor=2), ()),
        (fnn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample(scale_factor=2, mode="bilinear"), ()),
        (fnn.MaxUnpool2d(2), nn.MaxUnpool2d(2), (torch.arange(0, 4 * 42, 4).view(1, 1, 7, 6).expand(2, 4, 7, 6),)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_drop_ins_are_torchs(ours, torchs, args):
    x = image()
    with fastseg.unfused(), fastseg.explain() as report, Calls() as calls:
        got = ours(x, *args)
    for a, b in zip(*((y if isinstance(y, tuple) else (y,)) for y in (got, torchs(x, *args))), strict=True):
        assert torch.equal(a, b)
    assert not len(report) and not any("fastseg::" in name for name in calls.names)


def test_acts_in_place_stay_in_place():
    """As the module is written: its output is its input's memory."""
    block, seen = Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True)), []
    block[0].register_forward_hook(lambda module, args, y: seen.append(y))
    with torch.no_grad(), fastseg.unfused():
        assert block(image()).data_ptr() == seen[0].data_ptr()


def test_of_one_thread():
    block, x, seen = fnn.ConvNormAct2d(4, 6, 1).eval(), image(), []

    def work() -> None:
        with torch.no_grad(), fastseg.explain() as report:
            block(x)
        seen.extend(report)

    with torch.no_grad(), fastseg.unfused():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        with fastseg.explain() as report:
            block(x)
    assert [d.op for d in seen] == ["conv2d_act"] and {d.why for d in report} == {"inside fastseg.unfused()"}
    assert UNFUSED_DEPTH == [0]


def test_a_graph_holds_what_is_written():
    """Entered around the call or inside the compiled function; outside, the same function is compiled anew."""
    block, x = fnn.ConvNormAct2d(4, 6, 1).eval(), image()
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if "call" in node.op])
        return graph

    torch._dynamo.reset()
    run = torch.compile(block, fullgraph=True, backend=backend)
    with torch.no_grad():
        want = block(x)
        with fastseg.unfused():
            torch.testing.assert_close(run(x), want, rtol=1e-4, atol=1e-5)
        inside = torch.compile(fastseg.unfused()(block), fullgraph=True, backend=backend)
        torch.testing.assert_close(inside(x), want, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    assert len(graphs) == 2 and all(any("batch_norm" in name for name in graph) for graph in graphs)
    assert not any("fastseg" in name for graph in graphs for name in graph) and UNFUSED_DEPTH == [0]
