"""``optimize``: whole models keep their values, signature and results; what cannot be traced runs as it is."""

import copy
import pickle
import threading

import pytest
import torch
from nets import unsettle
from nets_of_libraries import hf_segformer, outputs, smp_net
from torch import nn
from torch.nn import functional as F

import fastseg
from fastseg.inference import Runner
from fastseg.inference.gate import Gate
from fastseg.models import create

GIVEN = {"sizes": "given"}


class Net(nn.Module):
    """A residual block, a decoder level and a head as torchvision's nets have them."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.body, self.body_norm = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(16, 5, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        a = F.relu(self.stem_norm(self.stem(x)), inplace=True)
        b = self.body_norm(self.body(a))
        b += a
        b = F.relu_(b)
        up = F.interpolate(F.max_pool2d(b, 2), size=b.shape[2:], mode="bilinear", align_corners=False)
        y = self.head(self.drop(torch.cat([up, b], 1))) * scale
        return {"out": F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)}


def net() -> nn.Module:
    return unsettle(Net()).double().train()


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (1, 3, 24, 32)), dtype=torch.float64)


def plain(model: nn.Module, *args, **kwargs):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(*args, **kwargs)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10 * want.abs().max().item())


@pytest.fixture(scope="module")
def free():
    model = net()
    return model, fastseg.optimize(model, image())


def test_sizes_are_free(free):
    model, fast = free
    assert not fast.notes and model.training
    for shape in ((1, 3, 24, 32), (3, 3, 24, 32), (2, 3, 17, 40), (1, 3, 41, 47)):
        x = image(*shape)
        assert fast.why_not(x) == "" and list(fast(x)) == ["out"]
        close(fast(x)["out"], plain(model, x)["out"])
        assert torch.equal(fast.predict(x), plain(model, x)["out"].argmax(1).byte())


def test_other_calls_run_the_model(free):
    model, fast = free
    x = image()
    close(fast(x, 3.0)["out"], plain(model, x, 3.0)["out"])
    close(fast(x, scale=3.0)["out"], plain(model, x, scale=3.0)["out"])
    close(fast(x=x)["out"], plain(model, x)["out"])
    assert fast.why_not(x, 3.0) == "other arguments than the example's"
    assert "torch.float32" in fast.why_not(x.float())
    wanted = x.clone().requires_grad_()
    fast(wanted)["out"].sum().backward()
    assert wanted.grad is not None


def test_classes_of_a_resize_by_a_factor():
    """Its size is the image's where that is even, and not elsewhere: predict looks."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.UpsamplingBilinear2d(scale_factor=2)).double()
    fast = fastseg.optimize(model, image())
    assert fast.classes is not None
    for x in (image(2, 3, 16, 32), image(1, 3, 17, 32)):
        assert fast.why_not(x) == "" and torch.equal(fast.predict(x), fastseg.predict(model, x))


def test_it_exports(free):
    """An exporter starts from the fused graph; a call inside it is torch's own."""
    model, fast = free
    x = image(2, 3, 24, 32)
    program = torch.export.export(fast, (x,), strict=False)
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    close(program.module()(x)["out"], plain(model, x)["out"])


def test_explain_counts(free):
    _, fast = free
    rows = {row.name: row for row in fast.rows}
    assert len(rows["fold norms"].matches) == 2
    assert rows["fold norms"].after.launches == rows["fold norms"].before.launches - 4  # each norm is 2 ops
    assert "fold norms" in fast.explain() and "launches" in fast.explain()


def test_changed_weights_are_noticed():
    model, x = net(), image()
    fast = fastseg.optimize(model, x, **GIVEN)
    before = fast(x)["out"]
    assert not fast.stale()
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert fast.stale() and torch.equal(fast(x)["out"], before)
    assert "the graph is of 24" in fast.why_not(image(1, 3, 26, 32))
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        close(other(x)["out"], before)


