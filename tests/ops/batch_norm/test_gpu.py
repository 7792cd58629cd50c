"""What only a GPU shows of batch norm + residual + activation: sizes past 2^31, streams, graphs, memory, candidates."""

import pytest
import torch
from candidates import check_candidates
from torch.nn import functional as F

from fastseg.kernels.runtime import config
from fastseg.ops import BatchNormArgs, batch_norm_act

pytestmark = pytest.mark.gpu
CL = torch.channels_last
LAYOUTS = pytest.mark.parametrize("last", [True, False], ids=["channels_last", "NCHW"])


def image(*shape, last=True, dtype=torch.bfloat16):
    x = torch.randn(shape, device="cuda").to(dtype)
    return x.contiguous(memory_format=CL) if last else x


def norm_of(channels: int, training: bool = True) -> BatchNormArgs:
    vector = lambda: torch.rand(channels, device="cuda") + 0.5
    return BatchNormArgs(vector(), vector(), vector().requires_grad_(), vector().requires_grad_(), training)


def both_ways(x, norm, residual=None):
    y = batch_norm_act(x, norm, "relu", residual)
    wanted = [t for t in (x, norm.weight, norm.bias, residual) if t is not None]
    return [y, *torch.autograd.grad(y, wanted, torch.ones_like(y))]


def close(got, want) -> None:
    """bf16 results that differ by the order of their sums: a few units in the last place of the largest value."""
    assert (got.float() - want.float()).abs().max() <= 2**-6 * want.float().abs().max()


@LAYOUTS
def test_past_2_31_elements(last):
    x = torch.empty(70, 64, 512, 960, dtype=torch.bfloat16, device="cuda")
    x = x.to(memory_format=CL) if last else x
    x.normal_()
    norm = norm_of(64, training=False)
    y = batch_norm_act(x, norm, "relu")
    for n in (0, 34, 69):  # the last begins past 2^31
        close(y[n], F.relu(F.batch_norm(x[n : n + 1], *norm))[0])


@LAYOUTS
@pytest.mark.parametrize("deterministic", [False, True])
def test_twenty_runs_give_the_same_bits(deterministic, last):
    x, r = (image(4, 64, 45, 61, last=last).requires_grad_() for _ in range(2))
    torch.use_deterministic_algorithms(deterministic)
    first = both_ways(x, norm := norm_of(64), r)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, both_ways(x, norm, r), strict=True))


def test_waits_for_its_stream():
    x, norm = image(2, 64, 64, 64), norm_of(64)
    want = batch_norm_act(x, norm, "relu")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(200_000_000)  # about 0.1 s: a launch on another stream would read zeros
        late.copy_(x)
        got = batch_norm_act(late, norm, "relu")
    stream.synchronize()
    assert torch.equal(got, want)


def test_graph_capture_and_replay():
    x, norm = image(2, 64, 64, 64), norm_of(64)
    with torch.no_grad():
        batch_norm_act(x, norm, "relu", x)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = batch_norm_act(x, norm, "relu", x)
        x.normal_()
        graph.replay()
        assert torch.equal(y, batch_norm_act(x, norm, "relu", x))


def test_no_wait_for_the_device():
    x, norm = image(2, 64, 64, 64).requires_grad_(), norm_of(64)
    both_ways(x, norm)
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_ways(x, norm)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_allocates_its_output_alone():
    x, norm = image(8, 64, 256, 256).requires_grad_(), norm_of(64)
    batch_norm_act(x, norm, "relu")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = batch_norm_act(x, norm, "relu")
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + 2**21  # the tiles' statistics


KERNELS = [name for name in config.kernels() if name.startswith(("batch_norm", "batch_stats"))]


@pytest.mark.parametrize("kernel", KERNELS)
@LAYOUTS
def test_every_candidate_gives_the_same(last, kernel):
    x, r = (image(2, 136, 33, 37, last=last).requires_grad_() for _ in range(2))
    norm = norm_of(136)
    check_candidates(kernel, lambda: both_ways(x, norm, r), close)
