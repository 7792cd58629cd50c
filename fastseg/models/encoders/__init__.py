"""Encoders: image in, list of features out, entry i at stride 2^i (capped at the output stride)."""

from fastseg.models.encoders.mobilenet_v2 import MobileNetV2

ENCODERS = {"mobilenet_v2": MobileNetV2}

__all__ = ["ENCODERS", "MobileNetV2"]
