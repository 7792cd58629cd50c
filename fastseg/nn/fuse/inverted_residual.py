"""Run an inverted residual block on its Conv2d and BatchNorm2d children, in one kernel or in parts."""

from torch import Tensor, nn

from fastseg.nn.fuse.children import Act, not_fusible
from fastseg.nn.fuse.conv_norm_act import can_fold, folded, run_conv_norm_act
from fastseg.nn.fuse.separable import run_separable
from fastseg.nn.fuse.watch import split_act
from fastseg.ops.inverted_residual import inverted_residual, whole_or_parts


def run_inverted_residual(
    x: Tensor,
    expand: nn.Conv2d,
    expand_norm: nn.BatchNorm2d,
    depthwise: nn.Conv2d,
    mid_norm: nn.BatchNorm2d,
    pointwise: nn.Conv2d,
    post_norm: nn.BatchNorm2d,
    *,
    residual: bool,
    acts: tuple[Act, Act] = ("relu6", "relu6"),
) -> Tensor:
    """``post_norm(pointwise(act(mid_norm(depthwise(act(expand_norm(expand(x))))))))``, plus ``x`` if ``residual``.

    In evaluation one kernel runs the whole block if a cost model finds it faster, as for early, thin blocks
    (``fastseg.explain()`` shows it). Otherwise the expansion runs as a convolution with folded norm, and the depthwise
    and pointwise convolutions as one fused op.
    """
    pairs = ((expand, expand_norm), (depthwise, mid_norm), (pointwise, post_norm))
    fold = all(can_fold(x, *pair) for pair in pairs) and all(split_act(act) == ("relu6", None) for act in acts)

    def parts() -> Tensor:
        y = run_conv_norm_act(x, expand, expand_norm, acts[0])
        skip = x if residual else None
        return run_separable(y, depthwise, mid_norm, acts[1], pointwise, post_norm, None, residual=skip)

    if not fold or not _regular(expand, depthwise, mid_norm, pointwise, post_norm):
        return parts()
    stride, dilation = depthwise.stride[0], depthwise.dilation[0]

    def whole() -> Tensor:
        weights = [t for pair in pairs for t in folded(x, *pair)]
        return inverted_residual(x, *weights, act="relu6", stride=stride, dilation=dilation, residual=residual)

    return whole_or_parts(x, expand.out_channels, pointwise.out_channels, stride, dilation, whole, parts)


def _regular(expand: nn.Conv2d, depthwise: nn.Conv2d, mid_norm, pointwise: nn.Conv2d, post_norm) -> bool:
    """True if sizes and options are those of the article's block."""
    plain_1x1 = expand.kernel_size == (1, 1) and expand.stride == (1, 1) and expand.padding == (0, 0)
    same = depthwise.kernel_size == (3, 3) and depthwise.padding == depthwise.dilation
    return plain_1x1 and expand.groups == 1 and same and not not_fusible(depthwise, mid_norm, pointwise, post_norm)
