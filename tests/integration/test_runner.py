"""Runner: equal to the model, never stale, for any caller; graphs with a stand-in for CUDA's."""

import copy
import threading
import warnings
from typing import ClassVar

import pytest
import torch
from nets import unsettle
from torch import nn

from fastseg.inference import Runner
from fastseg.inference import runner as module
from fastseg.models import create
from fastseg.nn import ConvNormAct2d
from fastseg.nn.fuse.conv_norm_act import convolve
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.core.kept import Kept
from fastseg.ops.cpu import packed as _cpu_conv
from fastseg.ops.cpu.packed import PackedWeights, packed_weights

# Interpreted, a convolution takes seconds: what a Runner does around it is tested once, in the plain process.
around = pytest.mark.skipif(INTERPRETED, reason="the same whatever computes a convolution")


@pytest.fixture(autouse=True)
def _one_thread():
    """What a layer takes depends on the threads: these are one thread's choices, whatever the environment says."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Convolutions of each kind, without a kernel of ours."""

    def __init__(self):
        super().__init__()
        self.stem = ConvNormAct2d(3, 64, 3, padding=1)
        self.wide = ConvNormAct2d(64, 128, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Conv2d(128, 5, 1)
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, x):
        return self.head(self.drop(self.wide(self.stem(x)))) + self.shift

    def predict(self, x):
        return self(x).argmax(1).byte()


def net() -> Net:
    return unsettle(Net()).float().train()


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3, 24, 24)))


