"""What is kept where, and for how long: fastseg.frozen, a Runner's copy, caches of tensors; and any model's classes."""

import copy
import gc
import pickle
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import unsettle
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastseg
from fastseg.inference import Predictor, Runner, class_map
from fastseg.io.images import MEAN, STD, normalised
from fastseg.nn import ConvNormAct2d
from fastseg.nn.fuse.conv_norm_act import folded, run_conv_norm_act
from fastseg.nn.fuse.separable import run_separable
from fastseg.ops import upsample_concat_conv2d
from fastseg.ops.bilinear_conv_transpose import bilinear_conv_transpose2d
from fastseg.ops.core import kept as _kept
from fastseg.ops.core.constants import constant
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.core.marks import Marks
from fastseg.ops.cpu.winograd import blocks as winograd_blocks
from fastseg.ops.registered.upsample_taps import strips

pytestmark = pytest.mark.skipif(INTERPRETED, reason="minutes; tests/nn and tests/models have the kernels' path")


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def block() -> ConvNormAct2d:
    return unsettle(ConvNormAct2d(3, 4)).float().eval()


def weight_of(x: torch.Tensor, module: ConvNormAct2d) -> torch.Tensor:
    return folded(x, module.conv, module.norm)[0]


def children(module: ConvNormAct2d, x: torch.Tensor) -> torch.Tensor:
    return module.norm(module.conv(x)).relu()


def close(got, want, atol=1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol * max(1, want.abs().max().item()))


# --- fastseg.frozen


def test_kept_inside_and_dropped_after():
    a, b, x = block(), block(), torch.randn(1, 3, 8, 8)
    assert weight_of(x, a) is not weight_of(x, a)
    with fastseg.frozen(a):
        inside = weight_of(x, a)
        assert weight_of(x, a) is inside and weight_of(x, b) is not weight_of(x, b)
        with fastseg.frozen(b):
            assert weight_of(x, b) is weight_of(x, b) and weight_of(x, a) is inside
        assert weight_of(x, b) is not weight_of(x, b) and weight_of(x, a) is inside
    with fastseg.frozen(a, b):
        assert weight_of(x, a) is weight_of(x, a) is not inside and weight_of(x, b) is weight_of(x, b)
    gone = weakref.ref(inside)
    del inside
    gc.collect()
    assert gone() is None and _kept.keepers.get() == ()
    with pytest.raises(ZeroDivisionError), fastseg.frozen(a):
        raise ZeroDivisionError
    assert _kept.keepers.get() == ()
    with pytest.raises(TypeError, match=r"frozen: list is not a torch\.nn\.Module"), fastseg.frozen([a]):
        pass


def test_of_one_thread():
    module, x, seen = block(), torch.randn(1, 3, 8, 8), []

    def work():
        seen.append(weight_of(x, module) is weight_of(x, module))
        with fastseg.frozen(module):
            seen.append(weight_of(x, module) is weight_of(x, module))

    with fastseg.frozen(module):
        weight = weight_of(x, module)
        thread = threading.Thread(target=work)
        thread.start(), thread.join()
        assert seen == [False, True] and weight_of(x, module) is weight


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.conv.weight.mul_(2),
        lambda m: setattr(m.conv.weight, "data", m.conv.weight * 2),
        lambda m: setattr(m.norm, "eps", 0.5),
        lambda m: setattr(m.conv, "bias", nn.Parameter(torch.ones(4))),
        lambda m: m.half().float().norm.running_var.mul_(3),
    ],
)
def test_what_is_counted_is_noticed_inside(change):
    module, x = block(), torch.randn(1, 3, 8, 8)
    with fastseg.frozen(module):
        module(x)
        for _ in range(2):
            change(module)
            close(module(x), children(module, x))


def test_modes_are_not_kept():
    module, x = block(), torch.randn(1, 3, 8, 8)
    with fastseg.frozen(module):
        with torch.inference_mode():
            close(module(x), children(module, x))
        with FakeTensorMode(allow_non_fake_inputs=True):
            module(x)
        torch.func.vmap(module)(torch.randn(2, 1, 3, 8, 8))
        close(module(x), children(module, x))
        with torch.enable_grad():
            module(x).sum().backward()
        assert module.norm.weight.grad is not None


def test_an_ensembles_norms():
    """vmap over weights and norms, as functional ensembles do, with nothing that only whole tensors know."""
    modules = [fastseg.nn.SeparableConv2d(3, 4, mid_norm=True) for _ in range(2)]
    modules, x = [unsettle(module).float().eval() for module in modules], torch.randn(1, 3, 6, 6)
    params, buffers = torch.func.stack_module_state(modules)
    call = lambda p, b: torch.func.functional_call(modules[0], (p, b), (x,))
    got = torch.func.vmap(call)(params, buffers)
    close(got, torch.stack([module(x) for module in modules]))


# --- caches of tensors


