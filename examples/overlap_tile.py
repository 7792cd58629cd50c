"""Segment an image of any size in tiles: the valid U-Net gives what the whole mirrored image gives."""

import torch
from torch.nn import functional as F

import fastseg.models
from fastseg.inference import overlap_tile

torch.manual_seed(0)
model = fastseg.models.create("unet", 2, in_channels=1, widths=(4, 8, 16)).eval().double()
image = torch.rand(1, 1, 90, 130, dtype=torch.double)
tiled = overlap_tile(model, image, tile=76)
assert tiled.shape == (1, 2, 90, 130)

with torch.no_grad():
    margin = (76 - model(torch.zeros(1, 1, 76, 76, dtype=torch.double)).shape[-1]) // 2
    mirrored = F.pad(
        image, (margin, margin + 2, margin, margin + 2), mode="reflect"
    )  # sides that the pooling can halve
    whole = model(mirrored)[:, :, :90, :130]
difference = (tiled - whole).abs().max().item()
assert difference < 1e-9
print(f"{tuple(image.shape)} in tiles of 76, margin {margin}: largest difference to the whole image {difference:.1e}")
