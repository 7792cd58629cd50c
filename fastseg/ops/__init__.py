"""Differentiable functions: the functional API."""

from fastseg.ops.separable_conv import BatchNormArgs, separable_conv2d
from fastseg.ops.upsample_argmax import upsample_argmax
from fastseg.ops.upsample_cross_entropy import upsample_cross_entropy

__all__ = ["BatchNormArgs", "separable_conv2d", "upsample_argmax", "upsample_cross_entropy"]