HELPERS = {
    "strips": lambda x: strips(4, 16, False, torch.float32, 8)[1].weights,
    "blocks": lambda x: winograd_blocks(16, 16, (2, 2))[0].down(x[0].flatten(1).T.contiguous()[:160]),
    "concat": lambda x: upsample_concat_conv2d(
        x[:, :, :4, :4], x[:, :, :16, :16], x[:, :, 0, 0].view(1, 64, 1, 1).expand(8, 64, 3, 3).repeat(1, 2, 1, 1)
    ),
    "two passes": lambda x: bilinear_conv_transpose2d(x[:, :8, :3, :3], 8),
    "pixels": lambda x: normalised(255 * x[:, :3].sigmoid()),
    "classes": lambda x: fastseg.ops.upsample_argmax(x[:, :5], scale_factor=3).float(),
    "loss": lambda x: fastseg.ops.upsample_cross_entropy(x[:, :5, :4, :4], torch.ones(1, 8, 8).long()),
}


@pytest.mark.parametrize("name", HELPERS)
def test_helper_tensors_are_of_no_mode(name):
    """Made first where tensors are others: that call is right, and those after it."""
    run, x = HELPERS[name], torch.randn(1, 64, 16, 16)
    _constants_forgotten()
    want = run(x)
    ones = torch.ones
    for mode in (torch.inference_mode, lambda: torch.device("meta")):
        _constants_forgotten()
        with mode(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "ones", lambda *size: ones(*size, device="cpu"))  # of this test, not of the library
            assert torch.equal(run(x), want)
        assert torch.equal(run(x), want)
        with torch.enable_grad():
            torch.testing.assert_close(run(x.clone().requires_grad_()).detach(), want)


def _constants_forgotten() -> None:
    from fastseg.ops.cpu import bilinear_taps as _bilinear_taps
    from fastseg.ops.cpu import winograd as _winograd
    from fastseg.ops.registered import upsample_taps as _upsample_taps

    for made in (_bilinear_taps.kept_taps, _upsample_taps.strips, _winograd.blocks, _winograd.matrices):
        made.cache_clear()


def test_a_constant_is_an_ordinary_tensor():
    made = constant()(lambda n: torch.arange(n) + 0.5)
    with FakeTensorMode(), torch.device("meta"), torch.inference_mode():
        got = made(3)
    assert type(got) is torch.Tensor and not got.is_inference() and got.tolist() == [0.5, 1.5, 2.5] and made(3) is got


def test_pixels_are_normalised():
    x = torch.rand(2, 3, 4, 5) * 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    torch.testing.assert_close(normalised(x), (x / 255 - mean) / std)
    with FakeTensorMode():
        normalised(torch.empty(1, 3, 4, 4))
    torch.testing.assert_close(normalised(x), (x / 255 - mean) / std)


# --- a Runner


class Film(nn.Module):
    """A norm's weight, and the statistics, that forward computes."""

    def __init__(self):
        super().__init__()
        self.depthwise, self.pointwise = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.bias_of = nn.Linear(4, 4)

    def forward(self, x):
        pooled = x.mean((0, 2, 3))
        norm = nn.BatchNorm2d(4, device=x.device).eval()
        norm.weight, norm.bias = nn.Parameter(self.bias_of(pooled)), nn.Parameter(pooled)
        norm.running_mean, norm.running_var = pooled, x.var((0, 2, 3))
        y = run_separable(x, self.depthwise, norm, "relu", self.pointwise, self.norm, None)
        conv = nn.Conv2d(4, 4, 1)
        conv.weight, conv.bias = self.pointwise.weight, nn.Parameter(pooled)
        return run_conv_norm_act(y, conv, self.norm, "relu")


def test_what_forward_computes_is_not_kept():
    model = Film().eval()
    runner = Runner(model, torch.randn(1, 4, 6, 6))
    for i in range(40):
        x = torch.randn(1, 4, 6, 6) * (1 + i % 3)
        close(runner(x), model(x))
    state = runner._state
    assert len(state.kept._made) <= 4 and all(len(packs._runs) <= 4 for packs in state.packs.values())


@pytest.mark.parametrize("first", [True, False], ids=["made inside", "made outside"])
@pytest.mark.parametrize("graphs", [True, False], ids=["captured", "plain"])
def test_in_and_out_of_inference_mode(first, graphs, monkeypatch):
    from fastseg.inference import runner as module

    if graphs:
        nothing = SimpleNamespace(wait_event=lambda e: 0, record=lambda s: 0, synchronize=lambda: 0)
        monkeypatch.setattr(module, "captures", lambda x: True)
        monkeypatch.setattr(module, "captured", lambda function, pool: function)
        for name in ("current_stream", "Event", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, lambda: nothing)
    model, x, wide = block(), torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 12)
    with torch.inference_mode(first):
        runner = Runner(model, x)
    for inside in (not first, first, not first):
        with torch.inference_mode(inside):
            for v in (x, wide, wide.clone()):
                y = runner(v)
                close(y, children(model, v))
        assert not y.is_inference()


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model, x = block(), torch.randn(1, 3, 8, 8)
        runner = Runner(model, x)
        state = {name: v * 1.5 for name, v in model.state_dict().items()}
        model.load_state_dict(state)
        close(runner(x), children(model, x))
        model.conv.weight[3, 2, 2, 2] += 1
        close(runner(x), children(model, x))
        kept = runner._state
        runner(x)
        assert runner._state is kept


