"""Bilinear upsampling, its transposed-convolution form, and the heads fused into it."""
