"""Modules with parameters and buffers; drop-ins for ``torch.nn`` modules of the same name."""

from fastseg.nn.aspp import ASPP
from fastseg.nn.conv import SeparableConv2d
from fastseg.nn.conv_norm_act import ConvNormAct2d
from fastseg.nn.loss import UpsampleCrossEntropyLoss, UpsampleLoss
from fastseg.nn.norm import BatchNormAct2d, SyncBatchNorm
from fastseg.nn.pooling import MaxPool1d, MaxPool2d, MaxPool3d, MaxUnpool1d, MaxUnpool2d, MaxUnpool3d
from fastseg.nn.resize_conv import LinearFuse2d, ResizeConcatConv2d, UpsampleNearestConv2d
from fastseg.nn.upsampling import (
    BilinearConvTranspose2d,
    Upsample,
    UpsampleArgmax,
    UpsamplingBilinear2d,
    UpsamplingNearest2d,
    bilinear_kernel,
)

__all__ = [
    "ASPP",
    "BatchNormAct2d",
    "BilinearConvTranspose2d",
    "ConvNormAct2d",
    "LinearFuse2d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
    "ResizeConcatConv2d",
    "SeparableConv2d",
    "SyncBatchNorm",
    "Upsample",
    "UpsampleArgmax",
    "UpsampleCrossEntropyLoss",
    "UpsampleLoss",
    "UpsampleNearestConv2d",
    "UpsamplingBilinear2d",
    "UpsamplingNearest2d",
    "bilinear_kernel",
]
