"""A SegNet of volumes, built from one block: pooling and unpooling with the pooling's indices around an inner net."""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from fastseg.nn.pooling import IndexFormat, MaxPool3d, MaxUnpool3d


class SegNetBlock3d(nn.Module):
    """One stage of SegNet (arXiv:1511.00561) of volumes, each way: convolve, pool, ``inner``, unpool, convolve.

    All convolutions are 3x3x3 with batch norm and ReLU, padded. The pooling is 2x2x2 in ceil mode, so volumes of any
    size work; the unpooling puts its values back to the voxels that had the maxima. Compact indices take 3 bits of a
    window (``fastseg.ops.max_pool3d``). Blocks nest: the inner module of one is another.

    Args:
        in_channels: of the volume.
        channels: of the pooled volume, which ``inner`` takes and returns.
        out_channels: of the result.
        inner: maps (N, channels, d, h, w) to the same shape; None: nothing in between.
        convs: convolutions each way.
        index_format: format of the pooling indices: "compact" or "int64".

    Raises:
        ValueError: there is no convolution.

    Example:
        >>> deep = SegNetBlock3d(8, 16, 8)
        >>> SegNetBlock3d(1, 8, 4, deep).eval()(torch.randn(1, 1, 7, 9, 8)).shape
        torch.Size([1, 4, 7, 9, 8])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        out_channels: int,
        inner: nn.Module | None = None,
        *,
        convs: int = 2,
        index_format: IndexFormat = "compact",
    ):
        super().__init__()
        if convs < 1:
            raise ValueError(f"SegNetBlock3d: convs is {convs}; give 1 or more")
        self.encoder = _convolutions([in_channels, *[channels] * convs])
        self.pool = MaxPool3d(2, 2, ceil_mode=True, return_indices=True, index_format=index_format)
        self.inner = nn.Identity() if inner is None else inner
        self.unpool = MaxUnpool3d(2, 2)
        self.decoder = _convolutions([*[channels] * convs, out_channels])

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        pooled, indices = self.pool(x)
        return self.decoder(self.unpool(self.inner(pooled), indices, output_size=x.shape[2:]))


def _convolutions(channels: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(channels):
        layers += [nn.Conv3d(inputs, outputs, 3, padding=1), nn.BatchNorm3d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)
