"""What is there decides: in every model a hook, another module, another forward or option in each kind of place.

Results are those of the children called one after another (``tests/support/as_written.py``), in fp64.
"""

import copy
import re

import pytest
import torch
from as_written import as_written
from nets import NARROW, unsettle
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastseg.models import DeepSupervision, create, names
from fastseg.ops.core.dispatch import INTERPRETED

# Interpreted it takes half an hour; tests/nn/test_children.py has the blocks with kernels.
pytestmark = pytest.mark.skipif(INTERPRETED, reason="whole models, one module at a time: the plain path")

OTHERS = {
    "google": ("deeplabv3plus", {"backbone": "xception", "preset": "google", "encoder_options": {"middle_blocks": 2}}),
    "xception": ("deeplabv3plus", {"backbone": "xception", "encoder_options": {"middle_blocks": 2}}),
    "fcn_vgg16": ("fcn", {}),
    "fcn_torchvision": ("fcn", {"preset": "torchvision", "backbone": "resnet18", "aux": True}),
    "segnet_bilinear": ("segnet_basic", {"channels": 8, "up": "bilinear"}),
    "segnet_transpose": ("segnet", {"width": 0.02, "up": "transpose"}),
    "deep_supervision": ("deep_supervision", {}),
    "unet_bilinear": ("unet", {"padding": "same", "up": "bilinear", "widths": (4, 8, 8)}),
    "unetplusplus_transpose": ("unetplusplus", {"dropout": 0.0, "widths": (4, 8, 8)}),
}
SMALL = {"deeplabv3plus": {"width": 0.05, "decoder_channels": 16}, "fcn": {"width": 0.02}}
CASES = {name: (name, NARROW[name]) for name in names()}
CASES |= {label: (name, SMALL.get(name, {}) | options) for label, (name, options) in OTHERS.items()}
# Places that are of a kind with one that stays, and what no forward calls.
REPEATED = {
    "deconvnet": r"encoder\.features\.([3-9]|[123]\d|4[01])\b|de(conv|bn)(5|4_[23]|[32])",
    "deeplabv2": r"backbone\.layer[134]\.|backbone\.layer2\.[1-9]|aspp\.convs\.[23]",
    "deeplabv3": r"backbone\.layer[134]\.|backbone\.layer2\.[1-9]|.*convs\.[23]",
    "deeplabv3plus": r"backbone\.features\.([24-9]|1[0-6])\b|backbone\.features\.17\.conv\.\d|aspp\.branch[34]",
    "fcn": r"backbone\.layer[134]\.|backbone\.layer2\.[1-9]|score(8|16)\b",
    "segformer": r".*(block.([13]|[02].1)\b|(patch_embeddings|encoder.layer_norm).[12])|decode_head.linear_c.[12]",
    "segnet": r"encoder\.features\.([3-9]|[123]\d|4[01])\b|decoder\.[1-3]\b",
    "segnet_basic": r"(en|de)coder\.[12]\b",
    "unet": r"down2",
    "unetplusplus": r"conv2_0|conv1|up1",
    "upernet": r"backbone|decode_head\.(psp_modules\.[12]|(lateral|fpn)_convs\.[12])",
    "google": r"backbone\.(block(1|2|3|5|20)|conv[45])\b|backbone\.block4\.sepconv[23]|aspp\.convs\.[23]",
    "xception": r"backbone\.(block[1345]|conv[45])\b|backbone\.block(2\.sepconv[13]|20\.sepconv[12])|aspp|cat_",
    "fcn_vgg16": r"conv[2345]_|.*score_?pool4",
    "fcn_torchvision": r"backbone",
    "segnet_bilinear": r"(en|de)coder\.[12]\b",
    "segnet_transpose": r"encoder\.features\.([3-9]|[123]\d|4[01])\b|decoder\.[1-3]\b|rise\.[1-4]",
    "deep_supervision": r"model\.(inc|down|up2)",
    "unet_bilinear": r"down|inc|up1\.conv",
    "unetplusplus_transpose": r"conv2_0|conv1_1",
}
UNCALLED = {
    "segnet_bilinear": ("unpool",),
    "segnet_transpose": ("pool", "unpool"),
    "deep_supervision": ("model", "model.upsample_argmax"),
}
IN_TRAINING = "aux_classifier|auxiliary_head|up_score32|heads"  # called there alone
HOLDERS = (nn.ModuleList, nn.ModuleDict)  # never called
FUSED_ACTS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)


