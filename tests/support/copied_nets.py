"""Nets that people copy into their own code, with the names of modules and keys of their repositories, but narrow.

milesial/Pytorch-UNet; bubbliiiing's unet-pytorch, pspnet-pytorch and deeplabv3-plus-pytorch. The encoders are stubs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 4


def conv_norm(inputs: int, outputs: int, size: int = 3, rate: int = 1) -> list[nn.Module]:
    padding = rate * (size // 2)
    conv = nn.Conv2d(inputs, outputs, size, padding=padding, dilation=rate, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


# --- milesial


class DoubleConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, mid_channels: int | None = None):
        super().__init__()
        mid = mid_channels or out_channels
        self.double_conv = nn.Sequential(*conv_norm(in_channels, mid), *conv_norm(mid, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Down(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class Up(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, bilinear: bool):
        super().__init__()
        if bilinear:
            self.up: nn.Module = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = DoubleConv(in_channels, out_channels, in_channels // 2)
        else:
            self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
            self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, x1, x2):
        x1 = self.up(x1)
        diffY = x2.size()[2] - x1.size()[2]
        diffX = x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [diffX // 2, diffX - diffX // 2, diffY // 2, diffY - diffY // 2])
        x = torch.cat([x2, x1], dim=1)
        return self.conv(x)


class OutConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class MilesialUNet(nn.Module):
    """Two levels of the four."""

    def __init__(self, bilinear: bool = True):
        super().__init__()
        half = 2 if bilinear else 1
        self.inc = DoubleConv(3, WIDTH)
        self.down1, self.down2 = Down(WIDTH, 2 * WIDTH), Down(2 * WIDTH, 4 * WIDTH // half)
        self.up1 = Up(4 * WIDTH, 2 * WIDTH // half, bilinear)
        self.up2 = Up(2 * WIDTH, WIDTH, bilinear)
        self.outc = OutConv(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        return self.outc(self.up2(self.up1(self.down2(x2), x2), x1))


# --- bubbliiiing


class unetUp(nn.Module):  # the repository's name
    def __init__(self, in_size: int, out_size: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_size, out_size, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(out_size, out_size, kernel_size=3, padding=1)
        self.up = nn.UpsamplingBilinear2d(scale_factor=2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, inputs1, inputs2):
        outputs = torch.cat([inputs1, self.up(inputs2)], 1)
        outputs = self.relu(self.conv1(outputs))
        return self.relu(self.conv2(outputs))


class BubbliiiingUnet(nn.Module):
    """One level of the four."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.deep = nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1)
        self.up_concat1 = unetUp(3 * WIDTH, WIDTH)
        self.final = nn.Conv2d(WIDTH, 2, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        feat1 = self.features[:2](inputs)
        return self.final(self.up_concat1(feat1, self.deep(self.features[2](feat1))))


class _PSPModule(nn.Module):
    def __init__(self, in_channels: int, pool_sizes: list[int]):
        super().__init__()
        out = in_channels // len(pool_sizes)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), *conv_norm(in_channels, out, 1)) for size in pool_sizes
        )
        self.bottleneck = nn.Sequential(*conv_norm(in_channels + out * len(pool_sizes), out), nn.Dropout2d(0.1))

    def forward(self, features):
        h, w = features.size()[2], features.size()[3]
        pyramids = [features]
        pyramids.extend(
            [F.interpolate(stage(features), size=(h, w), mode="bilinear", align_corners=True) for stage in self.stages]
        )
        return self.bottleneck(torch.cat(pyramids, dim=1))


class PSPNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4 * WIDTH, 3, stride=2, padding=1), nn.ReLU())
        self.master_branch = nn.Sequential(_PSPModule(4 * WIDTH, [1, 2, 3, 6]), nn.Conv2d(WIDTH, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.master_branch(self.backbone(x))
        return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=True)


class ASPP(nn.Module):
    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.branch1 = nn.Sequential(*conv_norm(dim_in, dim_out, 1))
        self.branch2 = nn.Sequential(*conv_norm(dim_in, dim_out, 3, 2))
        self.branch3 = nn.Sequential(*conv_norm(dim_in, dim_out, 3, 3))
        self.branch4 = nn.Sequential(*conv_norm(dim_in, dim_out, 3, 4))
        self.branch5_conv = nn.Conv2d(dim_in, dim_out, 1, 1, 0, bias=True)
        self.branch5_bn = nn.BatchNorm2d(dim_out)
        self.branch5_relu = nn.ReLU(inplace=True)
        self.conv_cat = nn.Sequential(*conv_norm(dim_out * 5, dim_out, 1))

    def forward(self, x):
        [_, _, row, col] = x.size()
        pooled = torch.mean(torch.mean(x, 2, True), 3, True)
        pooled = self.branch5_relu(self.branch5_bn(self.branch5_conv(pooled)))
        pooled = F.interpolate(pooled, (row, col), None, "bilinear", True)
        branches = [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x), pooled]
        return self.conv_cat(torch.cat(branches, dim=1))


class _Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.low = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low(x)
        return low, self.deep(low)


class DeepLab(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = _Backbone()
        self.aspp = ASPP(2 * WIDTH, WIDTH)
        self.shortcut_conv = nn.Sequential(*conv_norm(WIDTH, 3, 1))
        self.cat_conv = nn.Sequential(
            *conv_norm(3 + WIDTH, WIDTH), nn.Dropout(0.5), *conv_norm(WIDTH, WIDTH), nn.Dropout(0.1)
        )
        self.cls_conv = nn.Conv2d(WIDTH, 2, 1)

    def forward(self, x):
        H, W = x.size(2), x.size(3)
        low_level_features, x = self.backbone(x)
        x = self.aspp(x)
        low_level_features = self.shortcut_conv(low_level_features)
        x = F.interpolate(x, size=low_level_features.size()[2:], mode="bilinear", align_corners=True)
        x = self.cat_conv(torch.cat((x, low_level_features), dim=1))
        x = self.cls_conv(x)
        return F.interpolate(x, size=(H, W), mode="bilinear", align_corners=True)
