"""SegNet: an encoder-decoder that unpools with the encoder's own pooling indices."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastseg.models.encoders.vgg import VGG16
from fastseg.models.encoders.widths import scaled
from fastseg.models.full_size import FullSizeNet, he_
from fastseg.nn.fold import convolve, run_conv_norm_act
from fastseg.nn.pooling import (
    IndexFormat,
    MaxPool2d,
    MaxUnpool2d,
    run_conv_norm_act_pool,
    run_unpool_conv_norm_act,
)

# Widths of the decoder's convolutions, deepest stage first; the last of each is the next stage's input.
DECODER = ((512, 512, 512), (512, 512, 256), (256, 256, 128), (128, 64), (64,))
BASIC_CHANNELS, BASIC_STAGES = 64, 4
NORM_SHIFT = 0.001  # the reference's initial batch norm bias


class _SegNet(FullSizeNet):
    """What both nets share: the pooling that remembers."""

    def __init__(self, num_classes: int, index_format: IndexFormat):
        super().__init__(num_classes)
        self.pool = MaxPool2d(2, 2, ceil_mode=True, return_indices=True, index_format=index_format)
        self.unpool = MaxUnpool2d(2, 2)

    def _initialise(self) -> None:
        """He's weights and small shifts, as the reference."""
        he_(self)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, NORM_SHIFT)


class SegNet(_SegNet):
    """SegNet on VGG16 with batch norm (Badrinarayanan, Kendall, Cipolla, arXiv:1511.00561).

    Five stages down, each ended by a 2x2 ceil-mode max pooling; five up, each begun by unpooling to the size before
    that pooling with its indices; any image size. All convolutions are 3x3 with bias, batch norm and ReLU but the
    last, which gives the logits. The encoder has torchvision's names: ``fastseg.models.load_encoder_weights`` reads
    its ``vgg16_bn`` files.

    Args:
        num_classes: classes, background included.
        index_format: of the pooling indices: "compact", 2 bits a window, or "int64", torch's.
        in_channels: channels of the image.
        width: multiplier of every width; the results are rounded to multiples of 8.

    Raises:
        ValueError: an option has a value that it cannot take.

    Example:
        >>> SegNet(num_classes=11).eval()(torch.randn(1, 3, 45, 60)).shape
        torch.Size([1, 11, 45, 60])
    """

    def __init__(
        self, num_classes: int, index_format: IndexFormat = "compact", *, in_channels: int = 3, width: float = 1.0
    ):
        super().__init__(num_classes, index_format)
        self.encoder = VGG16(in_channels, width=width, norm=True, ceil_mode=True)
        channels = self.encoder.out_channels[-1]
        self.decoder = nn.ModuleList()
        for widths in DECODER:
            layers: list[nn.Module] = []
            for nominal in widths:
                out_channels = scaled(nominal, width, "SegNet")
                layers += [nn.Conv2d(channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]
                channels = out_channels
            self.decoder.append(nn.Sequential(*layers))
        self.classifier = nn.Conv2d(channels, num_classes, 3, padding=1)
        self._initialise()

    def logits(self, x: Tensor) -> Tensor:
        pooled = []
        for *convs, last in self.encoder.stages():
            for conv, norm in convs:
                x = run_conv_norm_act(x, conv, norm, "relu")
            size = x.shape[-2:]
            x, indices = run_conv_norm_act_pool(x, *last, "relu", self.pool)
            pooled.append((indices, size))
        for stage, (indices, size) in zip(self.decoder, reversed(pooled), strict=True):
            conv, norm, _, *rest = stage
            x = run_unpool_conv_norm_act(x, indices, self.unpool, size, conv, norm, "relu")
            for conv, norm in _pairs(rest):
                x = run_conv_norm_act(x, conv, norm, "relu")
        return convolve(self.classifier, x)


class ResponseNorm(nn.LocalResponseNorm):
    """As torch's, which knows no 16 bits on a CPU; difference: 16-bit input is normalised in float32."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.bfloat16, torch.float16):
            return super().forward(x.float()).to(x.dtype)
        return super().forward(x)


class SegNetBasic(_SegNet):
    """SegNet-Basic, the small net of the same paper: four stages of one 7x7 convolution each way.

    The image passes a local response normalisation. Encoder: convolution, batch norm, ReLU, pooling; decoder:
    unpooling, convolution, batch norm, no ReLU; then a 1x1 classifier. 64 channels throughout.

    Args:
        num_classes: classes, background included.
        index_format: of the pooling indices: "compact" or "int64".
        in_channels: channels of the image.
        channels: width of every layer.

    Raises:
        ValueError: an option has a value that it cannot take.

    Example:
        >>> SegNetBasic(num_classes=11).eval()(torch.randn(1, 3, 45, 60)).shape
        torch.Size([1, 11, 45, 60])
    """

    def __init__(
        self,
        num_classes: int,
        index_format: IndexFormat = "compact",
        *,
        in_channels: int = 3,
        channels: int = BASIC_CHANNELS,
    ):
        super().__init__(num_classes, index_format)
        if channels < 1:
            raise ValueError(f"SegNetBasic: channels is {channels}; use a positive number")
        self.norm = ResponseNorm(5, alpha=1e-4, beta=0.75)
        stage = lambda inputs: nn.Sequential(nn.Conv2d(inputs, channels, 7, padding=3), nn.BatchNorm2d(channels))
        self.encoder = nn.ModuleList(stage(in_channels if i == 0 else channels) for i in range(BASIC_STAGES))
        self.decoder = nn.ModuleList(stage(channels) for _ in range(BASIC_STAGES))
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self._initialise()

    def logits(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        pooled = []
        for conv, norm in self.encoder:
            size = x.shape[-2:]
            x, indices = run_conv_norm_act_pool(x, conv, norm, "relu", self.pool)
            pooled.append((indices, size))
        for (conv, norm), (indices, size) in zip(self.decoder, reversed(pooled), strict=True):
            x = run_unpool_conv_norm_act(x, indices, self.unpool, size, conv, norm, None)
        return convolve(self.classifier, x)


def _pairs(layers: Sequence[nn.Module]) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """(convolution, norm) of layers that come in threes, with a ReLU."""
    return list(zip(layers[0::3], layers[1::3], strict=True))
