"""Modules with parameters and buffers; drop-ins for ``torch.nn`` wherever torch has the module."""

from fastseg.nn.conv import SeparableConv2d
from fastseg.nn.loss import UpsampleCrossEntropyLoss
from fastseg.nn.upsampling import UpsampleArgmax

__all__ = ["SeparableConv2d", "UpsampleArgmax", "UpsampleCrossEntropyLoss"]
