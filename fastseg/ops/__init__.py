"""Differentiable functions: the functional API."""

from fastseg.ops.bilinear_conv_transpose import bilinear_conv_transpose2d, bilinear_kernel
from fastseg.ops.separable_conv import BatchNormArgs, separable_conv2d
from fastseg.ops.upsample_argmax import upsample_argmax
from fastseg.ops.upsample_bilinear import upsample_bilinear
from fastseg.ops.upsample_cross_entropy import upsample_cross_entropy

__all__ = [
    "BatchNormArgs",
    "bilinear_conv_transpose2d",
    "bilinear_kernel",
    "separable_conv2d",
    "upsample_argmax",
    "upsample_bilinear",
    "upsample_cross_entropy",
]
