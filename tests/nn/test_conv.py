"""SeparableConv2d and run_separable against the same torch modules called one after the other, in fp64."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseg
from fastseg.nn import SeparableConv2d
from fastseg.nn.fuse.separable import run_separable
from fastseg.testing import Tolerance, compare

ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu, None: lambda v: v}

# The orders of the field. A norm that comes first (timm) is nn.BatchNorm2d in front.
ORDERS: dict[str, dict] = {
    "smp": {},
    "VainF": {"bias": True},
    "Cadene": {"pre_act": "relu", "post_act": None},
    "Xception": {"pre_act": "relu", "mid_norm": True, "post_act": None},
    "ASPP": {"mid_norm": True, "mid_act": "relu"},
    "timm": {"pre_act": "relu", "post_norm": False, "post_act": None, "bias": True},
    "MobileNetV2": {"mid_norm": True, "mid_act": "relu6", "post_act": None},
}


def batch(*shape: int, device: str) -> Tensor:
    return torch.randn(*(shape or (2, 5, 7, 6)), device=device).to(memory_format=torch.channels_last)


def lively(module: nn.Module) -> nn.Module:
    """The module with statistics and affine parameters that are not 0 and 1: mixed up, they show."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for t, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -1, 1), (norm.running_mean, -0.5, 0.5),
                                 (norm.running_var, 0.5, 2.0)):  # fmt: skip
                if t is not None:
                    nn.init.uniform_(t, low, high)
    return module


def one_after_the_other(parts, x: Tensor, residual: Tensor | None = None, pre_act=None) -> Tensor:
    depthwise, mid_norm, mid_act, pointwise, post_norm, post_act = parts
    v = depthwise(ACTIVATIONS[pre_act](x))
    v = ACTIVATIONS[mid_act](v if mid_norm is None else mid_norm(v))
    v = pointwise(v)
    v = ACTIVATIONS[post_act](v if post_norm is None else post_norm(v))
    return v if residual is None else v + residual


def parts_of(block: SeparableConv2d) -> tuple:
    return block.depthwise, block.mid_norm, block.mid_act, block.pointwise, block.post_norm, block.post_act


def check_state(module: nn.Module, wide: nn.Module, terms: int = 200) -> None:
    """Running statistics and batch counts as torch's."""
    buffers = dict(wide.named_buffers())
    for name, t in module.named_buffers():
        compare(t, buffers[name], name=name, terms=terms)


