"""Triton kernels and the functions that launch them, by family.

runtime            no kernel: launch configurations, the launch guard, chips, sizes, dtypes
common             device functions of two families or more
separable_conv     depthwise + pointwise convolution with norms and activations
atrous_conv        atrous branches that skip the products with padding
dense_conv         1x1 with a fused epilogue, and a network's first convolution
inverted_residual  MobileNetV2's block in one kernel
batch_norm         batch norm, residual and activation; statistics; the fold into a convolution
pooling            max pooling with compact indices, unpooling, and both fused with norms and convolutions
upsample           bilinear upsampling, its transposed convolution, argmax and cross entropy of small logits
tools              watch, tune, compile ahead of time, read machine code; no launcher imports it
"""
