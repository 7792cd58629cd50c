"""ConvNormAct2d against its children one after another: folding, refolding, gradients, graphs, repr."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseg
from fastseg.nn import ConvNormAct2d

FORMS = {
    "default": {},
    "bias, relu6": {"bias": True, "act": "relu6"},
    "no norm": {"norm": False, "act": "leaky_relu"},
    "strided, grouped": {"stride": 2, "dilation": 2, "groups": 2},
    "1x3, no act": {"kernel_size": (1, 3), "act": None},
}
ACTS = {None: lambda x: x, "relu": F.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu}


def build(**options) -> ConvNormAct2d:
    """fp64; a norm that is not the identity."""
    module = ConvNormAct2d(4, 6, **options, dtype=torch.float64)
    if module.norm is not None:
        for t in (module.norm.weight, module.norm.bias, module.norm.running_mean):
            nn.init.normal_(t.data, std=0.5)
        nn.init.uniform_(module.norm.running_var, 0.5, 2)
    return module


def plain(module: ConvNormAct2d, x: Tensor) -> Tensor:
    y = module.conv(x)
    return ACTS[module.act](y if module.norm is None else module.norm(y))


def image() -> Tensor:
    return torch.randn(2, 4, 7, 5, dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_its_children(form, training):
    module = build(**FORMS[form]).train(training)
    twin, x = copy.deepcopy(module), image().requires_grad_()
    got, want = module(x), plain(twin, x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(want)
    ours = torch.autograd.grad(got, [x, *module.parameters()], upstream)
    theirs = torch.autograd.grad(want, [x, *twin.parameters()], upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(module(x), plain(twin, x), rtol=1e-12, atol=1e-12)


def test_defaults():
    """Same size at stride 1; a bias only where no norm follows; torch's children and their names."""
    module = ConvNormAct2d(4, 6, dilation=3)
    assert module(torch.randn(2, 4, 9, 8)).shape == (2, 6, 9, 8)
    assert type(module.conv) is nn.Conv2d and type(module.norm) is nn.BatchNorm2d and module.conv.bias is None
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert list(module.state_dict()) == ["conv.weight", *(f"norm.{part}" for part in norm)]
    assert list(ConvNormAct2d(4, 6, norm=False).state_dict()) == ["conv.weight", "conv.bias"]
    assert "Conv2d(4, 6" in repr(module) and "act='relu'" in repr(module)
    half = ConvNormAct2d(4, 6, eps=1e-3, momentum=None, device="meta", dtype=torch.float16)
    assert {t.dtype for t in half.parameters()} == {torch.float16} and half.conv.weight.is_meta
    assert (half.norm.eps, half.norm.momentum) == (1e-3, None)
    with pytest.raises(ValueError, match=r"ConvNormAct2d: act is 'gelu'"):
        ConvNormAct2d(4, 6, act="gelu")


def trained_once(module: ConvNormAct2d) -> None:
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    with torch.enable_grad():
        module.train()(image()).square().sum().backward()
    optimizer.step()
    module.eval()


