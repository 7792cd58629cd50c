"""Launches of an eval forward at 512^2, one image, as CUDA would see them: counted on a CPU, nothing is run."""

import pytest

from fastseg.ops.core.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="CPU tensors take the kernels' path under the interpreter")

MOST = {  # model and options -> launches at most, in a Runner or frozen and at each call; and torch's at least
    "mobilenet_v2": ("deeplabv3plus", {"backbone": "mobilenet_v2"}, 60, 84, 186),
    "mobilenet_v2, stride 8": ("deeplabv3plus", {"backbone": "mobilenet_v2", "output_stride": 8}, 60, 84, 186),
    "xception": ("deeplabv3plus", {"backbone": "xception"}, 100, 126, 390),
    "xception google": ("deeplabv3plus", {"backbone": "xception", "preset": "google"}, 100, 126, 390),
    "v3 resnet50": ("deeplabv3", {}, 90, 134, 190),
}


TWINS = {"mobilenet_v2, stride 8", "xception google"}  # of the same blocks as the one before
LABELS = [pytest.param(label, marks=[pytest.mark.long] if label in TWINS else []) for label in MOST]


@pytest.mark.parametrize("label", LABELS)
def test_launches_at_most(label):
    from benchmarks.studies import launches  # sets the interpreter up

    name, options, most_kept, most, eager_least = MOST[label]
    eager, ours, kept = launches.of_model(name, options)
    assert kept.total() <= most_kept and kept["_fold_norm_fwd_kernel"] == 0, kept
    assert ours.total() <= most, ours
    assert eager.total() >= eager_least, eager  # the counter sees them


@pytest.mark.parametrize(("C", "N"), [(320, 1), (2048, 16)])
def test_aspp_is_two_launches_beside_the_pooled_vector(C, N):
    """Branches with their tables, projection; and a mean, its 1x1 convolution, its share of the projection."""
    import torch

    from benchmarks.studies import launches
    from fastseg.nn import ASPP

    aspp = ASPP(C).eval().to(torch.bfloat16, memory_format=torch.channels_last)
    x = torch.zeros(N, C, 32, 32, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    counts = launches.launches(aspp, x)
    pooled = counts["mean"] + counts["addmm"]
    assert counts["_atrous_conv_fwd_kernel"] == 1 and pooled == 2
    assert counts.total() - pooled - counts["_atrous_conv_tables_kernel"] - 1 <= 3, counts
    again = launches.launches(aspp, x, frozen=False)
    assert again.total() <= counts.total() + 8, again  # folded at each call, or a norm after the convolution
