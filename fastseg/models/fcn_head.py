"""The head of torchvision's FCN, which is also the auxiliary head of its DeepLabV3."""

from torch import nn

from fastseg.nn.fuse.sequential import Sequential


def fcn_head(in_channels: int, num_classes: int) -> Sequential:
    """3x3 convolution to a quarter of the channels, batch norm, ReLU, dropout, 1x1 convolution."""
    channels = max(1, in_channels // 4)
    return Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(channels, num_classes, 1),
    )
