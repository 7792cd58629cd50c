"""Names of encoders in the public classification weights."""

from collections.abc import Iterable

from torch import nn

from fastseg.models.encoders import MobileNetV2, ResNet, Xception65
from fastseg.models.keys.form import Form, by_parts, renamed

CLASSIFIERS = ("classifier.", "fc.", "head.")  # which no encoder has
KAZUTO_BLOCK = {
    **{f"{ours}{i}": f"{theirs}.{part}" for i, theirs in enumerate(("reduce", "conv3x3", "increase"), 1)
       for ours, part in (("conv", "conv"), ("bn", "bn"))},
    "downsample.0": "shortcut.conv",
    "downsample.1": "shortcut.bn",
}  # fmt: skip


def encoder_forms(encoder: nn.Module | None, keys: Iterable[str]) -> list[Form]:
    """The forms in which weights of ``encoder``, with tensors named ``keys``, are published.

    The first form is ``keys`` itself: torchvision's for VGG and ResNet, the DeepLabV3+ article's for MobileNetV2 and
    Xception.
    """
    keys = list(keys)
    unused = (*CLASSIFIERS, "features.18.") if isinstance(encoder, MobileNetV2) else CLASSIFIERS
    forms = [Form("", {key: key for key in keys}, unused=unused)]
    if isinstance(encoder, MobileNetV2):
        forms.append(Form("torchvision", renamed(keys, _torchvision_mobilenet(keys)), unused=unused))
    elif isinstance(encoder, Xception65):
        refusal = "" if not encoder.leaks else (
            'they are of the net without the leak, with eps 1e-3: build it with preset="google"'
        )  # fmt: skip
        forms.append(Form("timm", renamed(keys, _timm_xception(encoder)), unused=unused, refusal=refusal))
    elif isinstance(encoder, ResNet) and "layer1.0.conv3.weight" in keys:
        refusal = "" if encoder.maxpool.ceil_mode else "their bottlenecks have the stride first: build with msra=True"
        forms.append(Form("kazuto1011", renamed(keys, kazuto_resnet), unused=(*unused, "aspp."), refusal=refusal))
    return forms


def kazuto_resnet(key: str) -> str:
    """Translate torchvision's name of a ResNet tensor to that of https://github.com/kazuto1011/deeplab-pytorch."""
    stage, _, rest = key.partition(".")
    if not stage.startswith("layer"):
        return by_parts(key, {"conv1": "layer1.conv1.conv", "bn1": "layer1.conv1.bn"})
    block, _, part = rest.partition(".")
    return f"layer{int(stage[5:]) + 1}.block{int(block) + 1}.{by_parts(part, KAZUTO_BLOCK)}"


def _torchvision_mobilenet(keys: list[str]):
    """Translate the article's flat names to torchvision's, which nests convolution, norm and ReLU."""
    known = set(keys)

    def rename(key: str) -> str:
        parts = key.split(".")
        if parts[2] != "conv":  # the stem, which has one name in both
            return key
        expands = ".".join([*parts[:3], "6.weight"]) in known
        places = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"}
        if not expands:
            places = {"0": "0.0", "1": "0.1", "3": "1", "4": "2"}
        return ".".join([*parts[:3], places[parts[3]], *parts[4:]])

    return rename


def _timm_xception(encoder: Xception65):
    """Translate the article's names to those of timm's xception41, 65 and 71: blocks are numbered throughout."""
    blocks = ["block1", "block2", "block3", *encoder.middle, "block20"]
    parts = {"conv1": "stem.0.conv", "bn1": "stem.0.bn", "conv2": "stem.1.conv", "bn2": "stem.1.bn"}
    separable = {"depthwise": "conv_dw", "bn1": "bn_dw", "pointwise": "conv_pw", "bn2": "bn_pw"}
    for number, block in enumerate(blocks):
        parts |= {f"{block}.skip": f"blocks.{number}.shortcut.conv", f"{block}.skipbn": f"blocks.{number}.shortcut.bn"}
        for k in (1, 2, 3):
            for ours, theirs in separable.items():
                parts[f"{block}.sepconv{k}.{ours}"] = f"blocks.{number}.stack.conv{k}.{theirs}"
    for k in (1, 2, 3):
        for ours, theirs in separable.items():
            parts[f"conv{k + 2}.{ours}"] = f"blocks.{len(blocks)}.stack.conv{k}.{theirs}"
    return lambda key: by_parts(key, parts)
