"""Pictures in, class maps out."""

import numpy as np
import torch
from torch import Tensor, nn

from fastseg.inference.classes import class_map, device_of
from fastseg.inference.tile_plan import TilePlan
from fastseg.inference.tiling import run_tiles
from fastseg.io.images import normalised, to_tensor


@torch.no_grad()
def segment(
    model: nn.Module,
    images: np.ndarray,
    plan: TilePlan | None = None,
    *,
    batch_size: int = 1,
    progress: bool = False,
    confidence: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Class maps of pictures, computed on the model's device.

    Args:
        model: in eval mode; its class maps are those of ``class_map``.
        images: (N, H, W, 3), uint8, RGB.
        plan: from ``plan_tiles(model, ...)``; None passes each picture as a whole.
        batch_size: tiles per call of the model.
        progress: show a bar of the tiles on stderr.
        confidence: return the probabilities of the classes too; of whole pictures alone.

    Returns:
        (N, H, W), class indices; with ``confidence`` a pair: these, and probabilities (N, H, W), float32.

    Raises:
        ValueError: ``confidence`` is asked for with a plan.
    """
    if plan is not None and confidence:
        raise ValueError("segment: confidence is of whole pictures; leave the plan out")
    if plan is not None:
        pixels = images.transpose(0, 3, 1, 2)
        return run_tiles(_OfPixels(model), pixels, plan, batch_size=batch_size, progress=progress, argmax=True)
    device = device_of(model)
    found = class_map(model, to_tensor(images).to(device), confidence=confidence)
    return tuple(y.cpu().numpy() for y in found) if confidence else found.cpu().numpy()


class _OfPixels(nn.Module):
    """A model that takes pixels, 0 to 255, and applies ``to_tensor``'s normalisation before ``model``."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(normalised(x))
