"""Whatever is done to a model, the next call is that of its children one after another: plain, frozen, in a Runner."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from nets import NARROW, unsettle
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrizations, parametrize, prune, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

import fastseg
from fastseg.inference import Runner
from fastseg.models import create
from fastseg.nn import ConvNormAct2d, SeparableConv2d
from fastseg.ops.core.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="whole models; tests/nn has the kernels' path")


class Net(nn.Module):
    """What is packed, transformed, folded and fused."""

    def __init__(self):
        super().__init__()
        self.stem = ConvNormAct2d(3, 32, stride=2)
        self.wide = ConvNormAct2d(32, 64)
        self.separable = SeparableConv2d(64, 16, mid_norm=True, mid_act="relu6")
        self.head = nn.Conv2d(16, 5, 1)
        self.register_buffer("gain", torch.ones(1))
        self.scale = 1.0

    def forward(self, x):
        return self.head(self.separable(self.wide(self.stem(x)))) * (self.scale * self.gain)


MODELS = {
    "net": Net,
    "unet": lambda: create("unet", 3, **NARROW["unet"]),
    "segnet_basic": lambda: create("segnet_basic", 3, channels=16),
    "deeplabv3plus": lambda: create("deeplabv3plus", 3, **NARROW["deeplabv3plus"]),
    "fcn": lambda: create("fcn", 3, backbone="resnet18", stride=8, width=0.25),
}


def children(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Where gradients are wanted nothing is folded, and nothing is kept."""
    with torch.enable_grad():
        model = copy.deepcopy(model).eval()
        if all(p.is_inference() for p in model.parameters()):
            model = pickle.loads(pickle.dumps(model))
        return model.requires_grad_()(x).detach()


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * want.abs().max().item())


def of(model: nn.Module, kind: type) -> list:
    return [module for module in model.modules() if type(module) is kind]


def each(write):
    def change(model: nn.Module) -> None:
        for p in model.parameters():
            write(p)

    return change


def vectors(model: nn.Module) -> None:
    """Twice: the first gives the memory of the weights away, the second may get it back."""
    with torch.no_grad():
        old = parameters_to_vector(model.parameters())
        vector_to_parameters(old * 3, model.parameters())
        vector_to_parameters(old * 1.2, model.parameters())


def moved_twice(p: torch.Tensor) -> None:
    want = p.detach() * 1.3
    p.data = torch.zeros_like(p)
    p.data = want


def average(model: nn.Module) -> None:
    """The swap of training codes: the average's numbers into the model."""
    ema = AveragedModel(copy.deepcopy(model))
    for p in ema.module.parameters():
        p.data.mul_(1.1)
    for p, q in zip(model.parameters(), ema.module.parameters(), strict=True):
        p.data.copy_(q.data)


def optimise(model: nn.Module) -> None:
    """An optimiser as the older ones are written."""
    for p in model.parameters():
        p.data.add_(torch.linspace(-0.1, 0.1, p.numel()).view(p.shape), alpha=p.detach().abs().max().item())


def statistics(model: nn.Module) -> None:
    for norm in of(model, nn.BatchNorm2d):
        x = 2 * torch.randn(4, norm.num_features, 2, 2) + 1
        F.batch_norm(x, norm.running_mean, norm.running_var, training=True, momentum=0.5)


def loaded(model: nn.Module, **options: bool) -> None:
    state = {name: v * 1.2 if v.is_floating_point() else v.clone() for name, v in model.state_dict().items()}
    model.load_state_dict(state, **options)


def loaded_in_inference(model: nn.Module) -> None:
    with torch.inference_mode():
        loaded(model)


def set_all(kind: type, **options):
    def change(model: nn.Module) -> None:
        for module in of(model, kind):
            vars(module).update(options)

    return change


def swapped_norms(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, unsettle(nn.BatchNorm2d(child.num_features)).float().eval())


def late_bias(model: nn.Module) -> None:
    for conv in of(model, nn.Conv2d):
        conv.bias = nn.Parameter(torch.full((conv.out_channels,), 0.5))


def dilated(model: nn.Module) -> None:
    for conv in of(model, nn.Conv2d):
        if conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.groups == 1 and conv.padding == (1, 1):
            conv.padding, conv.dilation = (2, 2), (2, 2)


class Half(nn.Module):
    def forward(self, weight):
        return weight * 0.5


def parametrized(model: nn.Module) -> None:
    for conv in of(model, nn.Conv2d):
        parametrize.register_parametrization(conv, "weight", Half())


def pruned(model: nn.Module) -> None:
    for conv in of(model, nn.Conv2d)[1:]:
        prune.l1_unstructured(conv, "weight", 0.5)


def normed(model: nn.Module) -> None:
    parametrizations.spectral_norm(of(model, nn.Conv2d)[1])


def hooked(model: nn.Module) -> None:
    for conv in of(model, nn.Conv2d):
        conv.register_forward_hook(lambda module, args, y: y * 0.5)


CHANGES = {
    "through data": each(lambda p: p.data.mul_(1.5)),
    "data copied": each(lambda p: p.data.copy_(p * 1.5)),
    "data assigned": each(lambda p: setattr(p, "data", p.detach() * 1.5)),
    "data assigned twice": each(moved_twice),
    "vector_to_parameters": vectors,
    "average": average,
    "an optimiser through data": optimise,
    "in place": torch.no_grad()(each(lambda p: p.mul_(1.5))),
    "statistics": statistics,
    "load_state_dict": loaded,
    "assigned": lambda model: loaded(model, assign=True),
    "loaded in inference mode": loaded_in_inference,
    "eps": set_all(nn.BatchNorm2d, eps=0.7),
    "swapped norms": swapped_norms,
    "late bias": late_bias,
    "dilated": dilated,
    "parametrized": parametrized,
    "pruned": pruned,
    "spectral norm": normed,
    "hooked": hooked,
    "to bfloat16 and back": lambda model: model.bfloat16().float(),
}
SEEN_BY_ALL = ["through data", "data assigned twice", "vector_to_parameters", "optimise", "statistics", "eps"]


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return unsettle(MODELS[name]()).float().eval(), torch.randn(1, 3, 32, 32)


def compare(model: nn.Module, x: torch.Tensor, change) -> None:
    runner = Runner(model, x)
    with torch.no_grad():
        with fastseg.frozen(model):
            before = model(x)
        model(x)
        change(model)
        want = children(model, x)
        close(model(x), want)
        close(runner(x), want)
        with fastseg.frozen(model):
            close(model(x), want)
            close(model(x), want)
    assert (before - want).abs().max() > 2e-3 * want.abs().max()  # it can be seen


@pytest.mark.parametrize("change", CHANGES)
def test_every_change(change):
    compare(*build("net"), CHANGES[change])


@pytest.mark.parametrize("change", ["data copied", "data assigned twice", "statistics", "eps", "late bias"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "net"])
def test_every_model(name, change):
    compare(*build(name), CHANGES[change])
