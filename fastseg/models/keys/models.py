"""Names of whole models in other codes."""

import itertools
from collections.abc import Iterable

from torch import nn

from fastseg.models.deeplabv2 import DeepLabV2
from fastseg.models.deeplabv3 import DeepLabV3
from fastseg.models.fcn import FCN
from fastseg.models.keys.encoders import kazuto_resnet
from fastseg.models.keys.form import COUNTER, Form, by_parts, renamed
from fastseg.models.segnet import SegNet, SegNetBasic

AUXILIARY = {"aux_classifier.": "the auxiliary head is left out; a model built with aux=True takes it"}
CAFFE_EPS = 1e-9  # of Caffe's SegNet
STAGES = (2, 2, 3, 3, 3)  # convolutions of VGG16


def model_forms(model: nn.Module) -> list[Form]:
    """The forms in which weights of ``model`` are published; the first is its own ``state_dict``."""
    keys = list(model.state_dict())
    own = {key: key for key in keys}
    if isinstance(model, FCN):
        return _fcn(keys)
    if isinstance(model, DeepLabV3):
        noted = {} if model.aux_classifier is not None else AUXILIARY
        return [Form("", own, noted=noted), *_smp_deeplabv3(model, keys)]
    if isinstance(model, DeepLabV2):
        return [Form("", own), Form("kazuto1011", renamed(keys, _kazuto))]
    if isinstance(model, SegNet):
        return [Form("", own), *_caffe(keys, _caffe_segnet())]
    if isinstance(model, SegNetBasic):
        return [Form("", own), *_caffe(keys, _caffe_basic())]
    return [Form("", own)]


def _fcn(keys: list[str]) -> list[Form]:
    """torchvision's FCN; the FCN article's, which has two unused kernels and names its heads by pools."""
    if "classifier.0.weight" in keys:
        noted = {} if "aux_classifier.0.weight" in keys else AUXILIARY
        return [Form("", {key: key for key in keys}, noted=noted)]
    if "up_score2.weight" not in keys:
        return [Form("", {key: key for key in keys})]
    unused = ("up_score2.", "up_score4.", "up_score8.", "up_score16.", "up_score32.", "backbone.fc.")
    heads = {f"score{4 << i}": f"pool{i + 1}_FCNHead" for i in range(4)}
    kernels = {key.removesuffix(".weight"): f"{key.removesuffix('.weight')}.0" for key in keys if "up_score" in key}
    forms = [({}, {}), ({}, kernels), (heads, kernels), (heads, {})]
    return [
        Form(
            "the FCN article" if parts else "",
            renamed(keys, lambda key, parts=parts: by_parts(key, parts)),
            unused=unused,
        )
        for parts in (a | b for a, b in forms)
    ]


def _kazuto(key: str) -> str:
    if key.startswith("backbone."):
        return kazuto_resnet(key.removeprefix("backbone."))
    return key.replace("aspp.convs.", "aspp.c")


def _smp_deeplabv3(model: DeepLabV3, keys: list[str]) -> Iterable[Form]:
    """Those of segmentation_models_pytorch, and of its versions before 0.4, whose decoder numbers its layers."""
    refusal = ""
    if model.dilation_style != "smp" or not model.align_corners:
        refusal = 'build the model with dilation_style="smp" and align_corners=True'
    for aspp, conv, norm in (("aspp", "conv", "bn"), ("0", "1", "2")):
        parts = {
            "backbone": "encoder",
            "classifier.0": f"decoder.{aspp}",
            "classifier.1": f"decoder.{conv}",
            "classifier.2": f"decoder.{norm}",
            "classifier.4": "segmentation_head.0",
        }
        names = renamed(keys, lambda key, parts=parts: by_parts(key, parts))
        yield Form("segmentation_models_pytorch", names, refusal=refusal)


def _caffe_segnet() -> dict[str, str]:
    """Map our layers to those of the reference's segnet_train.prototxt; a layer's norm is its name and _bn."""
    indices = itertools.count()
    layers = {}
    for stage, count in enumerate(STAGES, 1):
        for k in range(1, count + 1):
            layers[f"encoder.features.{next(indices)}"] = f"conv{stage}_{k}"
            layers[f"encoder.features.{next(indices)}"] = f"conv{stage}_{k}_bn"
            next(indices)  # ReLU
        next(indices)  # pooling
    for place, (stage, count) in enumerate(reversed(list(enumerate(STAGES, 1)))):
        for i, k in enumerate(range(count, 1 if stage == 1 else 0, -1)):
            layers[f"decoder.{place}.{3 * i}"] = f"conv{stage}_{k}_D"
            layers[f"decoder.{place}.{3 * i + 1}"] = f"conv{stage}_{k}_D_bn"
    return layers | {"classifier": "conv1_1_D"}


def _caffe_basic() -> dict[str, str]:
    layers = {"classifier": "conv_classifier"}
    for i in range(4):
        layers |= {f"encoder.{i}.0": f"conv{i + 1}", f"encoder.{i}.1": f"conv{i + 1}_bn"}
        layers |= {f"decoder.{i}.0": f"conv_decode{4 - i}", f"decoder.{i}.1": f"conv_decode{4 - i}_bn"}
    return layers


def _caffe(keys: list[str], layers: dict[str, str]) -> Iterable[Form]:
    """A file converted from Caffe: with statistics, without them, or without norms.
    ``compute_bn_statistics`` leaves a norm with scale and shift only; ``BN-absorber`` leaves no norm, and a decoder
    without biases.
    """
    names = renamed(keys, lambda key: by_parts(key, layers))
    norms = [key for key in keys if layers.get(key.rpartition(".")[0], "").endswith("_bn")]
    rest = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0, COUNTER: 0.0}
    folded = (set(), {key for key in norms if "running" in key or COUNTER in key}, set(norms))
    biases = {key for key in keys if names[key].startswith("conv_decode") and key not in norms and key.endswith("bias")}
    for absent, without in itertools.product(folded, (set(), biases) if biases else (set(),)):
        gone = absent | without
        constants = {key: rest[key.rpartition(".")[2]] if key in norms else 0.0 for key in gone}
        kept = {key: name for key, name in names.items() if key not in gone}
        yield Form("Caffe's SegNet", kept, constants, eps=CAFFE_EPS, flat=True)
