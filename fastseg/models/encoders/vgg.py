"""VGG16 (Simonyan and Zisserman, arXiv:1409.1556), with or without batch norm, without its classifier."""

from torch import Tensor, nn

from fastseg.models.encoders.widths import scaled
from fastseg.nn.fuse.pooling import run_conv_norm_act_pool
from fastseg.nn.fuse.sequential import Sequential, opened, run_layers, run_tapped
from fastseg.nn.fuse.watch import watched
from fastseg.nn.pooling import PoolIndices

# The widths of each stage's convolutions; a 2x2 max pool follows each stage.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """VGG16 as an encoder.

    ``features`` holds the layers under their indices in torchvision's ``vgg16`` (``vgg16_bn`` with ``norm=True``), so
    that the names in a ``state_dict`` are the same.

    Args:
        in_channels: channels of the image.
        output_stride: 32; VGG does not dilate.
        width: multiplier of every width; the results are rounded to multiples of 8.
        norm: True for a batch norm after each convolution.
        ceil_mode: True if the pools keep an odd last row and column, as in Caffe.
        first_padding: zeros around the image, in pixels; FCN uses 100.

    Attributes:
        out_channels: the widths of what ``forward`` returns.

    Raises:
        ValueError: ``output_stride`` is not 32, or ``width`` is not positive.

    Example:
        >>> [tuple(f.shape[1:]) for f in VGG16()(torch.randn(1, 3, 64, 96))]
        [(64, 64, 96), (128, 32, 48), (256, 16, 24), (512, 8, 12), (512, 4, 6), (512, 2, 3)]
    """

    def __init__(
        self,
        in_channels: int = 3,
        output_stride: int = 32,
        width: float = 1.0,
        *,
        norm: bool = False,
        ceil_mode: bool = False,
        first_padding: int = 1,
    ):
        super().__init__()
        if output_stride != 32:
            raise ValueError(f"VGG16: output_stride is {output_stride}; VGG does not dilate, use 32")
        layers: list[nn.Module] = []
        self.norm, self.pools = norm, []  # whether there are norms; the pools' places in `features`
        channels = in_channels
        for stage in STAGES:
            for nominal in stage:
                out_channels = scaled(nominal, width, "VGG16")
                padding = 1 if layers else first_padding
                layers.append(nn.Conv2d(channels, out_channels, 3, padding=padding))
                if norm:
                    layers.append(nn.BatchNorm2d(out_channels))
                layers.append(nn.ReLU())
                channels = out_channels
            self.pools.append(len(layers))
            layers.append(nn.MaxPool2d(2, ceil_mode=ceil_mode))
        self.features = Sequential(*layers)
        widths = [stage[-1][0].out_channels for stage in self.stages()]
        self.out_channels = [*widths, widths[-1]]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, in_channels, H, W) -> six maps; entry i at stride 2^i: each stage before its pool, then the last pool."""
        taps = {place - 1: None for place in self.pools}
        y = run_tapped(self.features, x, taps)
        return [*taps.values(), y]

    def stages(self) -> list[list[tuple[nn.Module, nn.Module | None]]]:
        """The five stages, each a list of (convolution, its norm or None), for nets that put layers between them.

        An activation follows each pair, and a 2x2 max pool each stage. A module that replaces a layer counts as the
        layer.
        """
        step, starts = 3 if self.norm else 2, [0, *(place + 1 for place in self.pools)]
        layers = list(self.features)
        return [
            [(layers[i], layers[i + 1] if self.norm else None) for i in range(start, pool, step)]
            for start, pool in zip(starts, self.pools, strict=False)
        ]


def pooled_with(
    pool: nn.Module, encoder: nn.Module, x: Tensor
) -> tuple[Tensor, list[tuple[Tensor | PoolIndices, tuple[int, int]]]]:
    """The deepest map of a ``VGG16`` with norms, and each pooling's indices, by ``pool``, and the size before it.

    The encoder's own poolings give no indices: ``pool`` stands in their place, where they are alike and nobody watches.
    Else they run, and ``pool`` gives the indices.
    """
    pooled = []
    layers = None if watched(encoder, VGG16) else opened(encoder.features)
    if layers is None or not all(_alike(layers[place], pool) for place in encoder.pools):
        *maps, y = encoder(x)
        return y, [(pool(m)[1], (m.shape[-2], m.shape[-1])) for m in maps]
    start = 0
    for place in encoder.pools:
        x = run_layers(x, layers[start : place - 3])
        size = (x.shape[-2], x.shape[-1])
        x, indices = run_conv_norm_act_pool(x, *layers[place - 3 : place], pool)
        pooled.append((indices, size))
        start = place + 1
    return x, pooled


def _alike(own: nn.Module, pool: nn.Module) -> bool:
    """Whether ``own``, of the encoder, is unwatched and has the windows of ``pool``."""
    if watched(own, nn.MaxPool2d) or not isinstance(pool, nn.MaxPool2d):
        return False
    windows = lambda m: (m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode)
    return windows(own) == windows(pool)


def as_linear(conv: nn.Conv2d) -> Tensor:
    """The weight of ``conv`` in the shape of the linear layer in torchvision's classifier; it shares memory.

    A channels_last weight has no such view and is copied.
    """
    if not conv.weight.is_contiguous():
        conv.weight.data = conv.weight.data.contiguous()
    return conv.weight.detach().flatten(1)