def check_gradients(loss: Tensor, wide_loss: Tensor, module: nn.Module, wide: nn.Module, terms: int = 200) -> None:
    names = [name for name, _ in module.named_parameters()]
    got = torch.autograd.grad(loss, list(module.parameters()))
    want = torch.autograd.grad(wide_loss, list(wide.parameters()))
    largest = max(w.abs().max() for w in want)
    for name, g, w in zip(names, got, want, strict=True):
        if w.abs().max() < 1e-12 * largest:  # batch statistics cancel a shift in front of them: 0, and rounding
            assert g.abs().max() < 1e-5 * largest, name
        else:
            compare(g, w, name=f"gradient of {name}", terms=terms)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order(order, training, device):
    options = ORDERS[order]
    first = nn.BatchNorm2d(5) if order == "timm" else nn.Identity()
    block = SeparableConv2d(5, 8, **options, eps=1e-3, momentum=0.3)
    assert all((norm.eps, norm.momentum) == (1e-3, 0.3) for norm in (block.mid_norm, block.post_norm) if norm)
    module = lively(nn.Sequential(first, block)).to(device).train(training)
    wide = copy.deepcopy(module).cpu().double()
    x = batch(device=device)
    residual = batch(2, 8, 7, 6, device=device) if order == "MobileNetV2" else None

    for _ in range(2 if training else 1):  # the second step starts from statistics that the first one moved
        y = block(first(x), residual)
        wide_residual = None if residual is None else residual.double().cpu()
        want = one_after_the_other(parts_of(wide[1]), wide[0](x.double().cpu()), wide_residual, options.get("pre_act"))
        compare(y, want, terms=200)
    upstream = torch.randn_like(y)
    check_gradients((y * upstream).sum(), (want * upstream.double().cpu()).sum(), module, wide)
    check_state(module, wide)
    counts = {int(t) for name, t in module.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts <= {2 if training else 0}


@pytest.mark.parametrize("options", [{"kernel_size": 5, "stride": 2}, {"dilation": 3, "padding": 1}], ids=str)
def test_geometry_reaches_the_op(options, device):
    block = lively(SeparableConv2d(4, 6, **options)).to(device).eval()
    x = batch(2, 4, 9, 8, device=device)
    compare(block(x), one_after_the_other(parts_of(copy.deepcopy(block).cpu().double()), x.double().cpu()), terms=50)


def test_cumulative_statistics(device):
    block = lively(SeparableConv2d(4, 6, mid_norm=True, momentum=None)).to(device)
    wide = copy.deepcopy(block).cpu().double()
    for _ in range(3):
        x = batch(2, 4, 5, 6, device=device)
        block(x)
        one_after_the_other(parts_of(wide), x.double().cpu())
    check_state(block, wide)
    assert int(block.mid_norm.num_batches_tracked) == 3


NORMS = {  # what else nn.BatchNorm2d can be told
    "no running statistics": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "no affine": lambda: nn.BatchNorm2d(6, affine=False),
    "statistics kept but not tracked": lambda: untracked(nn.BatchNorm2d(6)),
}


def untracked(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.track_running_stats = False
    return norm


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("norm", NORMS)
def test_norm_options(norm, training, device):
    parts = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1, groups=6), NORMS[norm](), nn.Conv2d(6, 6, 1), NORMS[norm]()])
    lively(parts).to(device).train(training)
    wide = copy.deepcopy(parts).cpu().double()
    listed = lambda m: (m[0], m[1], "relu6", m[2], m[3], "leaky_relu")
    x = batch(2, 6, 5, 6, device=device)
    y = run_separable(x, *listed(parts))
    want = one_after_the_other(listed(wide), x.double().cpu())
    compare(y, want, terms=200)
    upstream = torch.randn_like(y)
    check_gradients((y * upstream).sum(), (want * upstream.double().cpu()).sum(), parts, wide)
    check_state(parts, wide)


def test_a_frozen_norm_beside_a_training_one(device):
    block = lively(SeparableConv2d(5, 8, mid_norm=True)).to(device).train()
    block.mid_norm.eval()  # as fine-tuning code does
    wide = copy.deepcopy(block).cpu().double()
    x = batch(device=device)
    compare(block(x), one_after_the_other(parts_of(wide), x.double().cpu()), terms=200)
    check_state(block, wide)
    assert int(block.mid_norm.num_batches_tracked) == 0 and int(block.post_norm.num_batches_tracked) == 1


def test_state_dict_is_the_childrens():
    block = SeparableConv2d(4, 6, mid_norm=True, bias=True)
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(block.state_dict()) == [
        *(f"depthwise.{name}" for name in ("weight", "bias")), *(f"mid_norm.{name}" for name in norm),
        *(f"pointwise.{name}" for name in ("weight", "bias")), *(f"post_norm.{name}" for name in norm),
    ]  # fmt: skip
    assert list(SeparableConv2d(4, 6, post_norm=False).state_dict()) == ["depthwise.weight", "pointwise.weight"]

    children = nn.ModuleDict({
        "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4), "mid_norm": nn.BatchNorm2d(4),
        "pointwise": nn.Conv2d(4, 6, 1), "post_norm": nn.BatchNorm2d(6),
    })  # fmt: skip
    block.load_state_dict(lively(children).state_dict(), strict=True)
    children.load_state_dict(block.state_dict(), strict=True)
    assert all(torch.equal(t, children.state_dict()[name]) for name, t in block.state_dict().items())
    with pytest.raises(RuntimeError, match="mid_norm"):
        SeparableConv2d(4, 6, bias=True).load_state_dict(block.state_dict(), strict=True)