class Branching(nn.Module):
    """What it computes depends on values."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


class Watched(Branching):
    def forward(self, x):
        return self.conv(x)


def test_what_cannot_be_traced_runs_as_it_is(capsys):
    model, x = Branching(), torch.rand(1, 3, 4, 5)
    fast = fastseg.optimize(model, x)
    assert capsys.readouterr() == ("", "")  # torch.export shows the graph of a failure on stderr
    assert "runs as it is" in fast.explain() and "free sizes" in fast.explain() and fast.fused is None
    for y in (x, -x):
        assert torch.equal(fast(y), plain(model, y))
        assert torch.equal(fast.predict(y), plain(model, y).argmax(1).byte())
        torch.testing.assert_close(Runner(model, x)(y), plain(model, y))


def test_hooks_are_called():
    model, x, seen = Watched(), torch.rand(1, 3, 4, 5), []
    model.conv.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    fast = fastseg.optimize(model, x)
    assert "conv has hooks" in fast.explain()
    fast(x)
    assert len(seen) == 1


def test_hooks_on_all_modules_are_called():
    """As profilers put them there, for a while: a graph calls no module."""
    model, x, seen = Watched(), torch.rand(1, 3, 4, 5), []
    fast, runner = fastseg.optimize(model, x), Runner(model, x)
    want = plain(model, x)
    on_convolutions = lambda module, args, out: seen.append(out.shape) if type(module) is torch.nn.Conv2d else None
    hook = torch.nn.modules.module.register_module_forward_hook(on_convolutions)
    try:
        for made in (fast, runner, fastseg.optimize(model, x)):
            for _ in range(2):
                torch.testing.assert_close(made(x), want)
        assert len(seen) == 3 * 2
    finally:
        hook.remove()
    fast(x), runner(x)
    assert len(seen) == 3 * 2


def test_errors():
    with pytest.raises(TypeError, match="model is a function"):
        fastseg.optimize(lambda x: x, image())
    with pytest.raises(TypeError, match="example must be a tensor or a tuple of tensors"):
        fastseg.optimize(net(), [1])
    with pytest.raises(ValueError, match="sizes is 'any'"):
        fastseg.optimize(net(), image(), sizes="any")


def test_a_runner_takes_the_graph():
    model, x = net(), image()
    runner = Runner(model, x)
    assert "fold norms" in runner.explain()
    close(runner(x)["out"], plain(model, x)["out"])
    other = image(2, 3, 40, 24)
    for _ in range(3):  # as it is, then from a graph
        close(runner(other)["out"], plain(model, other)["out"])
        assert torch.equal(runner.predict(other), plain(model, other)["out"].argmax(1))
    assert len(runner._state.shapes) == 2
    with torch.no_grad():
        model.head.weight.mul_(2)
    for shapes in (0, 1):  # a model that is being written to is not traced at each write
        close(runner(x)["out"], plain(model, x)["out"])
        assert len(runner._state.shapes) == shapes


def test_winograd_is_exact_no_more():
    with pytest.warns(DeprecationWarning, match="give exact=True"):
        assert Runner(net(), image(), winograd=False).exact


@pytest.mark.parametrize(
    "name, options",
    [
        ("fcn", {"backbone": "resnet18", "stride": 8, "width": 0.25}),
        ("unet", {"widths": (4, 8), "padding": "same"}),
        pytest.param("deeplabv3plus", {"backbone": "mobilenet_v2"}, marks=pytest.mark.long),
    ],
)
def test_models_of_the_library(name, options):
    model, x = unsettle(create(name, 5, **options)).double().eval(), image(1, 3, 32, 64)
    fast = fastseg.optimize(model, x, **GIVEN)
    assert fast.fused is not None and any(row.matches for row in fast.rows)
    close(fast(x), plain(model, x))
    assert torch.equal(fast.predict(x), model.predict(x))


@pytest.mark.parametrize("name", ["fpn", "segformer", "deeplabv3plus"])
def test_smp(name):
    keeps_values(smp_net(name), {"fold norms", "resize + concat + convolution", "convolution + residual + activation"})


def test_hugging_face():
    keeps_values(hf_segformer(), {"linear over tokens", "compose pointwise", "resize + concat + convolution"})


def keeps_values(model, passes) -> None:
    """Every output, in the model's own structure, with these passes among others."""
    x = image(1, 3, 64, 64)
    fast = fastseg.optimize(model, x, **GIVEN)
    assert passes <= {row.name for row in fast.rows if row.matches} and fast.why_not(x) == ""
    want = plain(model, x)
    assert type(fast(x)) is type(want)
    for a, b in zip(outputs(fast(x)), outputs(want), strict=True):
        close(a, b)


def test_the_gate():
    gate, inside, seen = Gate(), [], []

    def call() -> None:
        with gate:
            inside.append(1)
            seen.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=call) for _ in range(4)]
    with gate.alone():
        for thread in threads:
            thread.start()
        threads[0].join(0.05)
        assert not seen  # they wait
    for thread in threads:
        thread.join()
    assert len(seen) == 4