class Doubled(nn.Module):
    """A module in a wrapper, as adapters and quantisation have it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


def net(label: str) -> nn.Module:
    name, options = CASES[label]
    if label == "deep_supervision":
        inner = create("unet", 3, padding="same", norm=True, widths=(4, 8, 8))
        model = unsettle(DeepSupervision(inner, ["down2.maxpool_conv.1.double_conv.5", "up1.conv.double_conv.4"]))
    else:
        model = unsettle(create(name, 3, **options))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif name == "deconvnet" and isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight)  # the reference's let nothing through that deep
    return model


def image() -> Tensor:
    return torch.randn(2, 3, 24, 20, dtype=torch.float64)


def places(label: str, model: nn.Module) -> list[str]:
    """The names of one module of each kind, of those that are called."""
    uncalled = {"upsample_argmax", "", *UNCALLED.get(label, ())}
    return [
        path
        for path, module in model.named_modules()
        if path not in uncalled and not isinstance(module, HOLDERS) and not re.match(REPEATED[label], path)
    ]


def listed(y: Tensor | list[Tensor]) -> list[Tensor]:
    return y if isinstance(y, list) else [y]


def same(got, want) -> None:
    torch.testing.assert_close(listed(got), listed(want), rtol=1e-8, atol=1e-9)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


@pytest.mark.parametrize("label", CASES)
def test_hooks_see_what_the_module_takes_and_gives(label):
    """A forward, a forward pre- and a full backward hook on each module in turn: how often, and on what."""
    model, x = net(label), image()
    leaves = {path for path, module in model.named_modules() if not list(module.children())}
    counts = dict.fromkeys(leaves, 0)

    def count(path: str) -> None:
        counts[path] += 1

    twin = copy.deepcopy(model).eval()
    for path in leaves:
        twin.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: count(path))
    with torch.no_grad():
        want = as_written(CASES[label][0], twin, x)
    model.eval()
    for path in (path for path in places(label, model) if not re.match(IN_TRAINING, path)):
        module, pre, seen, back = model.get_submodule(path), [], [], []
        hooks = [
            module.register_forward_pre_hook(lambda module, args, pre=pre: pre.append(args)),
            module.register_forward_hook(lambda module, args, out, seen=seen: seen.append((args, out))),
            module.register_full_backward_hook(lambda *_, back=back: back.append(1)),
        ]
        with torch.no_grad():
            same(model(x), want)
        inside = next(leaf for leaf in (path, *(f"{path}.{p}" for p, _ in module.named_modules())) if leaf in leaves)
        assert len(seen) == len(pre) == counts[inside] > 0, path
        for (args, out), before in zip(seen, pre, strict=True):
            assert all(a is b for a, b in zip(args, before, strict=True)), path
            with torch.no_grad():
                again = module.forward(*args)
            if not isinstance(out, tuple):  # a pooling's indices have no values of their own
                same(out, again)
        model(x.clone().requires_grad_()).sum().backward()
        assert len(back) == (0 if isinstance(out, list) else counts[inside]), path  # torch knows no lists there
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("label", CASES)
def test_a_hook_on_all_modules(label):
    model, x, seen = net(label).eval(), image(), set()
    with torch.no_grad():
        want = as_written(CASES[label][0], model, x)
        hook = torch_module.register_module_forward_hook(lambda module, *_: seen.add(module))
        try:
            same(model(x), want)
        finally:
            hook.remove()
        uncalled = [path for path, module in model.named_modules() if module not in seen]
        lists = [path for path, module in model.named_modules() if isinstance(module, HOLDERS)]
        heads = ["upsample_argmax"] if hasattr(model, "upsample_argmax") else []
        lists = [path for path in lists if not re.match(IN_TRAINING, path)]
        known = {*lists, *heads, *UNCALLED.get(label, ())} - {"model"}
        assert {path for path in uncalled if not re.match(IN_TRAINING, path)} == known


def other(module: nn.Module, several: bool) -> list[nn.Module]:
    """What people put in a module's place: ``several``, or the one that differs most."""
    if isinstance(module, FUSED_ACTS):
        return [nn.SiLU(), nn.LeakyReLU(0.3)] if several else [nn.SiLU()]
    if isinstance(module, nn.BatchNorm2d):
        group = nn.GroupNorm(1, module.num_features).double()
        nn.init.uniform_(group.weight, 0.5, 1.5)
        batch = nn.BatchNorm2d(module.num_features, affine=False, track_running_stats=False).double()
        return [group, nn.Identity(), batch] if several else [group]
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        return [Doubled(module)]
    if type(module) is nn.MaxPool2d:
        return [Doubled(module)]
    return []


