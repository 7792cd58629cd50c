"""What nets keep for their backward, on fake tensors of full size: at most 0.55 of eager's."""

import pytest

from benchmarks.workloads import ModelShape
from fastseg.ops.core.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="CPU tensors take the kernels' path under the interpreter")


@pytest.mark.parametrize(
    "model",
    [
        "deeplabv3plus_mobilenet_v2",
        pytest.param("deeplabv3plus_xception65", marks=pytest.mark.long),
        pytest.param("deeplabv3plus_xception65_dense", marks=pytest.mark.long),
        "segnet",
        "unet",
    ],
)
def test_at_most_055_of_eager(model):
    from benchmarks.studies import saved_bytes  # sets the interpreter up

    eager, ours, *_ = saved_bytes.kept_by_model(ModelShape(model, N=2))
    assert ours <= 0.55 * eager
