"""The functional API: differentiable functions with fused kernels."""

from fastseg.ops.aspp import aspp
from fastseg.ops.atrous_conv2d import atrous_conv2d
from fastseg.ops.batch_norm_act import batch_norm_act
from fastseg.ops.batch_norm_act_max_pool import batch_norm_act_max_pool2d
from fastseg.ops.bilinear_conv_transpose import bilinear_conv_transpose2d, bilinear_kernel
from fastseg.ops.core.norm import BatchNormArgs
from fastseg.ops.masks_to_classes import masks_to_classes
from fastseg.ops.masks_to_queries import masks_to_queries
from fastseg.ops.max_pool import max_pool1d, max_pool2d, max_pool3d
from fastseg.ops.max_unpool import max_unpool1d, max_unpool2d, max_unpool3d
from fastseg.ops.max_unpool_conv import max_unpool_conv2d
from fastseg.ops.nearest_conv import upsample_nearest_conv2d
from fastseg.ops.paste_masks import paste_masks
from fastseg.ops.pointwise import compose_pointwise
from fastseg.ops.pool_indices import PoolIndices
from fastseg.ops.resize_concat_conv import resize_concat_conv2d
from fastseg.ops.separable_conv import separable_conv2d
from fastseg.ops.upsample_argmax import upsample_argmax
from fastseg.ops.upsample_bilinear import upsample_bilinear
from fastseg.ops.upsample_concat import upsample_concat
from fastseg.ops.upsample_concat_conv import upsample_concat_conv2d
from fastseg.ops.upsample_confidence import upsample_confidence, upsample_threshold, upsample_topk
from fastseg.ops.upsample_confusion import upsample_confusion
from fastseg.ops.upsample_cross_entropy import upsample_cross_entropy
from fastseg.ops.upsample_loss import upsample_loss
from fastseg.ops.upsample_sum import upsample_sum
from fastseg.ops.upsample_trilinear import upsample_trilinear

__all__ = [
    "BatchNormArgs",
    "PoolIndices",
    "aspp",
    "atrous_conv2d",
    "batch_norm_act",
    "batch_norm_act_max_pool2d",
    "bilinear_conv_transpose2d",
    "bilinear_kernel",
    "compose_pointwise",
    "masks_to_classes",
    "masks_to_queries",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_unpool1d",
    "max_unpool2d",
    "max_unpool3d",
    "max_unpool_conv2d",
    "paste_masks",
    "resize_concat_conv2d",
    "separable_conv2d",
    "upsample_argmax",
    "upsample_bilinear",
    "upsample_concat",
    "upsample_concat_conv2d",
    "upsample_confidence",
    "upsample_confusion",
    "upsample_cross_entropy",
    "upsample_loss",
    "upsample_nearest_conv2d",
    "upsample_sum",
    "upsample_threshold",
    "upsample_topk",
    "upsample_trilinear",
]
