"""The first convolution of a network: the kernel against torch, who runs it, and what it costs."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastseg
from fastseg.ops.conv_act import conv2d_act
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.testing import compare

pytest.importorskip("triton")
from fastseg.kernels.dense_conv.stem import plan
from fastseg.kernels.runtime.conv_sizes import Geometry

CL = torch.channels_last


def make(N=2, C=3, COUT=20, H=13, W=10, K=3, dtype=torch.float32, device="cpu") -> list[Tensor]:
    """The sums reach past 6 and below 0."""
    new = lambda *shape: torch.randn(*shape).to(device, dtype).contiguous(memory_format=CL)
    return [new(N, C, H, W), new(COUT, C, K, K), torch.randn(COUT).to(device, dtype)]


def call(x, weight, bias, act="relu6", stride=2, padding=1, dilation=1) -> Tensor:
    with torch.no_grad():
        return conv2d_act(x, weight, bias, act, (stride, stride), (padding, padding), (dilation, dilation), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes, options",
    [
        ({}, {}),
        ({"C": 1, "COUT": 70, "K": 5}, {"act": "relu", "stride": 1, "padding": 2}),  # two blocks of output channels
        ({"C": 4, "K": 2}, {"act": None, "padding": 0}),
        ({"H": 1, "W": 1}, {"padding": 2}),  # most windows touch nothing
    ],
    ids=str,
)
def test_matches_torch(sizes, options, dtype, device):
    x, weight, bias = make(**sizes, dtype=dtype, device=device)
    with fastseg.explain() as report:
        y = call(x, weight, bias, **options)
    assert [d.path for d in report] == ["triton"] and y.is_contiguous(memory_format=CL)
    options = {"act": "relu6", "stride": 2, "padding": 1} | options
    act = options.pop("act")
    want = F.conv2d(*(t.double().cpu() for t in (x, weight, bias)), **options)
    compare(y, want if act is None else getattr(F, act)(want), terms=75)


def test_who_does_not_run_it(device):
    x, weight, bias = make(device=device)

    def path(x=x, weight=weight, bias=bias, **options) -> str:
        with fastseg.explain() as report:
            call(x, weight, bias, **options)
        return report.decisions[0].path

    assert path() == "triton"
    assert path(x.contiguous()) == path(dilation=2) == "reference"
    assert path(bias=None, act=None) == "reference"  # nothing behind it that a library could not do
    assert path(*make(C=5, device=device)) == path(*make(K=5, device=device)) == "reference"  # too many taps


def test_the_cost_model():
    """Passes over the largest map of the network are what a library's way costs."""
    for N in (1, 16):
        g = Geometry(N, 3, 512, 512, 32, 256, 256, 3, 2, 1, 1)
        chosen = plan(g, torch.bfloat16, 2, tf32=True)
        assert chosen.pays and chosen.other > 1.5 * chosen.microseconds
        assert not plan(g, torch.bfloat16, 0, tf32=True).pays
    assert str(chosen).startswith("one launch: model says own kernel ")


@pytest.mark.skipif(not INTERPRETED, reason="traffic is counted under the interpreter")
def test_traffic_is_what_the_header_says():
    from traffic import count_traffic

    tensors = make(COUT=32, H=16, W=16)
    with count_traffic() as traffic:
        y = call(*tensors)
    total = traffic.total
    assert (total.read_bytes, total.written_bytes, total.launches) == (
        4 * sum(t.numel() for t in tensors), 4 * y.numel(), 1,
    )  # fmt: skip


@pytest.mark.gpu
def test_every_candidate_gives_the_same(device):
    from candidates import check_candidates

    tensors = make(N=3, COUT=32, H=129, W=67, dtype=torch.bfloat16, device=device)
    close = lambda got, want: torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    check_candidates("stem_conv_fwd", lambda: [call(*tensors)], close)
