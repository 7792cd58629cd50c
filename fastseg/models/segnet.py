"""SegNet: an encoder-decoder that unpools with the encoder's own pooling indices."""

from collections.abc import Sequence

from torch import Tensor, nn

from fastseg.models.encoders.vgg import VGG16
from fastseg.models.encoders.widths import scaled
from fastseg.models.full_size import FullSizeNet, he_
from fastseg.models.segnet_up import Up, rises
from fastseg.nn.fold import convolve, run_conv_norm_act
from fastseg.nn.pooling import (
    Activation,
    IndexFormat,
    MaxPool2d,
    MaxUnpool2d,
    PoolIndices,
    run_conv_norm_act_pool,
    run_unpool_conv_norm_act,
)

# Widths of the decoder's convolutions, deepest stage first; the last of each is the next stage's input.
DECODER = ((512, 512, 512), (512, 512, 256), (256, 256, 128), (128, 64), (64,))
BASIC_CHANNELS, BASIC_STAGES = 64, 4
NORM_SHIFT = 0.001  # the reference's initial batch norm bias


class _SegNet(FullSizeNet):
    """What both nets share: the pooling that remembers, and the way up."""

    def __init__(self, num_classes: int, index_format: IndexFormat, up: Up):
        super().__init__(num_classes)
        self.up = up
        self.pool = MaxPool2d(2, 2, ceil_mode=True, return_indices=up == "unpool", index_format=index_format)
        self.unpool = MaxUnpool2d(2, 2)

    def _pooled(self, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor | PoolIndices | None]:
        """The encoder's last convolution of a stage, and the pooling; its indices where they are needed."""
        if self.up == "unpool":
            return run_conv_norm_act_pool(x, conv, norm, "relu", self.pool)
        return self.pool(run_conv_norm_act(x, conv, norm, "relu")), None

    def _risen(
        self, stage: int, x: Tensor, indices: Tensor | PoolIndices | None, size: tuple[int, int],
        conv: nn.Conv2d, norm: nn.BatchNorm2d, act: Activation | None,
    ) -> Tensor:  # fmt: skip
        """The way up to ``size``, and the decoder's first convolution of a stage."""
        if self.up == "unpool":
            return run_unpool_conv_norm_act(x, indices, self.unpool, size, conv, norm, act)
        return run_conv_norm_act(self.rise[stage](x, size), conv, norm, act)

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
        up: how a decoder stage gets to the size before its pooling: "unpool", with the pooling's indices; "bilinear",
            an interpolation (``align_corners=False``); or "transpose", a learnt 2x2 transposed convolution. The last
            two keep no indices.

    Raises:
        ValueError: an option has a value that it cannot take.

    Example:
        >>> SegNet(num_classes=11).eval()(torch.randn(1, 3, 45, 60)).shape
        torch.Size([1, 11, 45, 60])
    """

    def __init__(
        self,
        num_classes: int,
        index_format: IndexFormat = "compact",
        *,
        in_channels: int = 3,
        width: float = 1.0,
        up: Up = "unpool",
    ):
        super().__init__(num_classes, index_format, up)
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
        self.rise = rises(up, [stage[0].in_channels for stage in self.decoder], "SegNet")
        self._initialise()

    def logits(self, x: Tensor) -> Tensor:
        pooled = []
        for *convs, last in self.encoder.stages():
            for conv, norm in convs:
                x = run_conv_norm_act(x, conv, norm, "relu")
            size = x.shape[-2:]
            x, indices = self._pooled(x, *last)
            pooled.append((indices, size))
        for i, (stage, (indices, size)) in enumerate(zip(self.decoder, reversed(pooled), strict=True)):
            conv, norm, _, *rest = stage
            x = self._risen(i, x, indices, size, conv, norm, "relu")
            for conv, norm in _pairs(rest):
                x = run_conv_norm_act(x, conv, norm, "relu")
        return convolve(self.classifier, x)


class SegNetBasic(_SegNet):
    """SegNet-Basic, the small net of the same paper: four stages of one 7x7 convolution each way.

    The image passes a local response normalisation. Encoder: convolution, batch norm, ReLU, pooling; decoder:
    unpooling, convolution, batch norm, no ReLU; then a 1x1 classifier. 64 channels throughout.

    Args:
        num_classes: classes, background included.
        index_format: of the pooling indices: "compact" or "int64".
        in_channels: channels of the image.
        channels: width of every layer.
        up: "unpool", "bilinear" or "transpose", as in ``SegNet``.

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
        up: Up = "unpool",
    ):
        super().__init__(num_classes, index_format, up)
        if channels < 1:
            raise ValueError(f"SegNetBasic: channels is {channels}; use a positive number")
        self.norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        stage = lambda inputs: nn.Sequential(nn.Conv2d(inputs, channels, 7, padding=3), nn.BatchNorm2d(channels))
        self.encoder = nn.ModuleList(stage(in_channels if i == 0 else channels) for i in range(BASIC_STAGES))
        self.decoder = nn.ModuleList(stage(channels) for _ in range(BASIC_STAGES))
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.rise = rises(up, [channels] * BASIC_STAGES, "SegNetBasic")
        self._initialise()

    def logits(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        pooled = []
        for conv, norm in self.encoder:
            size = x.shape[-2:]
            x, indices = self._pooled(x, conv, norm)
            pooled.append((indices, size))
        for i, ((conv, norm), (indices, size)) in enumerate(zip(self.decoder, reversed(pooled), strict=True)):
            x = self._risen(i, x, indices, size, conv, norm, None)
        return convolve(self.classifier, x)


def _pairs(layers: Sequence[nn.Module]) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """(convolution, norm) of layers that come in threes, with a ReLU."""
    return list(zip(layers[0::3], layers[1::3], strict=True))
