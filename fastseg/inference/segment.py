"""Pictures in, class maps out."""

import numpy as np
import torch
from torch import nn

from fastseg.inference.images import to_tensor


@torch.no_grad()
def segment(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """Class maps of pictures, computed on the device of the model's parameters.

    Args:
        model: in eval mode, with ``predict``.
        images: (N, H, W, 3), uint8, RGB.

    Returns:
        (N, H, W), class indices.
    """
    device = next(model.parameters()).device
    return model.predict(to_tensor(images).to(device)).cpu().numpy()
