"""How a module gets another forward: what stays, what is refused, what is put back, and that all of it is undone."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseg
from fastseg.converting import classes, in_place, known
from fastseg.converting.rule import Rule
from fastseg.ops.core.dispatch import INTERPRETED


class Up(nn.Module):
    """A class of somebody's: bilinear doubling beside a skip, two convolutions."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv = DoubleConv(2 * channels, channels)

    def forward(self, x1, x2):
        x = torch.cat([x2, self.up(x1)], dim=1)
        return self.conv(x)


class DoubleConv(nn.Module):
    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x):
        return self.double_conv(x)


class Net(nn.Module):
    def __init__(self, channels: int = 8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.down = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU())
        self.up = Up(channels)
        self.head = nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        return self.head(self.up(self.down(fine), fine))


X = torch.linspace(-1, 1, 3 * 16 * 16, dtype=torch.float64).mul(7).sin().view(1, 3, 16, 16)


def net() -> Net:
    model = Net().double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return model.eval()


def gradients(model: nn.Module, x: Tensor = X) -> list[Tensor]:
    model.zero_grad()
    model(x).sin().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def close(a, b) -> None:
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)


def test_the_same_model_to_whoever_looks():
    model = net()
    want, before, parts = model(X), list(model.state_dict()), list(model.modules())
    parameters = [id(p) for p in model.parameters()]
    text = repr(model)
    assert fastseg.convert(model, X) is model
    assert [row.module for row in fastseg.conversion(model).converted] == ["stem", "up"]
    assert list(model.state_dict()) == before and [id(p) for p in model.parameters()] == parameters
    assert all(a is b for a, b in zip(model.modules(), parts, strict=True)) and repr(model) == text
    assert type(model.up) is not Up and isinstance(model.up, Up) and isinstance(model.stem, nn.Sequential)
    assert model.stem[1].num_features == 8 and len(model.stem[:2]) == 2
    close([model(X)], [want])
    with torch.no_grad():
        close([model(X)], [want])
    restored = Net().double().eval()
    restored.load_state_dict(model.state_dict())  # by the original's code
    close([restored(X)], [want])


def test_revert_gives_back_the_very_same_modules():
    model = net()
    kinds, attributes = [type(m) for m in model.modules()], [dict(vars(m)) for m in model.modules()]
    fastseg.revert(fastseg.convert(model, X))
    assert [type(m) for m in model.modules()] == kinds
    assert [vars(m).keys() for m in model.modules()] == [a.keys() for a in attributes]
    assert len(fastseg.conversion(model)) == 0


def test_it_trains_as_before():
    model, plain = net(), None
    plain = copy.deepcopy(model)
    fastseg.convert(model, X)
    for mode in (False, True):
        close(gradients(model.train(mode)), gradients(plain.train(mode)))
    for p, q in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(p, q)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    for optimizer in optimizers:
        optimizer.step()
    close([model(X)], [plain(X)])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_autocast_keeps_its_dtypes(kind):
    model, x = net().float(), X.float()
    plain = copy.deepcopy(model)
    fastseg.convert(model, x)
    with torch.autocast("cpu", kind):
        a, b = model(x), plain(x)
        a.float().sum().backward()
    assert a.dtype == b.dtype and (a - b).abs().max() < 0.05 * b.abs().max()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: pickle.loads(pickle.dumps(m, protocol=0)),
    ],
    ids=["deepcopy", "pickle", "protocol 0"],
)  # fmt: skip
def test_copies_are_converted_and_compute_with_their_own_weights(copied):
    model = fastseg.convert(net(), X)
    other = copied(model)
    assert type(other.up) is type(model.up) and isinstance(other.up, Up)
    assert [row.module for row in fastseg.conversion(other).converted] == ["stem", "up"]
    close([other(X)], [model(X)])
    with torch.no_grad():
        other.stem[0].weight.zero_()
    assert (other(X) - model(X)).abs().max() > 1e-3
    fastseg.revert(other)
    assert type(other.up) is Up and type(model.up) is not Up


def test_a_shallow_copy_computes_with_its_own_weights():
    """As ``nn.DataParallel`` replicates modules: the instance's ``__dict__`` is copied, then its tensors exchanged."""
    model = fastseg.convert(net(), X)
    replica = copy.copy(model.stem)
    replica._modules = {name: copy.copy(m) for name, m in model.stem._modules.items()}
    replica[0]._parameters = {"weight": torch.zeros_like(model.stem[0].weight), "bias": None}
    assert (replica(X) - model.stem(X)).abs().max() > 1e-3


