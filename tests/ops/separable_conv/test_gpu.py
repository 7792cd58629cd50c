"""What only a GPU shows: past 2^31 elements, streams, graphs, threads, memory, every candidate configuration."""

import threading

import pytest
import torch
from candidates import check_candidates
from separable_inputs import make
from torch import Tensor

import fastseg
from fastseg.kernels.runtime import config
from fastseg.ops import separable_conv2d

pytestmark = pytest.mark.gpu

HALF = {"dtype": torch.bfloat16, "device": "cuda"}


def close(got: Tensor, want: Tensor) -> None:
    """bf16 results that differ by the order of their sums: a few units in the last place of the largest value."""
    assert (got.float() - want.float()).abs().max() <= 2**-6 * want.float().abs().max()


def test_past_2_31_elements():
    inputs, kwargs = make("aspp", N=1, C=64, COUT=64, H=8, W=8, **HALF)
    x = torch.empty(70, 512, 960, 64, dtype=torch.bfloat16, device="cuda").permute(0, 3, 1, 2).normal_()
    with torch.no_grad():
        y = separable_conv2d(x, *inputs[1:], **kwargs)
        for image in (0, 34, 69):  # the last begins past 2^31
            assert torch.equal(y[image], separable_conv2d(x[image : image + 1], *inputs[1:], **kwargs)[0])


def test_more_images_than_a_grid_axis_holds():
    inputs, kwargs = make("aspp", N=100_000, C=8, COUT=8, H=3, W=3, training=True, **HALF)
    y = separable_conv2d(*inputs, **kwargs)
    y.sum().backward()
    with torch.no_grad(), fastseg.reference():
        close(y, separable_conv2d(*inputs, **kwargs))


@pytest.mark.parametrize("deterministic", [False, True])
def test_twenty_runs_give_the_same_bits(deterministic):
    inputs, kwargs = make("aspp", N=4, C=304, COUT=256, H=65, W=33, training=True, **HALF)
    torch.use_deterministic_algorithms(deterministic)
    first = None
    for _ in range(20):
        y = separable_conv2d(*inputs, **kwargs)
        results = [y, *torch.autograd.grad(y, inputs[:3], torch.ones_like(y))]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_waits_for_its_stream():
    inputs, kwargs = make("aspp", N=2, C=64, COUT=64, H=64, W=64, **HALF)
    with torch.no_grad():
        want = separable_conv2d(*inputs, **kwargs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            x = torch.zeros_like(inputs[0])
            torch.cuda._sleep(200_000_000)  # about 0.1 s: a launch on another stream would read zeros
            x.copy_(inputs[0])
            got = separable_conv2d(x, *inputs[1:], **kwargs)
        stream.synchronize()
    assert torch.equal(got, want)


def test_graph_capture_and_replay():
    inputs, kwargs = make("aspp", N=2, C=64, COUT=64, H=64, W=64, **HALF)
    with torch.no_grad():
        separable_conv2d(*inputs, **kwargs)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = separable_conv2d(*inputs, **kwargs)
        inputs[0].normal_()
        graph.replay()
        assert torch.equal(y, separable_conv2d(*inputs, **kwargs))


def test_evaluation_allocates_its_output_alone():
    inputs, kwargs = make("mobilenet", N=8, C=144, COUT=24, H=128, W=128, **HALF)
    with torch.no_grad():
        separable_conv2d(*inputs, **kwargs)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = separable_conv2d(*inputs, **kwargs)
        extra = torch.cuda.max_memory_allocated() - before
    assert extra <= y.nbytes + 2**16  # the depthwise map would be 6 times y


def test_two_threads():
    inputs, kwargs = make("aspp", N=2, C=64, COUT=64, H=64, W=64, **HALF)
    results, errors = {}, []

    def work(name: int) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                results[name] = [separable_conv2d(*inputs, **kwargs) for _ in range(50)]
                torch.cuda.current_stream().synchronize()
        except Exception as error:
            errors.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(y, results[0][0]) for ys in results.values() for y in ys)


SWEPT = [name for name in config.kernels() if name.startswith(("separable_conv", "batch_"))]


@pytest.mark.parametrize("kernel", SWEPT)
def test_every_candidate_gives_the_same(kernel):
    inputs, kwargs = make("aspp", N=2, C=136, COUT=264, H=33, W=37, training=True, **HALF)

    def run() -> list[Tensor]:
        y = separable_conv2d(*inputs, **kwargs)
        return [y, *torch.autograd.grad(y, inputs[:3], torch.ones_like(y))]

    check_candidates(kernel, run, close)
