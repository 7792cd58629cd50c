"""torch's switches for fp32 convolutions, old names and new: every op runs under each, and its kernels follow."""

import pytest
import torch
from op_calls import LAYOUTS, ROWS, Draw

from fastseg.kernels.runtime import tensors
from fastseg.kernels.runtime.launch import intercept
from fastseg.models import create

backends = torch.backends
SWITCHES = {  # how it is set -> what fp32 convolutions then are
    "allow_tf32 = True": (lambda: setattr(backends.cudnn, "allow_tf32", True), "tf32"),
    "allow_tf32 = False": (lambda: setattr(backends.cudnn, "allow_tf32", False), "ieee"),
    "cudnn.conv = ieee": (lambda: setattr(backends.cudnn.conv, "fp32_precision", "ieee"), "ieee"),
    "cudnn.conv = tf32": (lambda: setattr(backends.cudnn.conv, "fp32_precision", "tf32"), "tf32"),
    "cudnn = ieee": (lambda: setattr(backends.cudnn, "fp32_precision", "ieee"), "ieee"),
    "all = ieee": (lambda: setattr(backends, "fp32_precision", "ieee"), "ieee"),
    "all = tf32": (lambda: setattr(backends, "fp32_precision", "tf32"), "tf32"),
}
OF_OTHER_NAMES = ("cudnn = ieee", "all = ieee")  # torch 2.11 and 2.12 keep "tf32" of convolutions under these


@pytest.fixture(params=SWITCHES)
def switched(request):
    """What kernels shall multiply with; the switches are as they were afterwards."""
    owners = [backends.cudnn.conv, backends.cudnn, backends]
    saved = [owner.fp32_precision for owner in owners]
    backends.cudnn.allow_tf32 = True
    set_it, wanted = SWITCHES[request.param]
    set_it()
    if request.param in OF_OTHER_NAMES:
        wanted = "tf32" if backends.cudnn.conv.fp32_precision == "tf32" else "ieee"
    yield wanted
    for owner, value in reversed(list(zip(owners, saved, strict=True))):
        owner.fp32_precision = value


def test_every_op_follows_the_switch(device, switched):
    asked = set()

    def on_launch(kernel, grid, args, kwargs):  # not run: what they would multiply with is the question
        if "PRECISION" in kwargs:
            asked.add((kernel.fn.__name__, kwargs["PRECISION"]))

    with intercept(on_launch):
        for name, row in ROWS.items():
            draw = Draw(LAYOUTS["channels_last" if "channels_last" in row.layouts else "contiguous"], device=device)
            function, inputs = row.draw(draw)
            y = function(*inputs)
            if row.grad and "int64" not in name and "unpool" not in name:  # foreign indices of a pool that did not run
                y.sum().backward()
    assert {precision for _, precision in asked} == {switched}
    assert len(asked) == 9, sorted(asked)  # kernels with a product


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_models_run_whatever_the_switch_is(device, switched, dtype):
    model = create("deeplabv3plus", 2, backbone="mobilenet_v2").eval()
    model = model.to(device, dtype, memory_format=torch.channels_last)
    x = torch.zeros(1, 3, 32, 32, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    asked = []
    with torch.no_grad(), intercept(lambda kernel, grid, args, kwargs: asked.append(kwargs.get("PRECISION"))):
        assert model(x).shape == (1, 2, 32, 32)
    wanted = switched if dtype == torch.float32 else "ieee"
    assert set(asked) - {None} == {wanted}


@pytest.mark.parametrize(
    ("arch", "rounded"),
    [("", True), ("gfx942:sramecc+:xnack-", True), ("gfx90a", False), ("gfx950", False), ("gfx1100", False)],
)
def test_amd_rounds_to_tf32_on_mi300_alone(monkeypatch, arch, rounded):
    """Triton's AMD backend compiles no tf32 product for another chip."""
    monkeypatch.setattr(backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.version, "hip", "7.0" if arch else None)
    monkeypatch.setattr(tensors, "amd_arch", lambda device: arch)
    assert tensors.tf32(torch.float32) is rounded
    assert tensors.precision(torch.zeros(1)) == ("tf32" if rounded else "ieee")
    assert not tensors.tf32(torch.bfloat16)


def test_the_chip_asked_for_is_the_tensors_own(monkeypatch):
    class Properties:
        gcnArchName = "gfx942:sramecc+:xnack-"

    asked = []
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or Properties)
    assert tensors.amd_arch(torch.device("cuda:1")) == Properties.gcnArchName
    assert tensors.amd_arch(torch.device("cpu")) == ""
    assert asked == [torch.device("cuda:1")]
