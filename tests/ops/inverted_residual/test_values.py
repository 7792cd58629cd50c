"""The whole inverted residual block against torch, block by block of the kernel; and what decides between the forms."""

import pytest
import torch
from torch import Tensor

from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.inverted_residual import inverted_residual, inverted_residual_ref
from fastseg.testing import compare

pytest.importorskip("triton")
from fastseg.kernels.inverted_residual.cost import group_of, plan
from fastseg.kernels.runtime import config
from fastseg.kernels.runtime.conv_sizes import Geometry

CL = torch.channels_last


def make(N=2, C=5, HIDDEN=20, COUT=7, H=9, W=11, dtype=torch.float32, device="cpu", layout=CL) -> list[Tensor]:
    """Every activation passes both of its bounds; a bias that is positive, so that act(bias) is not 0."""
    new = lambda *shape, scale=1.0: (torch.randn(*shape) * scale).to(device, dtype)
    return [
        new(N, C, H, W).contiguous(memory_format=layout),
        new(HIDDEN, C, 1, 1, scale=3 / C**0.5), new(HIDDEN) + 1, new(HIDDEN, 1, 3, 3), new(HIDDEN) + 1,
        new(COUT, HIDDEN, 1, 1, scale=HIDDEN**-0.5), new(COUT),
    ]  # fmt: skip


def plain(*tensors, **options):
    return inverted_residual_ref(*(t.double().cpu() for t in tensors), **options)


