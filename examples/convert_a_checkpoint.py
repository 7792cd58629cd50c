"""Convert a checkpoint: a file saved by a training script, with a wrapper's prefix, becomes a fastseg model."""

import tempfile
from pathlib import Path

import torch

import fastseg.models

torch.manual_seed(0)
trained = fastseg.models.create("deeplabv3plus", 3)  # stands for the model that somebody trained elsewhere
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "epoch_40.pth"
    state = {f"module.{name}": tensor for name, tensor in trained.state_dict().items()}  # DataParallel's prefix
    torch.save({"state_dict": state}, path)

    model = fastseg.models.create("deeplabv3plus", 3)
    fastseg.models.load_weights(model, path)

x = torch.rand(1, 3, 64, 64)
with torch.no_grad():
    assert torch.equal(model.eval()(x), trained.eval()(x))
print(f"{len(state)} tensors loaded; equal outputs")