def test_what_only_fuses_runs_as_written_on_a_cpu_unless_it_folds_once(monkeypatch):
    calls = []
    run = classes.RULES["sequential"].run
    rule = dataclasses.replace(classes.RULES["sequential"], run=lambda *a: calls.append(1) or run(*a))
    monkeypatch.setattr(in_place, "RULES", {"sequential": rule})
    model = fastseg.convert(net(), only="stem")
    large = torch.randn(1, 3, 160, 160, dtype=X.dtype)
    with torch.no_grad():
        want = model(large)
        assert len(calls) == INTERPRETED
        calls.clear()
        with fastseg.frozen(model):
            close([model(large)], [want])
            assert calls == [1]
            model(X)  # of few pixels: the block's Python costs more than the pass that it saves
            assert len(calls) == 1 + INTERPRETED


def test_reference_and_fx_see_the_original():
    model = fastseg.convert(net(), X)
    with fastseg.reference():
        want = model(X)
    close([model(X)], [want])
    graph = torch.fx.symbolic_trace(model)
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert "stem.1" in called and "up.conv.double_conv.3" in called
    close([graph(X)], [want])


def test_hooks_on_a_block_run_and_hooks_inside_it_stop_the_fusion():
    model, seen = fastseg.convert(net(), X), []
    model.stem.register_forward_hook(lambda m, args, out: seen.append("block"))
    want = model(X)
    model.stem[1].register_forward_pre_hook(lambda m, args: seen.append("norm"))
    close([model(X)], [want])
    assert seen == ["block", "norm", "block"]


def test_what_changed_after_the_conversion_is_called_as_it_is():
    model = fastseg.convert(net(), X)
    model.up.up = nn.Upsample(scale_factor=2, mode="nearest")
    model.stem[1] = nn.InstanceNorm2d(8)
    plain = copy.deepcopy(model)
    close([model(X)], [fastseg.revert(plain)(X)])


def test_the_report_is_a_table_with_products_and_bytes():
    model = fastseg.convert(net(), X)
    stem, up = fastseg.conversion(model)
    assert stem.products == (27 * 8 * 256, 27 * 8 * 256) and stem.rule == "sequential" and stem.kind == "Sequential"
    assert up.bytes[1] < up.bytes[0] and 0 <= up.error < 1e-12
    lines = str(fastseg.conversion(model)).splitlines()
    assert len(lines) == 3 and lines[0].split()[:3] == ["module", "class", "rule"] and lines[2].startswith("up ")


def test_filters_by_name_pattern_and_class():
    names = lambda **f: [row.module for row in fastseg.conversion(fastseg.convert(net(), X, **f)).converted]
    assert names(only="stem") == ["stem"] and names(only=Up) == ["up"] and names(only="Up") == ["up"]
    assert names(only=["st*", "up"]) == ["stem", "up"]
    assert names(skip="stem") == ["up"] and names(skip=[Up, "stem"]) == []
    assert names(only="down") == []
    for label in ("only", "skip"):
        with pytest.raises(ValueError, match=f"{label} names 'decoder'"):
            fastseg.convert(net(), X, **{label: "decoder"})


def test_inside_a_skipped_block_nothing_is_touched_and_a_part_that_is_skipped_keeps_its_block():
    model = fastseg.convert(net(), X, skip="up.conv.double_conv")
    assert [row.module for row in fastseg.conversion(model).converted] == ["stem"]
    assert "among those to skip" in fastseg.conversion(model).left[0].why


def test_a_second_conversion_keeps_the_first():
    model = fastseg.convert(net(), X, only="stem")
    fastseg.convert(model, X)
    assert [row.module for row in fastseg.conversion(model).converted] == ["stem", "up"]
    close([model(X)], [fastseg.revert(copy.deepcopy(model))(X)])


# --- what is left alone, with the reason


def left(model: nn.Module, example=None) -> str:
    want = {name: type(m) for name, m in model.named_modules()}
    report = fastseg.conversion(fastseg.convert(model, example))
    assert report.converted == [] and {name: type(m) for name, m in model.named_modules()} == want
    assert "nothing was converted" in str(report)
    return "; ".join(row.why for row in report.left)