CHANGES = {
    "load_state_dict": lambda m: m.load_state_dict(build().state_dict()),
    "load_state_dict, assigned": lambda m: m.load_state_dict(build().state_dict(), assign=True),
    "weight in place": lambda m: m.conv.weight.mul_(2),
    "norm weight in place": lambda m: m.norm.weight.neg_(),
    "norm bias in place": lambda m: m.norm.bias.add_(1),
    "mean in place": lambda m: m.norm.running_mean.add_(1),
    "variance in place": lambda m: m.norm.running_var.mul_(4),
    "new parameter": lambda m: setattr(m.conv, "weight", nn.Parameter(torch.randn_like(m.conv.weight))),
    "new bias": lambda m: setattr(m.conv, "bias", nn.Parameter(torch.randn(6, dtype=torch.float64))),
    "reset": lambda m: m.norm.reset_running_stats(),
    "a training step": trained_once,
    "statistics only": lambda m: (m.train()(image()), m.eval()),
    "through data": lambda m: m.conv.weight.data.mul_(1.5),
    "other memory": lambda m: setattr(m.conv.weight, "data", m.conv.weight.data * 1.5),
    "eps": lambda m: setattr(m.norm, "eps", 0.5),
    "half and back": lambda m: m.half().double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_outlives_a_change(change):
    module, x = build().eval(), image()
    with torch.no_grad():
        before = module(x)
        CHANGES[change](module)
        after = module(x)
        torch.testing.assert_close(after, plain(module, x), rtol=1e-10, atol=1e-10)
        assert not torch.equal(after, before)


def test_folding_changes_nothing_that_can_be_seen():
    module, x = build().eval(), image()
    state = copy.deepcopy(module.state_dict())
    size = len(pickle.dumps(module))
    with torch.no_grad():
        want = module(x)
        for layout in (torch.channels_last, torch.contiguous_format):
            y = module.to(memory_format=layout)(x.contiguous(memory_format=layout))
            assert y.is_contiguous(memory_format=layout)
            torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert len(pickle.dumps(module)) == size  # what was folded does not travel
    with torch.no_grad():
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(x), module(x))
            twin.conv.weight.zero_()
            assert not torch.equal(twin(x), want)
            torch.testing.assert_close(module(x), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision(dtype):
    """After half() and under autocast: as far from fp64 as one rounding of input, weight and output explains."""
    module, x = build().eval(), image()
    exact = plain(module, x)
    eps = torch.finfo(dtype).eps
    with torch.no_grad():
        got = copy.deepcopy(module).to(dtype)(x.to(dtype))
        with torch.autocast("cpu", dtype):
            cast = module.float()(x.float())
    for y in (got, cast):
        assert y.dtype == dtype
        assert (y.double() - exact).norm() < 2 * eps * exact.norm()


@pytest.mark.parametrize("norm", [True, False])
def test_transforms(norm):
    """vmap and forward-mode AD see the children."""
    module, x = build(norm=norm).eval(), image()
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(module)(x[None])[0], plain(module, x))
        y, tangent = torch.func.jvp(module, (x,), (torch.ones_like(x),))
        step = (plain(module, x + 1e-6) - plain(module, x - 1e-6)) / 2e-6
    torch.testing.assert_close(y, plain(module, x))
    torch.testing.assert_close(tangent, step, rtol=1e-4, atol=1e-6)


def test_paths_are_recorded_and_children_are_respected():
    module, x = build().eval(), image()
    with torch.no_grad(), fastseg.explain() as report:
        module(x)
    assert [(d.op, d.path, d.why) for d in report] == [("conv2d_act", "reference", "CPU tensor")]
    seen = []
    module.conv.register_forward_hook(lambda *_: seen.append(1))
    module.norm = nn.GroupNorm(2, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module(x), plain(module, x))
    assert len(seen) == 2


def test_each_dtype_is_folded_for_itself():
    module = build().float().eval()
    x = image().float()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(module(x), plain(module, x), rtol=1e-5, atol=1e-5)
            with torch.autocast("cpu", torch.bfloat16):
                y = module(x)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y.float(), plain(module, x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("alone", [True, False], ids=["the norm alone", "the module"])
def test_statistics_of_training_reach_the_next_evaluation(alone, counted):
    """torch's batch norm writes them without counting the write; ``num_batches_tracked`` may be None."""
    module, x = build().eval(), image()
    if not counted:
        module.norm.num_batches_tracked = None
    with torch.no_grad():
        before = module(x)
        if alone and counted:
            module.norm.train()(module.conv(image()) + 3)
        else:
            module.train()(image() + 3)
        after = module.eval()(x)
        torch.testing.assert_close(after, plain(module, x), rtol=1e-10, atol=1e-10)
    assert not torch.equal(after, before)
