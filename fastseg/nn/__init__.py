"""Modules with parameters and buffers; drop-ins for ``torch.nn`` wherever torch has the module."""

from fastseg.nn.conv import SeparableConv2d

__all__ = ["SeparableConv2d"]
