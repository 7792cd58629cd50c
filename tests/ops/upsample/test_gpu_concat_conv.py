"""What only a GPU shows of the decoder's convolution: real sizes, past 2^31 elements, graphs, every candidate."""

import pytest
import torch
from candidates import check_candidates

import fastseg
from fastseg.ops import upsample_concat_conv2d as op
from fastseg.ops.registered.upsample_taps import fused_taps
from fastseg.ops.upsample_concat_conv import upsample_concat_conv2d_ref as ref

pytestmark = pytest.mark.gpu

CL = torch.channels_last


def draw(N=2, h=33, w=40, scale=4, C=256, rest=48, COUT=256, dtype=torch.bfloat16):
    made = (N, C, h, w), (N, rest, h * scale, w * scale), (COUT, C + rest, 3, 3)
    deep, low, weight = (torch.randn(s, device="cuda", dtype=dtype).contiguous(memory_format=CL) for s in made)
    return deep, low, weight * (9 * (C + rest)) ** -0.5, torch.randn(COUT, device="cuda", dtype=dtype)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_decoder(dtype, align_corners):
    """Against fp64; upsampled first, with its own roundings, is as far away."""
    tensors = draw(dtype=dtype)
    options = {"act": "relu", "align_corners": align_corners}
    with torch.no_grad(), fastseg.explain() as report:
        y = op(*tensors, **options)
        plain = ref(*tensors, **options)
        want = ref(*(t.double() for t in tensors), **options)
    assert report.decisions[-1].path == "triton", report
    error, theirs = ((t.double() - want).abs().max().item() for t in (y, plain))
    assert error <= 2 * theirs + 1e-5, (error, theirs)


def test_past_2_31_elements():
    taps = torch.randn(3, 20, 128, 128, 3, 256, device="cuda", dtype=torch.bfloat16)
    base = torch.randn(20, 256, 680, 680, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=CL)
    y = fused_taps(taps, base, None, "relu", (680, 680), True)
    for image in (0, 9, 19):
        alone = fused_taps(
            taps[:, image : image + 1].contiguous(), base[image : image + 1], None, "relu", (680, 680), True
        )
        assert torch.equal(y[image], alone[0])


def test_the_same_bits_and_a_graph():
    tensors = draw()
    with torch.no_grad():
        first = op(*tensors, act="relu")
        assert all(torch.equal(first, op(*tensors, act="relu")) for _ in range(9))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = op(*tensors, act="relu")
        tensors[0].normal_()
        graph.replay()
        torch.testing.assert_close(y, op(*tensors, act="relu"), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("COUT", [256, 36, 21])
def test_every_candidate_gives_the_same(COUT):
    taps = torch.randn(3, 2, 17, 9, 3, COUT, device="cuda", dtype=torch.bfloat16)
    base = torch.randn(2, COUT, 65, 37, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=CL)
    run = lambda: [fused_taps(taps, base, None, "relu", (65, 37), False)]
    check_candidates("upsample_conv_fwd", run, lambda g, w: torch.testing.assert_close(g, w, atol=1e-2, rtol=1e-2))
