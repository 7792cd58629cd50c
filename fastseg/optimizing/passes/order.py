"""The order in which passes run: what makes patterns for another stands before it."""

from types import ModuleType

from fastseg.optimizing.passes import conv_act, fold_norm, upsample_argmax

PASSES: tuple[ModuleType, ...] = (fold_norm, conv_act, upsample_argmax)
