"""Dense convolutions: 1x1 with a fused epilogue, and a network's first convolution."""