def plain(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_equals_the_model():
    model, x = net(), image()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    runner = Runner(model, x)
    for other in (x, image(1, 3, 24, 24), image(1, 3, 9, 17), x):
        close(runner(other), plain(model, other))
        assert torch.equal(runner.predict(other), plain(model, other).argmax(1))
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@around
def test_shapes_that_return_are_packed(monkeypatch):
    made, transform = [], _cpu_conv.transform
    monkeypatch.setattr(_cpu_conv, "transform", lambda *args: made.append(args[4]) or transform(*args))
    model = net()
    runner = Runner(model, image(), max_shapes=2)
    assert made == [24]
    for width in (28, 28, 24, 28, 32, 32, 24):  # the third shape drops the first
        runner(image(1 if width != 24 else 2, 3, 24, width))
    assert made == [24, 28, 32, 24]
    exact = Runner(model, image(), exact=True)
    assert len(made) == 4
    x = image()
    torch.testing.assert_close(exact(x), plain(model, x), rtol=0, atol=2e-6 * plain(model, x).abs().max().item())


@pytest.mark.skipif(INTERPRETED, reason="a CPU's own path, in minutes")
@pytest.mark.parametrize("name, head", [("unet", "outc.conv"), ("segnet", "classifier"), ("deeplabv3plus", "cls_conv")])
def test_classifiers_are_packed(name, head, monkeypatch):
    made = []
    for kind in ("pack", "Matrix"):
        make = getattr(_cpu_conv, kind)
        monkeypatch.setattr(
            _cpu_conv, kind, lambda weight, *args, make=make: made.append(weight.shape[0]) or make(weight, *args)
        )
    model, x = create(name, 7).eval(), image(1, 3, 188, 188)
    Runner(model, x)
    assert made.count(7) == 1
    made.clear()
    model.get_submodule(head).register_forward_hook(lambda *_: None)  # who watches it sees it called
    Runner(model, x)
    assert made.count(7) == 0


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_a_convolution_of_any_geometry_is_packed(mode):
    conv, x = nn.Conv2d(6, 4, 3, 2, 2, 2, groups=2, padding_mode=mode), image(2, 6, 11, 12)
    with torch.no_grad(), packed_weights(PackedWeights(Kept(conv.parameters()))):
        torch.testing.assert_close(convolve(conv, x), conv(x))


@around
def test_the_budget_is_for_all_shapes():
    model = net()
    runner = Runner(model, image(), winograd_bytes=5 * model.wide.conv.weight.nbytes)
    for _ in range(2):
        runner(image(1, 3, 32, 32))
    assert [packs.transformed // model.wide.conv.weight.nbytes for packs in runner._state.packs.values()] == [4, 0]


def write(model: Net) -> None:
    with torch.no_grad():
        model.head.bias.add_(1)


def test_results_are_the_callers():
    model = net()
    x, y = image(), image()
    runner = Runner(model, x)
    first = runner(x)
    kept = first.clone()
    runner(y)
    assert torch.equal(first, kept) and not first.requires_grad
    first.requires_grad_().sum().backward()  # an ordinary tensor


@around
def test_dtypes():
    model, x = net(), image()
    close(Runner(model, x)(x.double()), plain(model, x))  # converted
    half = Runner(model, x, dtype=torch.bfloat16)
    got = half(x)
    assert got.dtype == torch.bfloat16 and half._state.copy.stem.norm.weight.dtype == torch.float32
    assert (got.float() - plain(model, x)).norm() < 0.02 * plain(model, x).norm()
    with torch.autocast("cpu", torch.bfloat16):
        got = Runner(model, x)(x)  # in the dtype that was asked for at its making
    close(got, plain(model, x))
    double = model.double()
    torch.testing.assert_close(Runner(double, x.double())(x.double()), plain(double, x.double()))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter keeps one launch at a time")
def test_threads():
    model = net()
    inputs = [image(1, 3, 24, 24 + 4 * (i % 3)) for i in range(12)]
    runner, results = Runner(model, inputs[0]), [None] * len(inputs)

    def work(i: int) -> None:
        results[i] = runner(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, got in zip(inputs, results, strict=True):
        close(got, plain(model, x))


@around
def test_errors():
    model, x = net(), image()
    for bad, error, message in (
        (x.byte(), TypeError, r"Runner: x is torch.uint8; give a floating-point tensor"),
        ("photo.png", TypeError, "Runner: x is a builtins.str; give"),
        (x.numpy(), TypeError, "Runner: x is a numpy.ndarray; give a floating-point tensor"),
        (x[0], ValueError, r"Runner: x is \(3, 24, 24\); it must be \(N, C, H, W\)"),
        (x.to("meta"), ValueError, "Runner: x is on meta, the model on cpu; move one of them"),
    ):
        with pytest.raises(error, match=message):
            Runner(model, bad)
        with pytest.raises(error, match=message):
            Runner(model, x)(bad)
    with pytest.raises(ValueError, match="max_shapes is 0"):
        Runner(model, x, max_shapes=0)
    with pytest.raises(ValueError, match="check is 'all'; use one of counts, samples, values, or None"):
        Runner(model, x, check="all")
    with pytest.raises(ValueError, match=r"out is \(1,\) on cpu, the result \(2, 5, 24, 24\) on cpu"):
        Runner(model, x)(x, out=torch.empty(1))
    with pytest.raises(TypeError, match="Flatten returns no logits"):
        Runner(nn.Flatten(), x).predict(x)


# Graphs: a stand-in captures on the CPU. It writes the same output each time, as a graph does, and fails as one does.


class Graph:
    captured: ClassVar[list[tuple | None]] = []  # shapes; None: it failed
    errors: ClassVar[list[Exception]] = []
    pools: ClassVar[set] = set()

    def __init__(self, function, pool):
        Graph.pools.add(pool)
        Graph.captured.append(None)
        if Graph.errors:
            raise Graph.errors.pop(0)
        self.function, self.output = function, function()
        Graph.captured[-1] = (self.output.shape[0], 3, *self.output.shape[-2:])

    def __call__(self):
        return self.output.copy_(self.function())


class Event:
    def record(self, stream):
        self.stream = stream

    def synchronize(self):
        Stream.synchronized += 1


class Stream:
    waited = synchronized = 0

    def synchronize(self):
        Stream.synchronized += 1

    def wait_event(self, event):
        assert event.stream is not None
        Stream.waited += 1


@pytest.fixture
def graphs(monkeypatch):
    """Runners capture; -> what was captured."""
    Graph.captured, Graph.errors, Graph.pools, Stream.waited, Stream.synchronized = [], [], set(), 0, 0
    handles = iter(range(100))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(module, "captured", Graph)
    monkeypatch.setattr(module, "captures", lambda x: True)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return Graph


@around
def test_a_graph_for_each_shape_and_method(graphs):
    """From the second call of a shape on; shapes are counted, not graphs; all share one pool."""
    model, x, wide = net(), image(), image(1, 3, 24, 32)
    runner = Runner(model, x, max_shapes=2)
    for v in (x, wide, x):
        close(runner(v), plain(model, v))
    assert graphs.captured == [(2, 3, 24, 24)] and Stream.waited == 3
    close(runner(wide), plain(model, wide))
    for v in (x, wide, x, wide):
        assert torch.equal(runner.predict(v), plain(model, v).argmax(1))
    assert len(graphs.captured) == 4 and len(graphs.pools) == 1
    for _ in range(2):
        runner(image(1, 3, 9, 17))  # drops x, least recently used
    assert list(runner._state.graphs) == [(1, 3, 24, 32), (1, 3, 9, 17)]
    close(runner(x.double()), plain(model, x))
    assert graphs.captured[-1] == (2, 3, 24, 24) and len(graphs.captured) == 6


@around
def test_a_graphs_results_are_the_callers(graphs):
    model, x, y = net(), image(), image()
    runner = Runner(model, x)
    first, classes = runner(x), runner.predict(x)
    close(runner(y), plain(model, y))
    assert torch.equal(runner.predict(y), plain(model, y).argmax(1))
    close(first, plain(model, x))
    assert torch.equal(classes, plain(model, x).argmax(1))


def test_no_graph_while_all_modules_have_hooks(graphs):
    """As profilers put them there: modules are called until the hooks are gone, and nothing is captured meanwhile."""
    model, x, wide, seen = net(), image(), image(1, 3, 24, 32), []
    runner = Runner(model, x)
    runner(x), runner(wide)
    count = len(graphs.captured)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        y = runner(x)
        called = len(seen)
        close(y, plain(model, x))
        close(runner(wide), plain(model, wide))
        assert called > 1 and len(graphs.captured) == count
    finally:
        hook.remove()
    close(runner(x), plain(model, x))
    assert len(graphs.captured) == count


def test_a_graph_of_old_weights_is_not_replayed(graphs):
    model, x = net(), image()
    runner = Runner(model, x)
    write(model)
    close(runner(x), plain(model, x))
    assert len(graphs.captured) == 2 and Stream.synchronized == 2  # the replay in vain, and the one before it
    close(runner(x), plain(model, x))
    assert len(graphs.captured) == 2


@around
def test_out_of_memory_drops_the_other_graphs(graphs):
    model, x, wide = net(), image(), image(1, 3, 24, 32)
    runner = Runner(model, x)
    runner(wide)
    graphs.errors = [torch.OutOfMemoryError("CUDA out of memory")]
    close(runner(wide), plain(model, wide))
    assert list(runner._state.graphs) == [(1, 3, 24, 32)]


@around
@pytest.mark.parametrize(
    "errors, message",
    [
        ([torch.OutOfMemoryError("CUDA out of memory")] * 2, "out of memory"),
        ([RuntimeError("operation not permitted when stream is capturing\nand more")], "not permitted when stream"),
    ],
)
def test_what_cannot_be_captured_runs_without(graphs, errors, message):
    model, x, wide = net(), image(), image(1, 3, 24, 32)
    runner = Runner(model, x)
    runner(wide)
    graphs.errors = list(errors)
    with pytest.warns(UserWarning, match=rf"no graph for \(1, 3, 24, 32\), calls launch one by one: .*{message}"):
        close(runner(wide), plain(model, wide))
    count = len(graphs.captured)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(runner(wide), plain(model, wide))  # and is not tried again
    assert len(graphs.captured) == count


@around
@pytest.mark.skipif(_cpu_conv.why_not() != "", reason="nothing is packed")
def test_a_model_of_the_library():
    model = unsettle(create("fcn", 5, backbone="resnet18", stride=4, width=0.25)).float().eval()
    x = image(1, 3, 64, 96)
    runner = Runner(model, x)
    close(runner(x), plain(model, x))
    assert torch.equal(runner.predict(x), plain(model, x).argmax(1).byte())
