"""Kernels that pictures of eight sizes make Triton compile, first call by first call: counted, nothing is run."""

from unittest import mock

import pytest
import torch

from fastseg import frozen
from fastseg.models import create
from fastseg.ops.core.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="CPU tensors take the kernels' path under the interpreter")

SIZES = ((512, 512), (480, 640), (360, 480), (513, 513), (1024, 2048), (500, 375), (333, 500), (768, 768))
MOST = {  # model, options, sizes -> compilations at most, in all and after the first size; folding norms included
    # 2 and, of all sizes, 11 by tiles that shrink with the map
    "mobilenet_v2": ("deeplabv3plus", {"backbone": "mobilenet_v2"}, SIZES[:4], 25, 2),
    "mobilenet_v2, all sizes": ("deeplabv3plus", {"backbone": "mobilenet_v2"}, SIZES, 34, 11),
    "segnet": ("segnet", {}, SIZES[:4], 4, 0),
    "unet": ("unet", {"padding": "same"}, SIZES[:4], 3, 0),
}


LONG = ("mobilenet_v2, all sizes",)


@pytest.mark.parametrize("label", [pytest.param(one, marks=[pytest.mark.long] * (one in LONG)) for one in MOST])
def test_compilations_at_most(label):
    from compilations import key_of

    from benchmarks.studies import launches  # sets the interpreter up

    name, options, sizes, most, most_later = MOST[label]
    model = create(name, 21, **options).eval().to(torch.bfloat16, memory_format=torch.channels_last)
    keys, counts = set(), []
    watch = launches.intercept
    on_launch = lambda kernel, grid, args, kwargs: keys.add(key_of(kernel, args, kwargs))
    with torch.no_grad(), frozen(model), mock.patch.object(launches, "intercept", lambda fn: watch(on_launch)):
        for size in sizes:
            x = torch.empty(1, 3, *size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
            with launches.count():
                model(x)
            counts.append(len(keys))
    assert 0 < counts[-1] <= most and counts[-1] - counts[0] <= most_later, counts


def test_a_key_is_what_the_jit_compiles_for():
    """Channels and alignment are; heights and widths are not."""
    from compilations import compilations

    from fastseg.ops import max_pool2d

    maps = [torch.zeros(1, C, H, W).to(memory_format=torch.channels_last) for C, H, W in ((16, 8, 8), (16, 6, 10))]
    with compilations() as one:
        for x in maps:
            max_pool2d(x, 2)
    assert list(one.values()) == [2]
    with compilations() as two:
        max_pool2d(maps[0], 2)
        max_pool2d(torch.zeros(1, 5, 8, 8).to(memory_format=torch.channels_last), 2)
        max_pool2d(maps[0].half(), 2)
    assert len(two) == 3
