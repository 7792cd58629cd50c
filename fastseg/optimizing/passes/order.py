"""The order in which passes run: what makes patterns for another stands before it."""

from types import ModuleType

from fastseg.optimizing.passes import (
    aspp,
    conv_act,
    fold_constants,
    fold_norm,
    in_place,
    layout,
    nearest_conv,
    padding,
    pointwise,
    pool_codes,
    resize_concat,
    separable,
    sums,
    tokens,
    upsample_argmax,
    upsample_sum,
)

PASSES: tuple[ModuleType, ...] = (
    fold_constants, tokens, fold_norm, padding, sums, aspp, resize_concat, nearest_conv, pointwise, upsample_sum,
    conv_act, separable, pool_codes, upsample_argmax, layout, in_place,
)  # fmt: skip
