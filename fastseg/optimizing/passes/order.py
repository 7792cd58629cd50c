"""The order in which passes run: what makes patterns for another stands before it."""

from types import ModuleType

from fastseg.optimizing.passes import (
    conv_act,
    fold_constants,
    fold_norm,
    layout,
    nearest_conv,
    pointwise,
    resize_concat,
    upsample_argmax,
    upsample_sum,
)

PASSES: tuple[ModuleType, ...] = (
    fold_constants, fold_norm, resize_concat, nearest_conv, pointwise, upsample_sum, conv_act, upsample_argmax, layout,
)  # fmt: skip
