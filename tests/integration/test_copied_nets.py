"""Nets that people copy, converted, against themselves; and their keys after it."""

import pytest
from copied_nets import BubbliiiingUnet, DeepLab, MilesialUNet, PSPNet
from nets_of_libraries import ready, same_converted

import fastseg
from fastseg.ops.core.dispatch import INTERPRETED

NETS = {
    "milesial": (MilesialUNet, {"unet_up": 2}),
    "milesial, transposed": (lambda: MilesialUNet(bilinear=False), {}),
    "bubbliiiing unet": (BubbliiiingUnet, {"unet_up_bubbliiiing": 1}),
    "bubbliiiing pspnet": (PSPNet, {"psp_bubbliiiing": 1}),
    "bubbliiiing deeplab": (DeepLab, {"deeplab_bubbliiiing": 1, "aspp_bubbliiiing": 1}),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("size", [(16, 24), (18, 15)], ids=["even", "odd"])
def test_copied_nets(name, size):
    if INTERPRETED and (name != "milesial" or size != (16, 24)):
        pytest.skip("one net is enough under the interpreter")
    make, want = NETS[name]
    size = (18, 14) if size == (18, 15) and name == "bubbliiiing unet" else size  # it does not pad
    taken = same_converted(ready(make().double()), size, example=True)
    assert {rule: count for rule, count in taken.items() if rule != "sequential"} == want


def test_milesials_text_needs_no_example():
    model = MilesialUNet()
    keys = list(model.state_dict())
    fastseg.convert(model)
    assert [row.module for row in fastseg.conversion(model).converted if row.rule == "unet_up"] == ["up1", "up2"]
    assert list(model.state_dict()) == keys and "up1.conv.double_conv.0.weight" in keys
