"""Train with the fused loss: cross entropy of upsampled logits, without logits of full size."""

import torch
from torch.nn import functional as F

import fastseg.models
import fastseg.nn as fnn

torch.manual_seed(0)
logits = torch.randn(2, 5, 16, 16, requires_grad=True)
target = torch.randint(0, 5, (2, 64, 64))
fused = fnn.UpsampleCrossEntropyLoss(ignore_index=255)(logits, target)
full = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
plain = F.cross_entropy(full, target, ignore_index=255)
assert torch.allclose(fused, plain, atol=1e-5)

# A model's `loss` uses it. Bright pixels are class 1.
model = fastseg.models.create("unet", 2, in_channels=1, padding="same", norm=True, widths=(8, 16))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
images = torch.rand(4, 1, 32, 32)
labels = (images[:, 0] > 0.5).long()
losses = []
for _ in range(30):
    optimizer.zero_grad()
    loss = model.loss(images, labels)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
accuracy = (model.eval().predict(images) == labels).float().mean().item()
assert losses[-1] < 0.5 * losses[0]
assert accuracy > 0.9
print(f"loss of small logits {fused.item():.5f}, of full-size logits {plain.item():.5f}")
print(f"training: loss {losses[0]:.3f} -> {losses[-1]:.3f}, {accuracy:.0%} of pixels right")
