"""A batch norm whose weight or bias was taken away, which torch's own computes: every op that takes a norm."""

import pytest
import torch

from fastseg.ops import (
    BatchNormArgs,
    batch_norm_act,
    batch_norm_act_max_pool2d,
    separable_conv2d,
    upsample_sum,
)
from fastseg.ops.batch_norm_act import batch_norm_act_ref
from fastseg.ops.batch_norm_act_max_pool import batch_norm_act_max_pool2d_ref
from fastseg.ops.separable_conv import separable_conv2d_ref
from fastseg.ops.upsample_sum import upsample_sum_ref

C = 4
CALLS = {
    "batch_norm_act": (batch_norm_act, batch_norm_act_ref, lambda op, x, w, norm: op(x, norm, "relu")),
    "batch_norm_act_max_pool2d": (
        batch_norm_act_max_pool2d, batch_norm_act_max_pool2d_ref, lambda op, x, w, norm: op(x, norm, "relu"),
    ),
    "separable_conv2d": (
        separable_conv2d, separable_conv2d_ref,
        lambda op, x, w, norm: op(x, w[:, :1], w[:, :, :1, :1], mid_norm=norm, post_norm=norm),
    ),
    "upsample_sum": (upsample_sum, upsample_sum_ref, lambda op, x, w, norm: op(x, [x[:, :, :2, :3]], norm=norm)),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["running", "batch"])
@pytest.mark.parametrize("missing", ["weight", "bias"])
@pytest.mark.parametrize("name", CALLS)
def test_as_torchs(name, missing, training, device):
    op, ref, call = CALLS[name]
    draw = lambda *shape: torch.randn(*shape, device=device)
    x, w, one = draw(2, C, 5, 6), draw(C, C, 3, 3), torch.rand(C, device=device) + 0.5
    results = []
    for each in (op, ref):
        leaves = [t.detach().clone().requires_grad_() for t in (x, w, one)]
        norm = BatchNormArgs(torch.zeros_like(one), torch.ones_like(one), training=training)
        norm = norm._replace(**{"bias" if missing == "weight" else "weight": leaves[2]})
        y = call(each, leaves[0], leaves[1], norm)
        grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
        results.append([y.detach(), *(g for g in grads if g is not None), *norm[:2]])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
