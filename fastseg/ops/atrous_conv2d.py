"""A dilated convolution that does not multiply its padding."""

from torch import Tensor

from fastseg.ops._atrous import atrous_branches, atrous_branches_ref
from fastseg.ops._batch_norm import Activation


def atrous_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int = 1,
    *,
    act: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(conv2d(x, weight, bias, padding=dilation * (K // 2), dilation=dilation) + residual)``: stride 1, one group.

    On a GPU the map is cut into rectangles in which each tap lies in the map everywhere or nowhere, and the taps that
    read padding are left out: 61 % of a 3x3 at rate 18 on a 32x32 map. So do both gradients. Bias, residual and
    activation cost no launch: a sum of convolutions is a chain of calls. A cost model (``explain`` shows its numbers)
    leaves to the library what it does faster, undilated 3x3 always.

    As torch, but for weights that are not finite: those of a tap that reads padding at every pixel stay out of the
    result, where torch multiplies them by 0.

    Args:
        x: (N, C, H, W), contiguous or channels_last; contiguous input costs one copy each way.
        weight: (COUT, C, K, K), K odd; kernels take 1 and 3.
        bias: (COUT,).
        dilation: distance of neighbouring taps, in pixels, on both axes.
        act: activation of the output; None, "relu", "relu6" or "leaky_relu" (slope 0.01).
        residual: (N, COUT, H, W), added before the activation.

    Returns:
        (N, COUT, H, W), in the memory format of ``x``. Under autocast in autocast's dtype, as torch's convolutions.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, tensors on different devices.
        TypeError: dtypes of ``x``, weight and residual that differ outside autocast, or are no floating point; the bias
            may have another floating-point dtype.

    Reference: Chen et al., DeepLab, arXiv:1606.00915.
    """
    biases = None if bias is None else [bias]
    return atrous_branches(x, [weight], biases, [dilation], act, residual, name="atrous_conv2d", as_x=True)


def atrous_conv2d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int = 1,
    *,
    act: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``atrous_conv2d`` in plain PyTorch."""
    return atrous_branches_ref(x, [weight], None if bias is None else [bias], [dilation], act, residual)
