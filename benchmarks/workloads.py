"""Named shapes that the benchmarks and the floors share, each with its origin. Sizes are pixels of the op's input."""

from dataclasses import dataclass, replace
from typing import TypeVar


@dataclass(frozen=True)
class SeparableShape:
    """One depthwise-then-pointwise convolution: (N, C, H, W) -> (N, COUT, H / stride, W / stride), "same" padding."""

    name: str
    C: int
    COUT: int
    H: int
    W: int
    N: int = 16
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    origin: str = ""

    @property
    def out_size(self) -> tuple[int, int]:
        """Output height and width."""
        return -(-self.H // self.stride), -(-self.W // self.stride)

    @property
    def inputs(self) -> int:
        """Elements of the input."""
        return self.N * self.C * self.H * self.W

    @property
    def hidden(self) -> int:
        """Elements of the depthwise output."""
        return self.N * self.C * self.out_size[0] * self.out_size[1]

    @property
    def outputs(self) -> int:
        """Elements of the output."""
        return self.N * self.COUT * self.out_size[0] * self.out_size[1]


@dataclass(frozen=True)
class ConvShape:
    """One convolution with its norm folded, and its activation: (N, C, H, W) -> (N, COUT, H / stride, W / stride)."""

    name: str
    C: int
    COUT: int
    H: int
    W: int
    N: int = 16
    kernel_size: int = 1
    stride: int = 1
    act: str = "relu6"
    origin: str = ""

    @property
    def inputs(self) -> int:
        """Elements of the input."""
        return self.N * self.C * self.H * self.W

    @property
    def outputs(self) -> int:
        """Elements of the output."""
        return self.N * self.COUT * -(-self.H // self.stride) * -(-self.W // self.stride)


@dataclass(frozen=True)
class BlockShape:
    """One inverted residual: (N, C, H, W) -> (N, COUT, H / stride, W / stride), ``expansion`` C channels inside."""

    name: str
    C: int
    COUT: int
    H: int
    W: int
    N: int = 16
    expansion: int = 6
    stride: int = 1
    dilation: int = 1
    origin: str = ""

    @property
    def residual(self) -> bool:
        """Whether the input is added."""
        return self.stride == 1 and self.C == self.COUT


@dataclass(frozen=True)
class AsppShape:
    """One dense ASPP: 1x1, three atrous 3x3 and image pooling from C to 256 channels each, projected to 256."""

    C: int
    H: int
    W: int
    N: int
    rates: tuple[int, ...] = (6, 12, 18)
    origin: str = ""


@dataclass(frozen=True)
class PoolShape:
    """One 2x2 max pooling, or the unpooling that undoes it; H and W are the larger map's."""

    name: str
    C: int
    H: int
    W: int
    N: int


@dataclass(frozen=True)
class NormShape:
    """One batch norm + ReLU, with a residual in between or not."""

    name: str
    C: int
    H: int
    W: int
    N: int
    residual: bool = False


@dataclass(frozen=True)
class HeadShape:
    """C maps of (H, W) upsampled by ``scale``: for argmax, for the loss, as features, or as a transposed conv."""

    C: int
    H: int
    W: int
    scale: int
    N: int
    origin: str = ""


@dataclass(frozen=True)
class DecoderShape:
    """C maps of (H, W) upsampled by ``scale`` beside CL maps, and a 3x3 convolution of both to COUT."""

    C: int
    CL: int
    COUT: int
    H: int
    W: int
    scale: int
    N: int
    origin: str = ""

    @property
    def pixels(self) -> int:
        """Of the small maps, all images."""
        return self.N * self.H * self.W

    @property
    def large(self) -> int:
        """Pixels of the large maps, all images."""
        return self.scale**2 * self.pixels


@dataclass(frozen=True)
class ModelShape:
    """A whole network on N images of (H, W) pixels; ``model`` is a key of ``model_layers.MODELS``."""

    model: str
    H: int = 512
    W: int = 512
    N: int = 1
    classes: int = 21


Shape = TypeVar("Shape", SeparableShape, ModelShape)

SEPARABLE = (
    SeparableShape("xception_middle_n1", 728, 728, 32, 32, N=1, origin="Xception-65 middle flow, 512x512, stride 16"),
    SeparableShape("xception_middle", 728, 728, 32, 32, origin="Xception-65 middle flow, 512x512, stride 16"),
    SeparableShape("xception_middle_cityscapes", 728, 728, 64, 128, N=1, origin="the same at 1024x2048"),
    SeparableShape("xception_entry_128", 128, 128, 256, 256, origin="Xception-65 entry flow, 512x512, stride 2"),
    SeparableShape("xception_entry_256", 256, 256, 128, 128, origin="Xception-65 entry flow, 512x512, stride 4"),
    SeparableShape("decoder", 304, 256, 128, 128, origin="DeepLabV3+ decoder, 512x512"),
    SeparableShape("decoder_cityscapes", 304, 256, 256, 512, N=1, origin="DeepLabV3+ decoder, 1024x2048"),
    SeparableShape(
        "aspp_separable", 2048, 256, 32, 32, dilation=6, origin="separable ASPP branch on Xception-65, rate 6"
    ),
    SeparableShape("mobilenet_144_24", 144, 24, 128, 128, origin="MobileNetV2 block 3 depthwise + project"),
    SeparableShape("mobilenet_960_160", 960, 160, 32, 32, dilation=2, origin="MobileNetV2 blocks 15-16, stride 16"),
)

SEPARABLE_TRAINING = tuple(
    shape
    for shape in SEPARABLE
    if shape.name in ("xception_middle", "decoder", "xception_entry_128", "mobilenet_144_24")
)

CONVOLUTIONS = (
    ConvShape("stem_3_32_s2_n1", 3, 32, 512, 512, N=1, kernel_size=3, stride=2, origin="MobileNetV2's stem, one image"),
    ConvShape("stem_3_32_s2", 3, 32, 512, 512, kernel_size=3, stride=2, origin="MobileNetV2's and Xception's stem"),
    ConvShape("expand_24_144", 24, 144, 128, 128, origin="MobileNetV2 block 3"),
    ConvShape("expand_96_576_n1", 96, 576, 32, 32, N=1, origin="MobileNetV2 blocks 12-14, one image"),
    ConvShape("expand_160_960", 160, 960, 32, 32, origin="MobileNetV2 blocks 15-17"),
    ConvShape("aspp_1280_256", 1280, 256, 32, 32, act="relu", origin="ASPP projection"),
)

# MobileNetV2 at 512x512, output stride 16.
BLOCKS = (
    BlockShape("16_96_24_s2_n1", 16, 24, 256, 256, N=1, stride=2, origin="block 2, one image"),
    BlockShape("16_96_24_s2", 16, 24, 256, 256, stride=2, origin="block 2"),
    BlockShape("24_144_24", 24, 24, 128, 128, origin="block 3"),
    BlockShape("24_144_32_s2", 24, 32, 128, 128, stride=2, origin="block 4"),
    BlockShape("32_192_32", 32, 32, 64, 64, origin="blocks 5-6"),
    BlockShape("32_192_64_s2", 32, 64, 64, 64, stride=2, origin="block 7"),
    BlockShape("64_384_64", 64, 64, 32, 32, origin="blocks 8-10"),
)

ASPP = (
    AsppShape(2048, 32, 32, 1, origin="Xception-65 or ResNet, 512x512, stride 16"),
    AsppShape(2048, 32, 32, 16, origin="the same, batch 16"),
    AsppShape(2048, 64, 64, 16, (12, 24, 36), origin="the same at stride 8"),
    AsppShape(2048, 64, 128, 1, origin="1024x2048, stride 16"),
    AsppShape(320, 32, 32, 16, origin="MobileNetV2, 512x512, stride 16"),
    AsppShape(320, 64, 128, 1, origin="MobileNetV2, 1024x2048, stride 16"),
    AsppShape(512, 64, 64, 16, (12, 24, 36), origin="VGG or ResNet-34, 512x512, stride 8"),
)

# The branches of an ASPP alone, each tap executed or skipped: what is measured by default, and every other combination.
_ATROUS = tuple(
    AsppShape(C, H, W, N, rates, f"{'MobileNetV2' if C == 320 else 'ResNet, Xception'} at {H}x{W}")
    for H, W, rates in (
        (32, 32, (6, 12, 18)),
        (64, 64, (12, 24, 36)),
        (64, 128, (6, 12, 18)),
        (33, 33, (6, 12, 18)),
        (65, 65, (12, 24, 36)),
    )
    for C in (2048, 320)
    for N in (16, 1)
)
ATROUS = tuple(s for s in _ATROUS if s.H % 2 == 0 and (s.N == 16 or s.W != 64) and (s.N == 1 or s.W != 128))
ATROUS_OTHERS = tuple(s for s in _ATROUS if s not in ATROUS)

# Maps on which the share of useful ASPP work is tabulated: (H, W), rates.
ASPP_MAPS = (
    ((32, 32), (6, 12, 18)),
    ((33, 33), (6, 12, 18)),
    ((45, 60), (6, 12, 18)),
    ((64, 64), (6, 12, 18)),
    ((64, 64), (12, 24, 36)),
    ((65, 65), (6, 12, 18)),
    ((65, 65), (12, 24, 36)),
    ((64, 128), (6, 12, 18)),
    ((128, 256), (12, 24, 36)),
    ((97, 97), (12, 24, 36)),
)

POOLING = (
    PoolShape("SegNet L1", 64, 360, 480, 1),
    PoolShape("SegNet L1", 64, 360, 480, 16),
    PoolShape("SegNet L2", 128, 180, 240, 16),
)

SEGNET_STAGES = tuple(
    PoolShape(f"SegNet L{i}", C, H, W, N)
    for N in (1, 16)
    for i, (C, H, W) in enumerate(
        ((64, 360, 480), (128, 180, 240), (256, 90, 120), (512, 45, 60), (512, 23, 30)), start=1
    )
)

# At 512x512: every level of a U-Net of 64 to 1024 channels; the ends of ResNet-50's bottlenecks in layers 1 to 3.
NORMS = tuple(
    NormShape(f"U-Net L{i}", 64 * 2 ** (i - 1), 512 >> (i - 1), 512 >> (i - 1), N) for N in (1, 16) for i in range(1, 6)
) + tuple(
    NormShape(f"ResNet layer {i}", 128 * 2**i, 256 >> i, 256 >> i, N, residual=True) for N in (1, 16) for i in (1, 2, 3)
)

UPSAMPLING = (
    HeadShape(256, 32, 32, 4, 16, "DeepLabV3+ decoder"),
    HeadShape(21, 128, 128, 4, 16, "DeepLabV3+ logits, VOC"),
    HeadShape(150, 128, 128, 4, 16, "DeepLabV3+ logits, ADE20K"),
    HeadShape(512, 32, 32, 2, 16, "U-Net decoder"),
)

SKIPS = (
    HeadShape(64, 256, 256, 2, 1, "U-Net's last skip connection at 512^2"),
    HeadShape(64, 256, 256, 2, 16, "U-Net's last skip connection at 512^2"),
    HeadShape(512, 32, 32, 2, 1, "U-Net's first"),
    HeadShape(512, 32, 32, 2, 16, "U-Net's first"),
)

DECODERS = (
    DecoderShape(256, 48, 256, 32, 32, 4, 1, "DeepLabV3+ at 512^2, stride 16"),
    DecoderShape(256, 48, 256, 32, 32, 4, 16, "DeepLabV3+ at 512^2, stride 16"),
    DecoderShape(256, 48, 256, 64, 128, 4, 1, "DeepLabV3+ at 1024x2048, stride 16"),
    DecoderShape(256, 48, 256, 64, 64, 2, 16, "DeepLabV3+ at 512^2, stride 8"),
)

ARGMAX = (
    HeadShape(21, 128, 128, 4, 1, "VOC"),
    HeadShape(21, 128, 128, 4, 16, "VOC"),
    HeadShape(150, 128, 128, 4, 1, "ADE20K"),
    HeadShape(150, 128, 128, 4, 16, "ADE20K"),
    HeadShape(19, 256, 512, 4, 1, "Cityscapes"),
    HeadShape(19, 128, 256, 8, 1, "Cityscapes, stride 8"),
    HeadShape(21, 64, 64, 8, 16, "FCN-8s"),
)

CROSS_ENTROPY = (
    *ARGMAX[:4],
    HeadShape(19, 192, 192, 4, 8, "Cityscapes crop"),
    HeadShape(19, 256, 512, 4, 2, "Cityscapes"),
)

# Scores far below the image, for every head: FCN-16s and FCN-32s.
COARSE = tuple(
    HeadShape(C, side // scale, side // scale, scale, N, f"FCN-{scale}s, {data}")
    for N in (1, 16)
    for C, side, data in ((21, 512, "VOC"), (150, 512, "ADE20K"))
    for scale in (16, 32)
) + tuple(HeadShape(19, 1024 // scale, 2048 // scale, scale, 1, "Cityscapes") for scale in (16, 32))

DECONV = (
    HeadShape(21, 64, 64, 8, 1, "FCN-8s, VOC"),
    HeadShape(21, 64, 64, 8, 16, "FCN-8s, VOC"),
    HeadShape(150, 64, 64, 8, 16, "FCN-8s, ADE20K"),
    HeadShape(21, 16, 16, 2, 16, "FCN-8s, first upsampling"),
)

MODELS = (
    ModelShape("deeplabv3plus_mobilenet_v2"),
    ModelShape("deeplabv3plus_mobilenet_v2", N=16),
    ModelShape("deeplabv3plus_mobilenet_v2", 1024, 2048, classes=19),
    ModelShape("deeplabv3plus_mobilenet_v2", 1024, 2048, 8, 19),
    ModelShape("deeplabv3plus_mobilenet_v2", classes=150),
    ModelShape("deeplabv3plus_mobilenet_v2", N=16, classes=150),
    ModelShape("deeplabv3plus_xception65"),
    ModelShape("deeplabv3plus_xception65", N=16),
    ModelShape("deeplabv3plus_xception65", 1024, 2048, classes=19),
    ModelShape("deeplabv3plus_xception65", 1024, 2048, 8, 19),
    ModelShape("deeplabv3plus_xception65", classes=150),
    ModelShape("deeplabv3plus_xception65", N=16, classes=150),
    ModelShape("unet"),
    ModelShape("unet", N=16),
    ModelShape("unet", classes=150),
    ModelShape("unet", N=16, classes=150),
    ModelShape("segnet", 360, 480, classes=12),
    ModelShape("segnet", 360, 480, 16, 12),
    ModelShape("fcn8s"),
    ModelShape("fcn8s", N=16),
    ModelShape("fcn8s", classes=150),
    ModelShape("fcn8s", N=16, classes=150),
)

# No walk of their layers.
MODELS_WITHOUT_FLOOR = (
    *(ModelShape("segnet_basic", 360, 480, N, 12) for N in (1, 16)),
    *(ModelShape("unetplusplus", N=N) for N in (1, 16)),
    *(
        ModelShape(model, *size)
        for model in ("deeplabv3plus_xception65_dense", "deeplabv3_resnet50", "deeplabv2_resnet101")
        for size in ((512, 512, 1), (512, 512, 16), (1024, 2048, 1, 19))
    ),
)

MODELS_TRAINING = tuple(
    shape
    for shape in MODELS
    if shape.N == 16
    and (shape.classes != 150 or shape.model.startswith("deeplabv3plus"))  # one batch size, no ADE twins
)


def tiny(shape: Shape) -> Shape:
    """The same case cut down for a CPU: at most 16 channels and 12 x 12 pixels; a model gets 64 x 64 pixels."""
    if isinstance(shape, ModelShape):
        return replace(shape, H=64, W=64, N=1)
    return replace(shape, C=min(shape.C, 16), COUT=min(shape.COUT, 8), H=min(shape.H, 12), W=min(shape.W, 12), N=1)
