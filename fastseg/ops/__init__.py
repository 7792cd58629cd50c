"""Differentiable functions: the functional API."""

from fastseg.ops.separable_conv import BatchNormArgs, separable_conv2d

__all__ = ["BatchNormArgs", "separable_conv2d"]
