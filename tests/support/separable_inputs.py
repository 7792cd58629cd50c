"""Arguments for separable_conv2d: every order of norms and activations that the field uses, on random tensors."""

import torch

from fastseg.ops import BatchNormArgs

# What stands around the two convolutions, as the field writes it: pre_act, mid_norm, mid_act, post_norm, post_act.
ORDERS = {
    "bare": (None, False, None, False, None),
    "smp": (None, False, None, True, "relu"),
    "cadene": ("relu", False, None, True, None),
    "xception": ("relu", True, None, True, None),
    "aspp": (None, True, "relu", True, "relu"),
    "mobilenet": (None, True, "relu6", True, None),
    "norms": (None, True, None, True, None),  # no kinks: half types are compared with fp64 by it
    "presep": ("leaky_relu", False, None, False, None),  # a BatchNorm2d in front makes it timm's
    "acts": ("relu6", False, "leaky_relu", False, "leaky_relu"),
}


def make(
    order="aspp", N=2, C=5, H=9, W=11, COUT=7, K=3, stride=1, padding=None, dilation=1, bias=False, training=False,
    residual=False, dtype=torch.float32, device="cpu", layout=torch.channels_last, affine=True,
):  # fmt: skip
    """-> inputs, keyword arguments; every tensor requires grad whose gradient is not 0 by cancellation."""
    pre_act, mid, mid_act, post, post_act = ORDERS[order]
    grad = lambda t: t.to(device).requires_grad_()

    def norm(channels):
        weight, bias = (grad(torch.rand(channels) + 0.5), grad(torch.randn(channels) * 0.3)) if affine else (None, None)
        mean, var = torch.randn(channels) * 0.1, torch.rand(channels) + 0.5
        return BatchNormArgs(mean.to(device), var.to(device), weight, bias, training)

    inputs = [
        grad(torch.randn(N, C, H, W).to(dtype).to(memory_format=layout)),
        grad((torch.randn(C, 1, K, K) / K).to(dtype)),
        grad((torch.randn(COUT, C, 1, 1) / C**0.5).to(dtype)),
        grad(torch.randn(C).to(dtype)) if bias else None,
        grad(torch.randn(COUT).to(dtype)) if bias else None,
    ]
    kwargs = {
        "stride": stride, "padding": padding, "dilation": dilation, "pre_act": pre_act, "mid_act": mid_act,
        "post_act": post_act, "mid_norm": norm(C) if mid else None, "post_norm": norm(COUT) if post else None,
    }  # fmt: skip
    if training and mid and post and mid_act is None:
        kwargs["mid_norm"].bias.requires_grad_(False)  # a shift that the second norm's batch statistics take out again
    if residual:
        padding = dilation * (K - 1) // 2 if padding is None else padding
        out = [(size + 2 * padding - dilation * (K - 1) - 1) // stride + 1 for size in (H, W)]
        kwargs["residual"] = grad(torch.randn(N, COUT, *out).to(dtype).to(memory_format=layout))
    return inputs, kwargs
