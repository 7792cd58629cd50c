"""DeconvNet: VGG16 down to a single vector, and its mirror image back up by unpooling and transposed convolutions."""

from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.models.base import SegmentationNet
from fastseg.models.encoders.vgg import VGG16, as_linear, pooled_with
from fastseg.models.encoders.widths import scaled
from fastseg.nn.fuse.conv_norm_act import convolve, run_conv_norm_act
from fastseg.nn.fuse.norm import run_norm_act
from fastseg.nn.fuse.pooling import unpooled
from fastseg.nn.pooling import IndexFormat, MaxPool2d, MaxUnpool2d

# Widths of the transposed convolutions after each unpooling, deepest stage first.
DECODER = ((512, 512, 512), (512, 512, 256), (256, 256, 128), (128, 64), (64, 64))
HIDDEN = 4096
NORM_SHIFT, STD = 0.001, 0.01  # of the reference: initial batch norm bias, standard deviation of Gaussian weights


class DeconvNet(SegmentationNet):
    """DeconvNet (Noh, Hong and Han, arXiv:1505.04366), the net that SegNet's paper compares itself with.

    The encoder is VGG16 with batch norm, down to stride 32. The bottleneck is fully connected: ``fc6`` (7x7) and
    ``fc7`` (1x1) with 4096 channels, and ``fc6_deconv``, a 7x7 transposed convolution back. Five decoder stages follow,
    each with an unpooling by the indices of its pooling and 3x3 transposed convolutions, then a 1x1 convolution. Every
    layer has a bias, and all but the last have batch norm and ReLU, as in https://github.com/HyeonwooNoh/DeconvNet.
    Layers have its names ("_" for "-"); those of the encoder have torchvision's. With 21 classes there are 251,805,653
    parameters; SegNet leaves out the bottleneck's 222,324,224.

    The reference takes 224x224 pixels, of which the bottleneck makes one vector. Images of any size work: a larger one
    gives several vectors; the last map of a smaller one is padded with zeros to 7x7 at the bottom and right, and
    cropped again. Odd sides are pooled in ceil mode, as in Caffe.

    ``fastseg.models.load_encoder_weights`` reads torchvision's ``vgg16_bn`` files; the first two layers of their
    classifier become fc6 and fc7.

    Args:
        num_classes: classes, background included.
        index_format: format of the pooling indices: "compact" or "int64".
        in_channels: channels of the image.
        width: multiplier of every width; the results are rounded to multiples of 8.
        bottleneck: kernel size of ``fc6`` and ``fc6_deconv``, the side of an image divided by 32.

    Raises:
        ValueError: an option has a value that it cannot take.

    Example:
        >>> DeconvNet(num_classes=3, width=0.05).eval()(torch.randn(1, 3, 64, 48)).shape
        torch.Size([1, 3, 64, 48])
    """

    def __init__(
        self,
        num_classes: int,
        index_format: IndexFormat = "compact",
        *,
        in_channels: int = 3,
        width: float = 1.0,
        bottleneck: int = 7,
    ):
        super().__init__(num_classes, align_corners=None)
        if bottleneck < 1:
            raise ValueError(f"DeconvNet: bottleneck is {bottleneck}; use a kernel size of at least 1")
        self.bottleneck = bottleneck
        self.pool = MaxPool2d(2, 2, ceil_mode=True, return_indices=True, index_format=index_format)
        self.unpool = MaxUnpool2d(2, 2)
        self.encoder = VGG16(in_channels, width=width, norm=True, ceil_mode=True)
        deepest, hidden = self.encoder.out_channels[-1], scaled(HIDDEN, width, "DeconvNet")
        self.fc6, self.bnfc6 = nn.Conv2d(deepest, hidden, bottleneck), nn.BatchNorm2d(hidden)
        self.fc7, self.bnfc7 = nn.Conv2d(hidden, hidden, 1), nn.BatchNorm2d(hidden)
        self.fc6_deconv = nn.ConvTranspose2d(hidden, deepest, bottleneck)
        self.fc6_deconv_bn = nn.BatchNorm2d(deepest)
        channels = deepest
        self._stages: list[list[tuple[str, str]]] = []
        for i, widths in zip((5, 4, 3, 2, 1), DECODER, strict=True):
            self._stages.append([])
            for k, nominal in enumerate(widths, 1):
                names, out_channels = (f"deconv{i}_{k}", f"debn{i}_{k}"), scaled(nominal, width, "DeconvNet")
                self.add_module(names[0], nn.ConvTranspose2d(channels, out_channels, 3, padding=1))
                self.add_module(names[1], nn.BatchNorm2d(out_channels))
                self._stages[-1].append(names)
                channels = out_channels
        self.seg_score_voc = nn.Conv2d(channels, num_classes, 1)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise as the reference: Gaussian weights except in VGG16, biases of 0, small shifts."""
        encoders = set(self.encoder.modules())
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, NORM_SHIFT)
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module not in encoders:
                nn.init.normal_(module.weight, std=STD)
                nn.init.zeros_(module.bias)

    def logits(self, x: Tensor) -> Tensor:
        x, pooled = pooled_with(self.pool, self.encoder, x)
        x = self._through_the_bottleneck(x)
        for names, (indices, size) in zip(self._stages, reversed(pooled), strict=True):
            x = unpooled(x, indices, self.unpool, size)
            for deconv, norm in names:
                x = run_norm_act(getattr(self, deconv)(x), getattr(self, norm), "relu")
        return convolve(self.seg_score_voc, x)

    def _through_the_bottleneck(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        least = self.bottleneck
        traced = isinstance(height, Tensor)  # by torch.jit.trace, which may be called at another size
        if traced or height < least or width < least:
            below, right = (
                (least - n).clamp(min=0) if isinstance(n, Tensor) else max(0, least - n) for n in (height, width)
            )
            x = F.pad(x, (0, right, 0, below))
        x = run_conv_norm_act(x, self.fc6, self.bnfc6, "relu")
        x = run_conv_norm_act(x, self.fc7, self.bnfc7, "relu")
        x = run_norm_act(self.fc6_deconv(x), self.fc6_deconv_bn, "relu")
        return x if not traced and x.shape[-2:] == (height, width) else x[..., :height, :width].contiguous()

    def encoder_state(self) -> dict[str, Tensor]:
        """The tensors that a classifier has too, uncopied, in torchvision's names and shapes."""
        state = dict(self.encoder.state_dict())
        for name, index in (("fc6", 0), ("fc7", 3)):
            layer = getattr(self, name)
            state |= {f"classifier.{index}.weight": as_linear(layer)}
            state |= {f"classifier.{index}.bias": layer.bias.detach()}
        return state
