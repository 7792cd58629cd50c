"""SegNet: an encoder-decoder that unpools with the encoder's own pooling indices."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.models.base import SegmentationNet, init_kaiming_
from fastseg.models.encoders.vgg import VGG16, pooled_with
from fastseg.models.encoders.widths import scaled
from fastseg.models.segnet_up import Up, rises
from fastseg.nn.fuse.conv_norm_act import convolve, run_conv_norm_act
from fastseg.nn.fuse.pooling import run_conv_norm_act_pool, run_unpool
from fastseg.nn.fuse.sequential import Sequential, opened
from fastseg.nn.pooling import IndexFormat, MaxPool2d, MaxUnpool2d, PoolIndices

# Widths of the decoder's convolutions, deepest stage first; the last of each is the next stage's input.
DECODER = ((512, 512, 512), (512, 512, 256), (256, 256, 128), (128, 64), (64,))
BASIC_CHANNELS, BASIC_STAGES = 64, 4
NORM_SHIFT = 0.001  # the reference's initial batch norm bias


class _SegNet(SegmentationNet):
    """What both nets share: the pooling that remembers, and the way up."""

    def __init__(self, num_classes: int, index_format: IndexFormat, eps: float, up: Up):
        super().__init__(num_classes, align_corners=None)
        if not 0 < eps < 1:
            raise ValueError(f"{type(self).__name__}: eps is {eps}; use a number above 0 and below 1, such as 1e-5")
        self._eps, self.up = eps, up
        self.pool = MaxPool2d(2, 2, ceil_mode=True, return_indices=up == "unpool", index_format=index_format)
        self.unpool = MaxUnpool2d(2, 2)

    def _risen(
        self, stage: int, x: Tensor, indices: Tensor | PoolIndices | None, size: tuple[int, int], layers: nn.Module
    ) -> Tensor:
        """Upsample to ``size``, then run the decoder's ``layers`` of a stage."""
        if self.up == "unpool":
            return run_unpool(x, indices, self.unpool, size, layers)
        return layers(self.rise[stage](x, size))

    def _initialise(self) -> None:
        """He's weights and small shifts, as the reference; the norms' eps."""
        init_kaiming_(self)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = self._eps
                nn.init.constant_(module.bias, NORM_SHIFT)


class SegNet(_SegNet):
    """SegNet on VGG16 with batch norm (Badrinarayanan, Kendall, Cipolla, arXiv:1511.00561).

    The encoder has five stages, each ending in a 2x2 max pooling in ceil mode. The decoder has five, each beginning
    with an unpooling by those indices to the size before the pooling. Images of any size work. All convolutions are 3x3
    with bias, batch norm and ReLU, except the last, which gives the logits. The encoder has torchvision's names:
    ``fastseg.models.load_encoder_weights`` reads its ``vgg16_bn`` files.

    Args:
        num_classes: classes, background included.
        index_format: format of the pooling indices: "compact", 2 bits per window, or "int64", torch's.
        in_channels: channels of the image.
        width: multiplier of every width; the results are rounded to multiples of 8.
        eps: epsilon of all norms. It is 1e-9 in the reference's Caffe; ``load_weights`` sets that for files converted
            from it.
        up: how a decoder stage upsamples to the size before its pooling: "unpool", with the pooling's indices;
            "bilinear", an interpolation (``align_corners=False``); or "transpose", a learnt 2x2 transposed convolution.
            The last two need no indices.

    Raises:
        ValueError: the value of an option is out of range.

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
        eps: float = 1e-5,
        up: Up = "unpool",
    ):
        super().__init__(num_classes, index_format, eps, up)
        self.encoder = VGG16(in_channels, width=width, norm=True, ceil_mode=True)
        channels = self.encoder.out_channels[-1]
        self.decoder = nn.ModuleList()
        for widths in DECODER:
            layers: list[nn.Module] = []
            for nominal in widths:
                out_channels = scaled(nominal, width, "SegNet")
                layers += [nn.Conv2d(channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]
                channels = out_channels
            self.decoder.append(Sequential(*layers))
        self.classifier = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.rise = rises(up, [stage[0].in_channels for stage in self.decoder], "SegNet")
        self._initialise()

    def logits(self, x: Tensor) -> Tensor:
        if self.up == "unpool":
            x, pooled = pooled_with(self.pool, self.encoder, x)
        else:
            *maps, x = self.encoder(x)
            pooled = [(None, y.shape[-2:]) for y in maps]
        for i, (stage, (indices, size)) in enumerate(zip(self.decoder, reversed(pooled), strict=True)):
            x = self._risen(i, x, indices, size, stage)
        return convolve(self.classifier, x)


class ResponseNorm(nn.LocalResponseNorm):
    """As ``torch.nn.LocalResponseNorm``; difference: 16-bit input is normalised in float32, for CPUs."""

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
        index_format: format of the pooling indices: "compact" or "int64".
        in_channels: channels of the image.
        channels: width of every layer.
        eps: epsilon of all norms. It is 1e-9 in the reference's Caffe; ``load_weights`` sets that for files converted
            from it.
        up: "unpool", "bilinear" or "transpose", as in ``SegNet``.

    Raises:
        ValueError: the value of an option is out of range.

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
        eps: float = 1e-5,
        up: Up = "unpool",
    ):
        super().__init__(num_classes, index_format, eps, up)
        if channels < 1:
            raise ValueError(f"SegNetBasic: channels is {channels}; use a positive number")
        self.norm = ResponseNorm(5, alpha=1e-4, beta=0.75)
        stage = lambda inputs: Sequential(nn.Conv2d(inputs, channels, 7, padding=3), nn.BatchNorm2d(channels))
        self.encoder = nn.ModuleList(stage(in_channels if i == 0 else channels) for i in range(BASIC_STAGES))
        self.decoder = nn.ModuleList(stage(channels) for _ in range(BASIC_STAGES))
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.rise = rises(up, [channels] * BASIC_STAGES, "SegNetBasic")
        self._initialise()

    def logits(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        pooled = []
        for stage in self.encoder:
            layers = opened(stage)
            fused = layers is not None and len(layers) == 2
            if fused and self.up == "unpool":
                size = x.shape[-2:]
                x, indices = run_conv_norm_act_pool(x, *layers, "relu", self.pool)
            else:
                x = run_conv_norm_act(x, *layers, "relu") if fused else F.relu(stage(x))
                size = x.shape[-2:]
                x, indices = self.pool(x) if self.up == "unpool" else (self.pool(x), None)
            pooled.append((indices, size))
        for i, (stage, (indices, size)) in enumerate(zip(self.decoder, reversed(pooled), strict=True)):
            x = self._risen(i, x, indices, size, stage)
        return convolve(self.classifier, x)