def test_a_model_with_nothing_to_convert():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert left(model) == "" and left(model, torch.ones(1, 3)) == ""
    with pytest.raises(TypeError, match="dict is not"):
        fastseg.convert({})


def test_a_version_of_a_class_that_no_rule_was_written_for_needs_an_example():
    """``Up.forward`` here is not the repository's text, though it computes the same."""
    model = net()
    fastseg.convert(model)
    assert type(model.up) is Up
    assert [row.why for row in fastseg.conversion(model).left] == [
        "Up.forward is not a version that the rule knows; give an example"
    ]


def test_a_class_of_the_same_name_that_computes_something_else_is_put_back():
    class Other(Up):
        pass

    Other.__name__ = Other.__qualname__ = "Up"
    Other.forward = lambda self, x1, x2: self.conv(torch.cat([x2, self.up(x1) * 1.0000001], 1))
    Other.forward.__qualname__ = "Up.forward"
    model = net()
    model.up.__class__ = Other
    want = model(X)
    fastseg.convert(model, X)
    assert type(model.up) is Other
    (row,) = fastseg.conversion(model).left
    assert row.module == "up" and "more than rounding" in row.why
    # its children have rules of their own
    assert [r.module for r in fastseg.conversion(model).converted] == ["stem", "up.conv.double_conv"]
    close([model(X)], [want])


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda m, own, x: own(x) + 1e-6, "the output"),
        (lambda m, own, x: own(x.detach()) + (x - x.detach())[:, :1] * 0, "a gradient"),
        (lambda m, own, x: own(x).float(), "the output is another"),
        (lambda m, own, x: own(x)[0], "the output is another"),
        (lambda m, own, x: 1 / 0, "ZeroDivisionError"),
        (lambda m, own, x: m[1](own(x)).mul(0) + own(x), "a buffer in training"),
        (lambda m, own, x: own(x) + (m[0](x) * 0).sum(), "does not pay"),
    ],
)
def test_a_wrong_rule_is_put_back_and_named(monkeypatch, wrong, why):
    rule = dataclasses.replace(classes.RULES["sequential"], name="wrong", run=wrong)
    monkeypatch.setattr(in_place, "RULES", {"wrong": rule})
    model = net()
    state = copy.deepcopy(model.state_dict())
    fastseg.convert(model, X, only="stem")
    (row,) = fastseg.conversion(model)
    assert not row.converted and why in row.why and type(model.stem) is nn.Sequential
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))


def test_an_example_of_the_wrong_shape():
    assert "the model fails on the example: RuntimeError" in left(net(), torch.ones(1, 4, 16, 16))
    assert "the model fails on the example: TypeError" in left(net(), {"picture": X})


def test_a_model_on_meta():
    assert "stem.0.weight is on the meta device" in left(net().to("meta"))


def test_scripted_and_quantised_parts():
    model = net()
    model.stem = torch.jit.script(model.stem)
    model.up = nn.Sequential(nn.Conv2d(3, 3, 1), torch.ao.nn.quantized.ReLU6())
    whys = left(model)
    assert "it is scripted" in whys and "it is quantised" in whys
    assert "it is scripted" in left(torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())))


def test_shared_parts():
    model = net()
    model.again = model.stem[1]
    model.twin = model.up
    assert left(model) == (
        "it, or a part that the rule takes, is shared: stem.1, again; "
        "it, or a part that the rule takes, is shared: up, twin; "
        "it, or a part that the rule takes, is shared: up.conv.double_conv, twin.conv.double_conv"
    )


def test_a_hook_between_convolution_and_norm():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    model[0].register_forward_hook(lambda m, args, out: out * 2)
    assert left(model, X) == "a child has hooks"


def test_a_forward_on_the_instance():
    model = net()
    model.stem.forward = lambda x: F.relu(model.stem[1](model.stem[0](x)))
    del model.up
    assert left(model) == "its forward was replaced on the instance"


def test_random_numbers_modes_and_statistics_are_those_of_before():
    model = net().train()
    model.stem[1].eval()
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    fastseg.convert(model, X)
    assert torch.equal(torch.rand(3), want) and [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_every_rule_has_a_name_a_line_and_sources():
    for name, rule in classes.RULES.items():
        assert isinstance(rule, Rule) and rule.name == name and rule.what
        assert rule.library == "torch" or set(rule.classes) & set(known.KNOWN[name]), name
    assert set(known.KNOWN) <= set(classes.RULES)
