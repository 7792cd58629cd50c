"""What only a GPU shows: past 2^31 elements, streams, graphs, repeated bits, memory, every candidate configuration."""

import pytest
import torch
from candidates import check_candidates
from torch import Tensor

import fastseg
from fastseg.ops import atrous_conv2d
from fastseg.ops.atrous_conv2d import atrous_branches

pytestmark = pytest.mark.gpu

RATES = [1, 6, 12, 18]


@pytest.fixture(autouse=True)
def _own():
    """The own kernels, whatever the cost model says."""
    with fastseg.force("atrous_branches", "kernel"):
        yield


def make(N=2, C=320, H=33, W=37, COUT=256, dtype=torch.bfloat16) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    random = lambda *size: torch.randn(size, device="cuda").to(dtype)
    x = random(N, C, H, W).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = [random(COUT, C, K, K).div(K * C**0.5).requires_grad_() for K in (1, 3, 3, 3)]
    return x, weights, [random(COUT).requires_grad_() for _ in weights]


def close(got: Tensor, want: Tensor) -> None:
    """bf16 results that differ by the order of their sums: a few units in the last place of the largest value."""
    assert (got.float() - want.float()).abs().max() <= 2**-6 * want.float().abs().max()


def step(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    y = atrous_branches(x, weights, biases, RATES)  # no activation: a unit in the last place would flip its gradient
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad(y, [x, *weights, *biases], dy)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_equals_cudnn(dtype):
    tensors = make(dtype=dtype)
    got = step(*tensors)
    with fastseg.reference():
        want = step(*tensors)
    for g, w in zip(got, want, strict=True):
        close(g, w)


@pytest.mark.parametrize("switch", [False, True], ids=["ieee", "tf32"])
def test_fp32_follows_the_switch(switch, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", switch)
    x, weights, biases = make(C=512, dtype=torch.float32)
    with torch.no_grad():
        got = atrous_branches(x, weights, biases, RATES)
        with fastseg.reference():
            want = atrous_branches(x.double(), [w.double() for w in weights], [b.double() for b in biases], RATES)
    error = float((got - want).norm() / want.norm())
    assert 1e-5 < error < 1e-3 if switch else error < 1e-6


def test_past_2_31_elements():
    x, weights, biases = make(N=1, C=64, COUT=64, H=8, W=8)
    x = torch.empty(70, 512, 960, 64, dtype=torch.bfloat16, device="cuda").permute(0, 3, 1, 2).normal_()
    with torch.no_grad():
        y = atrous_conv2d(x, weights[1], biases[1], 100)
        for image in (0, 34, 69):  # the last begins past 2^31
            close(y[image], atrous_conv2d(x[image : image + 1], weights[1], biases[1], 100)[0])


@pytest.mark.parametrize("deterministic", [False, True])
def test_twenty_runs_give_the_same_bits(deterministic):
    tensors = make()
    torch.use_deterministic_algorithms(deterministic)
    first = None
    for _ in range(20):
        results = step(*tensors)
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_waits_for_its_stream():
    x, weights, biases = make()
    with torch.no_grad():
        want = atrous_branches(x, weights, biases, RATES)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            late = torch.zeros_like(x)
            torch.cuda._sleep(200_000_000)  # about 0.1 s: a launch on another stream would read zeros
            late.copy_(x)
            got = atrous_branches(late, weights, biases, RATES)
        stream.synchronize()
    assert torch.equal(got, want)


def test_graph_capture_and_replay():
    x, weights, biases = make()
    with torch.no_grad():
        atrous_branches(x, weights, biases, RATES, "relu")  # compiles, and copies the tables
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = atrous_branches(x, weights, biases, RATES, "relu")
        x.normal_()
        graph.replay()
        assert torch.equal(y, atrous_branches(x, weights, biases, RATES, "relu"))


def test_evaluation_allocates_its_output_alone():
    x, weights, biases = make(N=8)
    weights = [w.detach().contiguous(memory_format=torch.channels_last) for w in weights]
    with torch.no_grad():
        atrous_branches(x, weights, biases, RATES, "relu")
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = atrous_branches(x, weights, biases, RATES, "relu")
        extra = torch.cuda.max_memory_allocated() - before
    assert extra <= y.nbytes + 2**16


@pytest.mark.parametrize("kernel", ["atrous_conv_fwd", "atrous_conv_bwd_weight"])
def test_every_candidate_gives_the_same(kernel):
    tensors = make(C=136, COUT=264)
    check_candidates(kernel, lambda: step(*tensors), close)
