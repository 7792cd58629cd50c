"""Around the models: tiles, files and pictures, mosaics of textures, weights with their options, timing."""

from fastseg.inference.classes import class_map
from fastseg.inference.predictor import Predictor
from fastseg.inference.runner import Runner
from fastseg.inference.tiling import overlap_tile

__all__ = ["Predictor", "Runner", "class_map", "overlap_tile"]