@pytest.mark.parametrize("label", CASES)
def test_another_module_in_its_place(label):
    """In training, with its statistics, and in evaluation; gradients of replaced modules are in test_children.py."""
    model, x = net(label), image()
    twin, replaced, kinds = copy.deepcopy(model), 0, set()
    for path in places(label, model):
        module, plain = model.get_submodule(path), twin.get_submodule(path)
        first, kinds = type(module) not in kinds, kinds | {type(module)}
        for new in other(module, several=first):
            put(model, path, new)
            put(twin, path, Doubled(plain) if type(new) is Doubled else copy.deepcopy(new))
            for training in (True, False):
                model.train(training), twin.train(training)
                with torch.no_grad():
                    same(model(x), as_written(CASES[label][0], twin, x))
            same(list(model.buffers()), list(twin.buffers()))
            replaced += 1
        put(model, path, module), put(twin, path, plain)
    assert replaced > 5


@pytest.mark.parametrize("label", CASES)
def test_another_forward_on_the_instance(label):
    """Of modules that take one map and give one, the containers among them."""
    model, x = net(label).eval(), image()
    with torch.no_grad():
        plain = model(x)
        for path in (path for path in places(label, model) if not re.match(IN_TRAINING, path)):
            module = model.get_submodule(path)
            original, outs = module.forward, []

            def forward(*args, original=original, outs=outs):
                outs.append(original(*args))
                return outs[-1] * 1.5 if isinstance(outs[-1], Tensor) else outs[-1]

            module.forward = forward
            changed = model(x)
            del module.forward
            assert outs, path
            if isinstance(outs[0], Tensor):
                hook = module.register_forward_hook(lambda module, args, out: out * 1.5)
                same(changed, model(x))
                hook.remove()
                assert not torch.equal(changed, plain) or not outs[0].any(), path
            else:
                same(changed, plain)


@pytest.mark.parametrize("label", CASES)
def test_converted_to_sync_batch_norm(label):
    """As for training in several processes: in one, and in evaluation, it is the net it was made of."""
    model, x = net(label), image()
    norms = [path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert all(type(converted.get_submodule(path)) is nn.SyncBatchNorm for path in norms)
    for training in (True, False):
        with torch.no_grad():
            same(converted.train(training)(x), as_written(CASES[label][0], model.train(training), x))
    same(list(converted.buffers()), list(model.buffers()))


def test_options_that_change():
    """Those of a module that stays: its slope, its clamp, and whether it works in place."""
    model, x = net("fcn").eval(), image()
    mobile = net("deeplabv3plus").eval()
    for module in (*model.modules(), *mobile.modules()):
        if isinstance(module, nn.LeakyReLU):
            module.negative_slope = 0.4
        elif isinstance(module, nn.ReLU6):
            module.max_val = 1.0
        elif isinstance(module, nn.ReLU):
            module.inplace = True
    with torch.no_grad():
        same(model(x), as_written("fcn", model, x))
        same(mobile(x), as_written("deeplabv3plus", mobile, x))