def test_samples_and_values():
    """One number in the middle of a large tensor that was written to past the count: "values" sees it."""
    model, x = nn.Conv2d(300, 300, 3, padding=1, bias=False), torch.randn(1, 300, 4, 4)
    for check, seen in (("values", True), ("samples", False), ("counts", False)):
        runner, before = Runner(model, x, check=check), model(x)
        model.weight.data[77, 77, 1, 1] += 50
        want = model(x)
        got = runner(x)
        assert (want - before).abs().max() > 1
        close(got, want if seen else before, 1e-4)
        runner.refresh()
        close(runner(x), want, 1e-4)
    small = block()
    runner = Runner(small, x[:, :3])
    small.conv.weight.data[2, 1, 1, 1] += 1
    close(runner(x[:, :3]), children(small, x[:, :3]))  # whole, up to 1 MiB


class Odd(nn.Module):
    """Options of all sorts."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.gains, self.table, self.shift, self.names = [1.0, 1.0], {"a": 1.0}, torch.zeros(1), ("a", ["b"])
        self.act, self.array = F.relu, np.ones(3, np.float32)

    def forward(self, x):
        return (
            self.act(self.conv(x)) * self.gains[1] * self.table["a"] + self.shift + torch.from_numpy(self.array).sum()
        )


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.gains.__setitem__(1, 2.0),
        lambda m: m.table.update(a=2.0),
        lambda m: m.shift.add_(1),
        lambda m: setattr(m, "shift", torch.full((1,), 3.0)),
        lambda m: setattr(m, "act", F.silu),
        lambda m: setattr(m, "array", np.full(3, 2, np.float32)),
        lambda m: setattr(m, "forward", lambda x: x * 5),
        lambda m: setattr(m, "conv", nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())),
        lambda m: m.conv.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        lambda m: setattr(m.conv, "__class__", type("Other", (nn.Conv2d,), {"forward": lambda self, x: x})),
        lambda m: m.conv.register_parameter("bias", None),
    ],
)
def test_options_are_noticed(change):
    model, x = Odd().eval(), torch.randn(1, 3, 4, 4)
    runner, before = Runner(model, x), model(x)
    model.train().eval()
    state = runner._state
    close(runner(x), before)
    assert runner._state is state  # a change of mode is none: the copy is in evaluation
    change(model)
    close(runner(x), model(x))
    assert (model(x) - before).abs().max() > 1e-2
    state = runner._state
    runner(x)
    assert runner._state is state


def test_pickles_and_copies():
    model, x = block(), torch.randn(1, 3, 8, 8)
    runner = Runner(model, x, exact=True, check="values")
    for other in (copy.deepcopy(runner), pickle.loads(pickle.dumps(runner))):
        assert torch.equal(other(x), runner(x)) and other.check == "values" and other.exact
        other.model.conv.weight.data.mul_(2)
        close(other(x), children(other.model, x))
        close(runner(x), children(model, x))


def test_out():
    model, x = block(), torch.randn(1, 3, 8, 8)
    runner, out = Runner(model, x), torch.empty(1, 4, 8, 8)
    assert runner(x, out=out) is out and torch.equal(out, runner(x))


def test_marks_hold_the_memory():
    """A block that was freed is not given out again while a mark knows its address."""
    p = nn.Parameter(torch.zeros(1000))
    model = nn.ParameterList([p])
    marks = Marks(model, "counts")
    for _ in range(5):
        p.data = torch.ones(1000)
        assert not marks.are_current()


# --- class maps of any model


class Giver(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.conv, self.give = nn.Conv2d(3, 5, 1), give

    def forward(self, x):
        return self.give(self.conv(x))

    def predict(self, x):  # as segmentation_models_pytorch's, which gives logits
        return self(x)


@pytest.mark.parametrize(
    "give",
    [
        lambda y: y,
        lambda y: {"out": y, "aux": -y},
        lambda y: SimpleNamespace(logits=y[:, :, ::4, ::4]),
        lambda y: {"logits": y[:, :, ::2, ::2]},
        lambda y: (y, -y),
    ],
    ids=["tensor", "torchvision", "transformers", "mapping", "several"],
)
def test_classes_of_any_model(give):
    model, pixels = Giver(give).eval(), np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    x = fastseg.io.images.to_tensor(pixels)
    logits = give(model.conv(x))
    logits = logits if isinstance(logits, torch.Tensor) else getattr(logits, "logits", None)
    if logits is None:
        out = give(model.conv(x))
        logits = out[0] if isinstance(out, tuple) else out.get("out", out.get("logits"))
    want = F.interpolate(logits, x.shape[2:], mode="bilinear").argmax(1)
    for got in (
        class_map(model, x),
        Runner(model, x).predict(x),
        torch.from_numpy(Predictor(model, device="cpu")({"image": pixels})["classes"]),
    ):
        assert got.shape == (2, 16, 24) and got.dtype == torch.uint8 and (got != want).float().mean() < 0.01
    with pytest.raises(TypeError, match="Giver returns no logits"):
        class_map(Giver(lambda y: y.mean()), x)
