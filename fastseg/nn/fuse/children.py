"""Which children a fused op can replace, and what it reads from them."""

from torch import Tensor, nn

from fastseg.nn.fuse.watch import watched
from fastseg.ops import BatchNormArgs
from fastseg.ops.core.norm import ACTIVATIONS, Activation

Act = Activation | nn.Module | None  # by name, or as the module in a model


def batch_norm_args(norm: nn.BatchNorm2d | None) -> BatchNormArgs | None:
    """The arguments that ``nn.BatchNorm2d.forward`` passes to ``batch_norm``; counts the batch, as it does."""
    if norm is None:
        return None
    momentum = norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # cumulative average
            momentum = 1.0 / float(norm.num_batches_tracked)
    mean, var, weight, bias = norm_tensors(norm)
    training = norm.training or mean is None
    if norm.training and not norm.track_running_stats:
        mean = var = None
    return BatchNormArgs(mean, var, weight, bias, training, 0.0 if momentum is None else momentum, norm.eps)


def norm_tensors(norm: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Running mean and variance, weight and bias. ``nn.Module`` finds each by a call of its own."""
    parameters, buffers, own = norm._parameters, norm._buffers, vars(norm)
    try:
        found = buffers["running_mean"], buffers["running_var"], parameters["weight"], parameters["bias"]
    except KeyError:  # a wrapper holds one elsewhere
        return norm.running_mean, norm.running_var, norm.weight, norm.bias
    return (norm.running_mean, norm.running_var, norm.weight, norm.bias) if TENSOR_NAMES & own.keys() else found


def conv_tensors(conv: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Weight and bias."""
    parameters, own = conv._parameters, vars(conv)
    if "weight" in own or "bias" in own or "weight" not in parameters or "bias" not in parameters:
        return conv.weight, conv.bias
    return parameters["weight"], parameters["bias"]


TENSOR_NAMES = {"running_mean", "running_var", "weight", "bias"}


def check_activations(name: str, **acts: str | None) -> None:
    for label, act in acts.items():
        if act is not None and act not in ACTIVATIONS:
            raise ValueError(f'{name}: {label} is {act!r}; use None, "relu", "relu6" or "leaky_relu"')


def not_fusible(depthwise: nn.Module, mid_norm: nn.Module | None, pointwise: nn.Module, post_norm) -> str:
    """Why these modules must be called as they are, or ""."""
    norm, conv = nn.BatchNorm2d, nn.Conv2d
    if why := watched(depthwise, conv, mid_norm, norm, pointwise, conv, post_norm, norm):
        return why
    d, p = depthwise, pointwise
    (K, across), (s, s2), (e, e2) = d.kernel_size, d.stride, d.dilation
    square = across == K and s == s2 and e == e2 and isinstance(d.padding, tuple) and d.padding[0] == d.padding[1]
    if not square or d.padding_mode != "zeros" or not d.groups == d.in_channels == d.out_channels:
        return "the depthwise convolution has uneven sizes, a padding mode, or more than one filter a channel"
    if p.kernel_size != (1, 1) or p.stride != (1, 1) or p.padding != (0, 0) or p.groups != 1:
        return "the pointwise convolution is not a plain 1x1"
    return ""