CASES = {  # sizes, options, launch configuration
    "default": ({}, {}, {}),
    "stride 2": ({}, {"stride": 2}, {}),
    "stride 2, even": ({"H": 8, "W": 12}, {"stride": 2}, {"GROUP": 2}),
    "dilation 2": ({}, {"dilation": 2}, {}),
    "dilation larger than the map": ({"H": 3, "W": 4}, {"dilation": 5}, {}),
    "stride 2, dilation 2": ({}, {"stride": 2, "dilation": 2}, {}),
    "residual, relu": ({"COUT": 5}, {"residual": True, "act": "relu"}, {"GROUP": 2}),
    # the width is no multiple of the group; blocks of hidden channels; tiles in both directions
    "two outputs a row": ({}, {}, {"GROUP": 2, "BLOCK_H": 4, "BLOCK_W": 4, "BLOCK_K": 16}),
    "four outputs a row": ({"HIDDEN": 40}, {}, {"GROUP": 4, "BLOCK_H": 4, "BLOCK_W": 4, "BLOCK_K": 16}),
    "four outputs a row, stride 2": ({"W": 13}, {"stride": 2}, {"GROUP": 4, "BLOCK_K": 16}),
    "one pixel": ({"H": 1, "W": 1}, {"stride": 2}, {"GROUP": 4}),
    "17 channels": ({"C": 17, "COUT": 17, "H": 5, "W": 5}, {"residual": True}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_torch(case, device):
    sizes, options, values = CASES[case]
    inputs = make(**sizes, device=device)
    with config.override("inverted_residual_fwd", **values):
        y = inverted_residual(*inputs, **options)
    assert y.is_contiguous(memory_format=CL)
    compare(y, plain(*inputs, **options), terms=200)


@pytest.mark.parametrize("dtype, layout", [(torch.float16, CL), (torch.bfloat16, torch.contiguous_format)], ids=str)
def test_half(dtype, layout, device):
    inputs = make(C=16, HIDDEN=48, COUT=16, dtype=dtype, layout=layout, device=device)
    y = inverted_residual(*inputs, residual=True)
    want = plain(*inputs, residual=True)
    assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
    assert (y.double().cpu() - want).norm() < 2 * torch.finfo(dtype).eps * want.norm()


def test_outside_the_image_the_expanded_map_is_zero(device):
    """Not act(bias): with weights of 0 and a bias of 1 the depthwise sum counts the taps inside."""
    x, *weights = make(N=1, C=4, HIDDEN=16, COUT=16, H=4, W=5, device=device)
    expand, expand_bias, dw, dw_bias, project, project_bias = (torch.zeros_like(t) for t in weights)
    expand_bias += 1
    dw += 0.5
    project[torch.arange(16), torch.arange(16)] = 1.0
    y = inverted_residual(x, expand, expand_bias, dw, dw_bias, project, project_bias)
    rows, cols = torch.tensor([2.0, 3, 3, 2]), torch.tensor([2.0, 3, 3, 3, 2])
    assert torch.equal(y[0, 3].cpu(), rows[:, None] * cols * 0.5)


def test_nan_reaches_its_neighbours_alone(device):
    inputs = make(N=1, H=7, W=7, device=device)
    inputs[0][0, 2, 3, 3] = float("nan")
    for group in (1, 2, 4):
        with config.override("inverted_residual_fwd", GROUP=group):
            y = inverted_residual(*inputs)
        want = torch.zeros(7, 7, dtype=torch.bool)
        want[2:5, 2:5] = True
        assert torch.equal(y.isnan().all(1)[0].cpu(), want) and torch.equal(y.isnan().any(1)[0].cpu(), want)


def test_empty_batch(device):
    assert inverted_residual(*make(N=0, device=device), stride=2).shape == (0, 7, 5, 6)


def test_bad_arguments():
    inputs = make()
    with pytest.raises(ValueError, match=r"depthwise \(20, 1, 3, 2\); it must be \(20, 1, 3, 3\)"):
        inverted_residual(*inputs[:3], inputs[3][..., :2], *inputs[4:])
    with pytest.raises(ValueError, match="act is 'leaky_relu'"):
        inverted_residual(*inputs, act="leaky_relu")
    with pytest.raises(ValueError, match="a residual needs stride 1, got 2, and 5 channels, got 7"):
        inverted_residual(*inputs, stride=2, residual=True)


@pytest.mark.skipif(not INTERPRETED, reason="traffic is counted under the interpreter")
def test_traffic_is_what_the_header_says():
    """The input from memory once, and neither of the hidden maps; the residual is in the cache."""
    from traffic import count_traffic

    inputs = make(C=16, HIDDEN=32, COUT=16, H=16, W=16)
    with count_traffic() as traffic:
        y = inverted_residual(*inputs, residual=True)
    total = traffic.total
    assert total.launches == 1
    assert total.read_bytes == 4 * sum(t.numel() for t in inputs)
    assert total.written_bytes == 4 * y.numel()


def block(N, C, HIDDEN, COUT, side, stride=1, dilation=1):
    out = -(-side // stride)
    return Geometry(N, C, side, side, COUT, out, out, 3, stride, dilation, dilation), HIDDEN, torch.bfloat16


def test_the_cost_model():
    """MobileNetV2 at 512^2: early strided blocks whole, wide and dilated ones and small maps in parts."""
    whole = lambda *args, **kwargs: plan(*block(*args, **kwargs), tf32=True).pays
    for N in (1, 4, 16):
        assert whole(N, 16, 96, 24, 256, stride=2)
        assert not whole(N, 96, 576, 96, 32)
        assert not whole(N, 160, 960, 160, 32, dilation=2)
    assert whole(16, 24, 144, 32, 128, stride=2) and whole(16, 32, 192, 64, 64, stride=2)
    assert not whole(16, 64, 384, 64, 32)
    assert not whole(1, 32, 192, 64, 64, stride=2)  # 16 tiles for 132 multiprocessors
    text = str(plan(*block(16, 16, 96, 24, 256, stride=2), tf32=True))
    assert text.startswith("whole block: model says whole 60.") and "expansion and fused pair 108." in text


def test_outputs_of_one_row():
    half = torch.bfloat16
    assert [group_of(2**18, 24, c, 1, 1, half) for c in (24, 64, 96)] == [4, 2, 1]
    assert group_of(2**18, 24, 24, 1, 2, half) == 1  # dilation: neighbours share nothing
    assert group_of(2**14, 16, 24, 2, 1, half) == 1  # few tiles: more of them


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2}], ids=str)
def test_every_candidate_gives_the_same(options, device):
    from candidates import check_candidates

    inputs = make(N=3, C=24, HIDDEN=144, COUT=32, H=65, W=63, dtype=torch.bfloat16, device=device)
    close = lambda got, want: torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    check_candidates("inverted_residual_fwd", lambda: [inverted_residual(*inputs, **options)], close)


@pytest.mark.gpu
def test_past_2_31_elements(device):
    _, *weights = make(N=1, C=24, HIDDEN=144, COUT=24, dtype=torch.bfloat16, device=device)
    x = torch.empty(180, 720, 720, 24, dtype=torch.bfloat16, device=device).permute(0, 3, 1, 2).normal_()
    y = inverted_residual(x, *weights, residual=True)
    for image in (0, 90, 179):  # the last begins past 2^31
        assert torch.equal(y[image], inverted_residual(x[image : image + 1], *weights, residual=True)[0])


@pytest.mark.gpu
def test_allocates_its_output_alone(device):
    inputs = make(N=8, C=16, HIDDEN=96, COUT=24, H=256, W=256, dtype=torch.bfloat16, device=device)
    inverted_residual(*inputs, stride=2)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = inverted_residual(*inputs, stride=2)
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + 2**16