def test_repr_names_children_and_activations():
    text = repr(SeparableConv2d(4, 6, pre_act="relu", post_act="relu6"))
    for part in ("pre_act='relu'", "mid_act=None", "post_act='relu6'", "(depthwise): Conv2d(4, 4", 
                 "(pointwise): Conv2d(4, 6", "(post_norm): BatchNorm2d(6"):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_whole_and_apart(duplicate, device):
    block = lively(SeparableConv2d(4, 6, pre_act="relu", mid_norm=True, mid_act="relu6")).to(device).eval()
    x = batch(2, 4, 5, 6, device=device)
    want = block(x)
    twin = duplicate(block)
    nn.init.zeros_(block.depthwise.weight)
    assert torch.equal(twin(x), want)


def test_half(device):
    block = lively(SeparableConv2d(4, 6, mid_norm=True, post_act=None)).to(device).half()
    wide = copy.deepcopy(block).cpu().double()
    x = batch(2, 4, 5, 6, device=device).half()
    y = block(x)
    assert y.dtype == torch.float16
    compare(y, one_after_the_other(parts_of(wide), x.double().cpu()), tolerance=Tolerance(2**-9, 2**-9))
    for name in ("running_mean", "running_var"):
        compare(getattr(block.post_norm, name), getattr(wide.post_norm, name), name=name)
    y.sum().backward()
    assert {p.grad.dtype for p in block.parameters()} == {torch.float16}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_channels_last_parameters(layout, device):
    block = lively(SeparableConv2d(4, 6, mid_norm=True)).to(device).to(memory_format=torch.channels_last)
    wide = copy.deepcopy(block).cpu().double()
    x = batch(2, 4, 5, 6, device=device).contiguous(memory_format=layout)
    y = block(x)
    assert y.is_contiguous(memory_format=layout)
    want = one_after_the_other(parts_of(wide), x.double().cpu())
    compare(y, want, terms=200)
    upstream = torch.randn_like(y)
    check_gradients((y * upstream).sum(), (want * upstream.double().cpu()).sum(), block, wide)


def test_dtype_and_device_reach_every_child():
    block = SeparableConv2d(4, 6, mid_norm=True, bias=True, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in block.parameters()} == {("meta", torch.float64)}


# ---------------------------------------------------------------------------------------------------------------------
# Children that the op cannot stand for.


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replaced_forward(conv: nn.Conv2d) -> nn.Conv2d:
    original = conv.forward  # as offloading libraries do
    conv.forward = lambda x: 3 * original(x)
    return conv


def hooked(conv: nn.Module) -> nn.Module:
    conv.register_forward_hook(lambda module, inputs, output: output + 1)
    return conv


def parametrised(conv: nn.Conv2d) -> nn.Conv2d:
    """Its weight is computed by a property of a class made for this module."""
    nn.utils.parametrize.register_parametrization(conv, "weight", nn.Tanh())
    return conv


