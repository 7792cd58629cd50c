"""Layer lists of the networks whose floors are tabulated: each function drives a ``Walk`` through one of them.

DeepLabV3+ has a separable ASPP and decoder without BN or ReLU between depthwise and pointwise, as in
segmentation_models.pytorch with its extra separable convolution behind the ASPP; output stride 16. U-Net is 64...1024
with BN and 2x2 transposed convolutions; SegNet and FCN-8s stand on VGG16 with ceil-mode pooling; FCN-8s pads its 7x7
like the other layers.
"""

from collections.abc import Callable

from benchmarks.roofline.floors import Strategy
from benchmarks.roofline.model_walk import Map, Walk
from benchmarks.workloads import ModelShape

# MobileNetV2, output stride 16: expansion, channels, repeats, stride, dilation.
MOBILENET_V2 = (
    (1, 16, 1, 1, 1),
    (6, 24, 2, 2, 1),
    (6, 32, 3, 2, 1),
    (6, 64, 4, 2, 1),
    (6, 96, 3, 1, 1),
    (6, 160, 3, 1, 2),
    (6, 320, 1, 1, 2),
)

# Xception-65, output stride 16: channels of the three separable convolutions, stride, dilation; entry, middle, exit.
XCEPTION65 = (
    ((128, 128, 128), 2, 1),
    ((256, 256, 256), 2, 1),
    ((728, 728, 728), 2, 1),
    *[((728, 728, 728), 1, 1)] * 16,
    ((728, 1024, 1024), 1, 1),
    ((1536, 1536, 2048), 1, 2),
)

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SEGNET_DECODER = ((512, 512, 512), (512, 512, 256), (256, 256, 128), (128, 64), (64,))

ASPP_WIDTH = 256
LOW_LEVEL_WIDTH = 48


def mobilenet_blocks() -> list[tuple[int, int, int, int, int]]:
    """The blocks of the MobileNetV2 trunk one by one: (in channels, channels, expansion, stride, dilation)."""
    blocks, C = [], 32
    for expand, channels, repeats, stride, dilation in MOBILENET_V2:
        for i in range(repeats):
            blocks.append((C, channels, expand, stride if i == 0 else 1, dilation))
            C = channels
    return blocks


def _mobilenet_v2(net: Walk, image: Map) -> tuple[Map, Map]:
    """Deepest features, and the low-level ones of stride 4."""
    x, low = net.conv(image, 32, 3, stride=2), image
    for _, channels, expand, stride, _ in mobilenet_blocks():
        residual = x if stride == 1 and channels == x.C else None
        wide = net.conv(x, expand * x.C) if expand > 1 else x
        x = net.separable(wide, channels, stride=stride, act=False, residual=residual)
        low = x if channels == 24 else low
    return x, low


def _xception65(net: Walk, image: Map) -> tuple[Map, Map]:
    """Deepest features, and the low-level ones: the second unit of the second block, 256 channels at stride 4."""
    x = net.conv(net.conv(image, 32, 3, stride=2), 64, 3)
    low = x
    for i, (widths, stride, _) in enumerate(XCEPTION65):
        skip = x
        if stride == 2 or widths == (728, 1024, 1024):
            skip = net.conv(x, widths[-1], stride=stride, act=False)
        for j, channels in enumerate(widths):
            if i == 1 and j == 2:
                low = x
            is_last = j == 2
            residual = skip if is_last and i < len(XCEPTION65) - 1 else None
            x = net.separable(x, channels, stride=stride if is_last else 1, residual=residual)
    return x, low


def _deeplabv3plus(net: Walk, shape: ModelShape, backbone: Callable[[Walk, Map], tuple[Map, Map]]) -> None:
    x, low = backbone(net, net.map(3, shape.H, shape.W))
    branches = [net.conv(x, ASPP_WIDTH), *(net.separable(x, ASPP_WIDTH, mid=False) for _ in range(3))]
    pooled = net.pooled_branch(x, ASPP_WIDTH)
    if not net.fused:  # fused: a bias row of the projection
        branches.append(pooled)
    x = net.conv(net.concat(*branches), ASPP_WIDTH)
    x = net.separable(x, ASPP_WIDTH, mid=False)
    low = net.conv(low, LOW_LEVEL_WIDTH)
    x = net.separable(net.concat(net.upsample(x, low.H, low.W), low), ASPP_WIDTH, mid=False)
    net.head(net.conv(x, shape.classes, norm=False, act=False), shape.H, shape.W)


def _unet(net: Walk, shape: ModelShape) -> None:
    x, skips = net.map(3, shape.H, shape.W), []
    for channels in (64, 128, 256, 512, 1024):
        if x.C > 3:
            skips.append(x)
            x = net.pool(x, keep=True, codes=False)
        x = net.conv(net.conv(x, channels, 3), channels, 3)
    for skip in reversed(skips):
        x = net.concat(skip, net.transposed(x, skip.C))
        x = net.conv(net.conv(x, skip.C, 3), skip.C, 3)
    net.label(net.conv(x, shape.classes, norm=False, act=False))


def _segnet(net: Walk, shape: ModelShape) -> None:
    x, sizes = net.map(3, shape.H, shape.W), []
    for widths in VGG16:
        for channels in widths:
            x = net.conv(x, channels, 3)
        sizes.append((x.H, x.W))
        x = net.pool(x, keep=False, codes=True)
    for widths, size in zip(SEGNET_DECODER, reversed(sizes), strict=True):
        x = net.unpool(x, *size)
        for channels in widths:
            x = net.conv(x, channels, 3)
    net.label(net.conv(x, shape.classes, 3, norm=False, act=False))


def _fcn8s(net: Walk, shape: ModelShape) -> None:
    x, pooled = net.map(3, shape.H, shape.W), []
    for widths in VGG16:
        for channels in widths:
            x = net.conv(x, channels, 3, norm=False)
        x = net.pool(x, keep=False, codes=False)
        pooled.append(x)
    x = net.conv(net.conv(x, 4096, 7, norm=False), 4096, norm=False)
    x = net.conv(x, shape.classes, norm=False, act=False)
    for features in (pooled[3], pooled[2]):
        x = net.bilinear_add(x, net.conv(features, shape.classes, norm=False, act=False))
    net.head(x, shape.H, shape.W, dense=True)


MODELS: dict[str, Callable[[Walk, ModelShape], None]] = {
    "deeplabv3plus_mobilenet_v2": lambda net, shape: _deeplabv3plus(net, shape, _mobilenet_v2),
    "deeplabv3plus_xception65": lambda net, shape: _deeplabv3plus(net, shape, _xception65),
    "unet": _unet,
    "segnet": _segnet,
    "fcn8s": _fcn8s,
}


def walk(shape: ModelShape, strategy: Strategy, *, training: bool = False) -> Walk:
    """The kernels of ``shape``'s network run one way.

    Raises:
        ValueError: ``shape.model`` is not one of ``MODELS``.
    """
    if shape.model not in MODELS:
        raise ValueError(f"walk: no layer list for {shape.model!r}; there are {', '.join(MODELS)}")
    net = Walk(strategy, shape.N, training)
    MODELS[shape.model](net, shape)
    return net
