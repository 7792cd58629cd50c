"""Swap one import: a stage of torch.nn and with fastseg.nn gives the same values and keeps less memory."""

import torch
from torch import Tensor, nn

import fastseg.nn as fnn


class Stage(nn.Module):
    """Pool with indices, convolve, unpool: ``layers`` is torch.nn or fastseg.nn."""

    def __init__(self, layers, **pool_options):
        super().__init__()
        self.pool = layers.MaxPool2d(2, return_indices=True, **pool_options)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.unpool = layers.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        pooled, indices = self.pool(x)
        return self.unpool(self.conv(pooled), indices)


torch.manual_seed(0)
plain, fused = Stage(nn), Stage(fnn, index_format="compact")
fused.load_state_dict(plain.state_dict())
x = torch.randn(2, 8, 32, 32)
assert torch.equal(plain(x), fused(x))

_, int64 = plain.pool(x)
_, compact = fused.pool(x)
assert torch.equal(compact.to_torch(), int64)
assert compact.nbytes * 32 == int64.nbytes
print(f"equal outputs; pooling indices take {compact.nbytes} bytes in place of {int64.nbytes}")
