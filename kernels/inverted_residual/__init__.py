"""MobileNetV2's inverted residual block in one kernel, and its cost model."""
