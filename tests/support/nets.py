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
