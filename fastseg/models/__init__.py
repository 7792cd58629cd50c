"""Architectures by name."""

import inspect
from typing import Any

from torch import nn

from fastseg.models.deconvnet import DeconvNet
from fastseg.models.deep_supervision import DeepSupervision
from fastseg.models.deeplabv2 import DeepLabV2
from fastseg.models.deeplabv3 import DeepLabV3
from fastseg.models.deeplabv3plus import DeepLabV3Plus
from fastseg.models.fcn import FCN
from fastseg.models.pruning import Level, Pruned, auto_prune
from fastseg.models.segformer import SegFormer
from fastseg.models.segnet import SegNet, SegNetBasic
from fastseg.models.segnet3d import SegNetBlock3d
from fastseg.models.unet import UNet
from fastseg.models.unet3d import UNet3d
from fastseg.models.unetplusplus import UNetPlusPlus, fading_weights
from fastseg.models.upernet import UPerNet
from fastseg.models.weights import load_encoder_weights, load_weights

MODELS: dict[str, type[nn.Module]] = {
    "deconvnet": DeconvNet,
    "deeplabv2": DeepLabV2,
    "deeplabv3": DeepLabV3,
    "deeplabv3plus": DeepLabV3Plus,
    "fcn": FCN,
    "segformer": SegFormer,
    "segnet": SegNet,
    "segnet_basic": SegNetBasic,
    "unet": UNet,
    "unetplusplus": UNetPlusPlus,
    "upernet": UPerNet,
}
VOLUME_MODELS: dict[str, type[nn.Module]] = {"unet3d": UNet3d}  # of volumes (N, C, D, H, W)

__all__ = [
    "FCN",
    "MODELS",
    "VOLUME_MODELS",
    "DeconvNet",
    "DeepLabV2",
    "DeepLabV3",
    "DeepLabV3Plus",
    "DeepSupervision",
    "Level",
    "Pruned",
    "SegFormer",
    "SegNet",
    "SegNetBasic",
    "SegNetBlock3d",
    "UNet",
    "UNet3d",
    "UNetPlusPlus",
    "UPerNet",
    "auto_prune",
    "create",
    "fading_weights",
    "load_encoder_weights",
    "load_weights",
    "names",
]


def names(*, volumes: bool = False) -> list[str]:
    """The names that ``create`` accepts, sorted: of nets of images, or with ``volumes`` of nets of volumes."""
    return sorted(VOLUME_MODELS if volumes else MODELS)


def create(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Build a model: ``MODELS[name](num_classes, **options)``, with random weights.

    Args:
        name: one of ``names()`` or of ``names(volumes=True)``.
        num_classes: classes, background included.
        options: keywords of the model's constructor.

    Raises:
        ValueError: there is no such model or option, or the option cannot have that value.

    Example:
        >>> model = create("deeplabv3plus", num_classes=21, output_stride=8)
    """
    kinds = MODELS | VOLUME_MODELS
    if name not in kinds:
        raise ValueError(f"create: no model {name!r}; use one of {', '.join(sorted(kinds))}")
    known = [option for option in inspect.signature(kinds[name]).parameters if option != "num_classes"]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"create: {name} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    return kinds[name](num_classes, **options)
