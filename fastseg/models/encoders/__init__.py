"""Encoders: an image in, a list of features out; entry i has stride 2^i (capped at the output stride).

``MixTransformer`` is not among ``ENCODERS``: its maps begin at stride 4.
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from fastseg.models.encoders.mit import MixTransformer
from fastseg.models.encoders.mobilenet_v2 import MobileNetV2
from fastseg.models.encoders.resnet import ResNet
from fastseg.models.encoders.vgg import VGG16
from fastseg.models.encoders.xception import Xception65

# Each takes (in_channels, output_stride, width).
ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "mobilenet_v2": MobileNetV2,
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (18, 34, 50, 101)},
    "vgg16": VGG16,
    "vgg16_bn": partial(VGG16, norm=True),
    "xception": Xception65,
}

__all__ = ["ENCODERS", "VGG16", "MixTransformer", "MobileNetV2", "ResNet", "Xception65"]
