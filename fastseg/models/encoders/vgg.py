"""VGG16 (Simonyan and Zisserman, arXiv:1409.1556), with or without batch norm, without its classifier."""

from torch import Tensor, nn

from fastseg.models.encoders.widths import scaled
from fastseg.nn.fold import run_conv_norm_act

# The widths of each stage's convolutions; a 2x2 max pool follows each stage.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """VGG16 as an encoder.

    ``features`` holds the layers with the indices they have in torchvision's ``vgg16`` (with ``norm=True``:
    ``vgg16_bn``), so that the names in a ``state_dict`` are the same.

    Args:
        in_channels: channels of the image.
        output_stride: 32; VGG does not dilate.
        width: multiplier of every width; the results are rounded to multiples of 8.
        norm: whether a batch norm follows each convolution.
        ceil_mode: whether the pools keep an odd last row and column, as in Caffe.
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
        channels = in_channels
        for stage in STAGES:
            for nominal in stage:
                out_channels = scaled(nominal, width, "VGG16")
                padding = 1 if layers else first_padding
                layers.append(nn.Conv2d(channels, out_channels, 3, padding=padding))
                if norm:
                    layers.append(nn.BatchNorm2d(out_channels))
                layers.append(nn.ReLU(inplace=True))
                channels = out_channels
            layers.append(nn.MaxPool2d(2, ceil_mode=ceil_mode))
        self.features = nn.Sequential(*layers)
        widths = [stage[-1][0].out_channels for stage in self.stages()]
        self.out_channels = [*widths, widths[-1]]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, in_channels, H, W) -> six maps; entry i at stride 2^i: each stage before its pool, the last pool."""
        features = []
        pools = (layer for layer in self.features if isinstance(layer, nn.MaxPool2d))
        for stage, pool in zip(self.stages(), pools, strict=True):
            for conv, norm in stage:
                x = run_conv_norm_act(x, conv, norm, "relu")
            features.append(x)
            x = pool(x)
        return [*features, x]

    def stages(self) -> list[list[tuple[nn.Conv2d, nn.BatchNorm2d | None]]]:
        """The five stages, each a list of (convolution, its batch norm or None), for nets that pool in their own way.

        A ReLU follows each pair, a 2x2 max pool each stage.
        """
        stages: list[list[tuple[nn.Conv2d, nn.BatchNorm2d | None]]] = [[]]
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                stages[-1].append((layer, None))
            elif isinstance(layer, nn.BatchNorm2d):
                stages[-1][-1] = (stages[-1][-1][0], layer)
            elif isinstance(layer, nn.MaxPool2d):
                stages.append([])
        return stages[:-1]


def as_linear(conv: nn.Conv2d) -> Tensor:
    """The weight of ``conv`` in the shape of the linear layer that torchvision's classifier has; it shares memory.

    A weight in channels_last has no such view and is laid out anew.
    """
    if not conv.weight.is_contiguous():
        conv.weight.data = conv.weight.data.contiguous()
    return conv.weight.detach().flatten(1)
