"""A digest of outputs and gradients of every model: run it on two trees and compare the lines.

    OMP_NUM_THREADS=1 TRITON_INTERPRET=0 python -m benchmarks.studies.same_bits > before.txt

A change that must not change a bit leaves every line as it was.
"""

import hashlib

import torch
from torch import nn

import fastseg.models

OPTIONS = {  # narrow nets: a second each
    "deconvnet": {"width": 0.125, "bottleneck": 2},
    "deeplabv2": {"backbone": "resnet50", "width": 0.125, "scales": ()},
    "deeplabv3": {"backbone": "resnet18", "width": 0.25, "channels": 32},
    "deeplabv3plus": {"width": 0.25, "decoder_channels": 32},
    "fcn": {"backbone": "resnet18", "stride": 4, "width": 0.25},
    "segnet": {"width": 0.125},
    "segnet_basic": {"channels": 8},
    "unet": {"padding": "same", "norm": True, "widths": (8, 16)},
    "unetplusplus": {"norm": True, "up": "bilinear", "widths": (8, 16), "deep_supervision": True},
}


def digest(name: str) -> str:
    """Of a training step's loss and gradients, and of evaluation's logits and class map."""
    torch.manual_seed(1)
    model = fastseg.models.create(name, 3, **OPTIONS.get(name, {})).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x, target = torch.randn(2, 3, 64, 96), torch.randint(0, 3, (2, 64, 96))
    loss = model.loss(x, target)
    loss.backward()
    tensors = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    with torch.no_grad():
        tensors += [model.eval()(x), model.predict(x)]
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


if __name__ == "__main__":
    for name in fastseg.models.names():
        print(name, digest(name))
