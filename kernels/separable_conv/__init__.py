"""Depthwise + pointwise convolution with norms and activations: forward, backward, cost model."""
