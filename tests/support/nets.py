"""Models that tell layers apart."""

from torch import nn


def unsettle(model: nn.Module) -> nn.Module:
    """fp64; norms that are not the identity, biases that are not 0."""
    model = model.double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, std=0.3)
    return model


# The smallest form of each model that still has all its parts: arguments of `create`.
NARROW = {
    "deconvnet": {"width": 0.02, "bottleneck": 1},
    "deeplabv2": {"backbone": "resnet50", "width": 0.05, "scales": (0.5,)},
    "deeplabv3": {"backbone": "resnet18", "aux": True, "width": 0.05, "channels": 16},
    "deeplabv3plus": {"width": 0.1, "decoder_channels": 16},
    "fcn": {"backbone": "resnet18", "stride": 4, "aux": True, "width": 0.05},
    "segformer": {
        "width": 0.05,
        "decoder_channels": 8,
        "encoder_options": {"heads": (1, 2, 1, 2), "reductions": (2, 2, 1, 1), "drop_path": 0.0},
    },
    "segnet": {"width": 0.02},
    "segnet_basic": {"channels": 8},
    "unet": {"padding": "same", "norm": True, "widths": (4, 8, 8)},
    "unetplusplus": {"norm": True, "up": "bilinear", "widths": (4, 8, 8)},
    "upernet": {"backbone": "resnet18", "aux": True, "width": 0.05, "channels": 8},
}
