"""Run models: on tiles, on pictures, batch by batch, or many times over with a ``Runner``."""

from fastseg.inference.classes import class_map
from fastseg.inference.final_resize import final_logits, post_process_semantic_segmentation, predict
from fastseg.inference.mask_queries import post_process_panoptic_segmentation
from fastseg.inference.predictor import Predictor
from fastseg.inference.runner import Runner
from fastseg.inference.tiling import overlap_tile

__all__ = [
    "Predictor",
    "Runner",
    "class_map",
    "final_logits",
    "overlap_tile",
    "post_process_panoptic_segmentation",
    "post_process_semantic_segmentation",
    "predict",
]