DEPTHWISE = {"groups": 5, "padding": 1}
FALLBACKS = {  # the child replaced, how, what explain() says
    "SyncBatchNorm": ("post_norm", lambda: nn.SyncBatchNorm(8), "SyncBatchNorm"),
    "subclass": ("depthwise", lambda: Doubled(5, 5, 3, **DEPTHWISE), "Doubled"),
    "subclass, pointwise": ("pointwise", lambda: Doubled(5, 8, 1), "Doubled"),
    "parametrised": ("depthwise", lambda: parametrised(nn.Conv2d(5, 5, 3, **DEPTHWISE)), "ParametrizedConv2d"),
    "forward replaced": ("depthwise", lambda: replaced_forward(nn.Conv2d(5, 5, 3, **DEPTHWISE)), "forward"),
    "hook": ("depthwise", lambda: hooked(nn.Conv2d(5, 5, 3, **DEPTHWISE)), "hooks"),
    "hook on a norm": ("mid_norm", lambda: hooked(nn.BatchNorm2d(5)), "hooks"),
    "same": ("depthwise", lambda: nn.Conv2d(5, 5, 3, padding="same", groups=5), "depthwise"),
    "reflect": ("depthwise", lambda: nn.Conv2d(5, 5, 3, padding_mode="reflect", **DEPTHWISE), "padding mode"),
    "asymmetric stride": ("depthwise", lambda: nn.Conv2d(5, 5, 3, (2, 1), **DEPTHWISE), "uneven"),
    "asymmetric kernel": ("depthwise", lambda: nn.Conv2d(5, 5, (3, 1), padding=(1, 0), groups=5), "uneven"),
    "fewer groups": ("depthwise", lambda: nn.Conv2d(5, 5, 3, padding=1), "one filter a channel"),
    "pointwise 3x3": ("pointwise", lambda: nn.Conv2d(5, 8, 3, padding=1), "1x1"),
    "pointwise stride": ("pointwise", lambda: nn.Conv2d(5, 8, 1, stride=2), "1x1"),
    "no norm of torch's": ("mid_norm", lambda: nn.GroupNorm(1, 5), "GroupNorm"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_falls_back_to_calling_the_children(case, device):
    name, child, why = FALLBACKS[case]
    block = SeparableConv2d(5, 8, pre_act="relu", mid_norm=True, mid_act="relu6", post_act="leaky_relu")
    setattr(block, name, child())
    lively(block).to(device)
    twin = SeparableConv2d(5, 8, mid_norm=True)
    setattr(twin, name, child())
    twin.load_state_dict(block.state_dict())
    twin.to(device)
    parts = (twin.depthwise, twin.mid_norm, "relu6", twin.pointwise, twin.post_norm, "leaky_relu")
    x = batch(device=device)
    with fastseg.explain() as report:
        y = block(x)
    want = one_after_the_other(parts, x, pre_act="relu")
    assert torch.equal(y, want)
    (decision,) = report
    assert (decision.op, decision.path) == ("separable_conv2d", "reference") and why in decision.why
    got = torch.autograd.grad(y.square().sum(), list(block.parameters()))
    for g, w in zip(got, torch.autograd.grad(want.square().sum(), list(twin.parameters())), strict=True):
        assert torch.equal(g, w)
    for (key, t), u in zip(block.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(t, u), key


def test_fallback_adds_the_residual(device):
    block = SeparableConv2d(4, 4).to(device).eval()
    x = batch(1, 4, 5, 6, device=device)
    want = block(x, x)
    hook = block.depthwise.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(block(x, x), want, atol=1e-5, rtol=1e-5)
    hook.remove()
    assert torch.equal(block(x, x), want)  # fused again


HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
         "register_full_backward_pre_hook"]  # fmt: skip


@pytest.mark.parametrize("child", ["depthwise", "mid_norm", "pointwise", "post_norm"])
def test_hooks_of_children_are_called(child, device):
    block = SeparableConv2d(3, 4, mid_norm=True).to(device)
    x = batch(2, 3, 4, 5, device=device).requires_grad_()
    for kind in HOOKS:  # each alone: any of them must unfuse
        called = []
        hook = getattr(getattr(block, child), kind)(lambda *_, called=called: called.append(1))
        block(x).sum().backward()
        hook.remove()
        assert called == [1], kind


def test_hooks_of_the_block_itself_do_not_unfuse(device):
    block = SeparableConv2d(3, 4).to(device).eval()
    seen = []
    block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with fastseg.explain() as report:
        y = block(batch(1, 3, 4, 5, device=device))
    assert seen[0] is y and [decision.path for decision in report] == ["triton"]


@pytest.mark.parametrize("option", ["pre_act", "mid_act", "post_act"])
def test_unknown_activation(option, device):
    with pytest.raises(ValueError, match=f"SeparableConv2d: {option} is 'gelu'"):
        SeparableConv2d(4, 6, **{option: "gelu"})
    block = SeparableConv2d(4, 6).to(device)
    setattr(block, option, "gelu")
    with pytest.raises(ValueError, match=f"{option} is 'gelu'"):
        block(batch(2, 4, 5, 6, device=device))
    hooked(block.depthwise)
    with pytest.raises(ValueError, match=f"{option} is 'gelu'"):
        block(batch(2, 4, 5, 6, device=device))
