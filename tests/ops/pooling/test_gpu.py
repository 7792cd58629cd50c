"""What only a GPU shows of pooling and unpooling: sizes past 2^31, streams, graphs, hostile indices, candidates."""

import subprocess
import sys

import pytest
import torch
from candidates import check_candidates
from torch.nn import functional as F

from fastseg.kernels.runtime import config
from fastseg.ops import BatchNormArgs, batch_norm_act_max_pool2d, max_pool2d, max_unpool2d

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:max_unpool")]
CL = torch.channels_last


def image(*shape, last=True, dtype=torch.bfloat16):
    x = torch.randn(shape, device="cuda").to(dtype)
    return x.contiguous(memory_format=CL) if last else x


def there_and_back(x, index_format="compact"):
    values, indices = max_pool2d(x, 2, return_indices=True, index_format=index_format)
    return values, max_unpool2d(values, indices, 2, output_size=x.shape[-2:])


@pytest.mark.parametrize("index_format", ["compact", "int64"])
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "NCHW"])
def test_past_2_31_elements(last, index_format):
    x = torch.empty(70, 64, 512, 960, dtype=torch.bfloat16, device="cuda")
    x = x.to(memory_format=CL) if last else x
    x.normal_()
    values, y = there_and_back(x, index_format)
    for image_ in (0, 34, 69):  # the last begins past 2^31
        part = x[image_ : image_ + 1]
        want, indices = F.max_pool2d(part, 2, return_indices=True)
        assert torch.equal(values[image_], want[0])
        assert torch.equal(y[image_], F.max_unpool2d(want, indices, 2)[0])


def test_more_planes_than_a_grid_axis_holds():
    x = image(1, 100_000, 4, 4, last=False)
    values, y = there_and_back(x)
    assert torch.equal(values, F.max_pool2d(x, 2)) and torch.equal(y.amax((2, 3)), x.amax((2, 3)).clamp_min(0))


@pytest.mark.parametrize("deterministic", [False, True])
def test_twenty_runs_give_the_same_bits(deterministic):
    x = image(4, 64, 45, 61).requires_grad_()
    torch.use_deterministic_algorithms(deterministic)
    vector = lambda: torch.rand(64, device="cuda") + 0.5
    norm = BatchNormArgs(vector(), vector(), vector().requires_grad_(), vector().requires_grad_(), True)
    first = None
    for _ in range(20):
        y = max_pool2d(x, 3, 2, 1)
        z = batch_norm_act_max_pool2d(x, norm, "relu")
        results = [y, z, *torch.autograd.grad(y.sum() + z.sum(), (x, norm.weight, norm.bias))]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_waits_for_its_stream():
    x = image(2, 64, 64, 64)
    want = there_and_back(x)[1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(200_000_000)  # about 0.1 s: a launch on another stream would read zeros
        late.copy_(x)
        got = there_and_back(late)[1]
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("index_format", ["compact", "int64"])
def test_graph_capture_and_replay(index_format):
    """No call waits for the device, the check of int64 indices included."""
    x = image(2, 64, 64, 64)
    there_and_back(x, index_format)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = there_and_back(x, index_format)[1]
    x.normal_()
    graph.replay()
    assert torch.equal(y, there_and_back(x, index_format)[1])


@pytest.mark.parametrize("bad", [-1, 2**32 + 3])
def test_checked_mode_leaves_the_context_usable(bad):
    values, indices = F.max_pool2d(image(1, 8, 8, 8), 2, return_indices=True)
    indices[0, 3, 1, 1] = bad
    with pytest.raises(RuntimeError, match=f"Found an invalid max index: {bad} "):
        max_unpool2d(values, indices, 2, check_indices="sync")
    assert there_and_back(image(1, 8, 8, 8))[1].isfinite().all()


def test_by_default_the_error_comes_with_the_next_synchronisation():
    """In a process of its own: a device-side assertion ends the CUDA context, as torch's does."""
    script = """
import torch
from fastseg.ops import max_unpool2d
v = torch.ones(1, 4, 2, 2, device="cuda")
i = torch.zeros(1, 4, 2, 2, dtype=torch.int64, device="cuda")
i[0, 0, 0, 0] = 2**32 + 3
y = max_unpool2d(v, i, 2)
print("returned", flush=True)
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout == "returned\n" and done.returncode != 0 and "device-side assert" in done.stderr


def test_memory_is_the_outputs_alone():
    x = image(8, 64, 360, 480)
    there_and_back(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    values, y = there_and_back(x)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= values.nbytes + y.nbytes + values.numel() // 4 + 2**16


def close(got, want) -> None:
    """bf16 results that differ by the order of their sums: a few units in the last place of the largest value."""
    assert (got.float() - want.float()).abs().max() <= 2**-6 * want.float().abs().max()


KERNELS = [name for name in config.kernels() if "pool" in name or "tile_stats" in name]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_candidate_gives_the_same(kernel):
    x = image(2, 136, 33, 37).requires_grad_()
    vector = lambda: torch.rand(136, device="cuda") + 0.5
    norm = BatchNormArgs(vector(), vector(), vector().requires_grad_(), vector().requires_grad_(), True)
    weight = torch.randn(40, 136, 1, 1, device="cuda").bfloat16()

    def run():
        from fastseg.ops import max_unpool_conv2d

        values, indices = max_pool2d(x, 2, return_indices=True, index_format="compact")
        y = max_unpool2d(values, indices, 2, output_size=(33, 37))
        z = batch_norm_act_max_pool2d(x, norm, "relu")
        flat = max_unpool2d(values, indices.to_torch(), 2, output_size=(33, 37))
        grads = torch.autograd.grad(y.sum() + z.sum() + flat.sum(), (x, norm.weight, norm.bias))
        with torch.no_grad():
            folded = max_unpool_conv2d(values, indices, weight, output_size=(33, 37))
        return [values, y, z, flat, *grads, folded]

    check_candidates(kernel, run, close)
