"""The head of torchvision's FCN, which its DeepLabV3 has as the auxiliary one."""

from torch import Tensor, nn

from fastseg.nn.fold import convolve, run_conv_norm_act


def fcn_head(in_channels: int, num_classes: int) -> nn.Sequential:
    """3x3 convolution to a quarter of the channels, batch norm, ReLU, dropout, 1x1 convolution."""
    channels = max(1, in_channels // 4)
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Dropout(0.1),
        nn.Conv2d(channels, num_classes, 1),
    )


def run_fcn_head(head: nn.Sequential, x: Tensor) -> Tensor:
    """``head(x)``: (N, in_channels, H, W) -> (N, num_classes, H, W)."""
    conv, norm, _, dropout, last = head
    return convolve(last, dropout(run_conv_norm_act(x, conv, norm, "relu")))
