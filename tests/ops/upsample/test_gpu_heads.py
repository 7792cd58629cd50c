"""What only a GPU shows of the fused heads: sizes, asynchronous errors, graphs, memory, candidate configurations."""

import subprocess
import sys

import pytest
import torch
from candidates import check_candidates
from head_inputs import interpolate
from torch import Tensor
from torch.nn import functional as F

from fastseg.kernels.runtime import config
from fastseg.ops import upsample_argmax, upsample_cross_entropy

pytestmark = pytest.mark.gpu


def inputs(N=2, C=21, low=32, full=128, layout=torch.channels_last) -> tuple[Tensor, Tensor]:
    logits = torch.randn(N, C, low, low, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=layout)
    return logits.requires_grad_(), torch.randint(C, (N, full, full), device="cuda")


def step(logits: Tensor, target: Tensor, **options) -> list[Tensor]:
    loss = upsample_cross_entropy(logits, target, **options)
    return [loss.detach(), *torch.autograd.grad(loss, logits)]


def close(got: Tensor, want: Tensor) -> None:
    assert (got.float() - want.float()).abs().max() <= 2**-6 * want.float().abs().max()


@pytest.mark.parametrize("classes", [19, 150, 300])
@pytest.mark.parametrize(("low", "full"), [(32, 64), (32, 128), (33, 1000), (16, 512)])
def test_against_torch_in_fp32(classes, low, full):
    for layout in (torch.channels_last, torch.contiguous_format):
        logits, target = inputs(1, classes, low, full, layout)
        wide = logits.detach().float().requires_grad_()
        up = interpolate(wide, True, (full, full))
        chosen = up.gather(1, upsample_argmax(logits, full, align_corners=True).long()[:, None])[:, 0]
        assert (up.amax(1) - chosen <= 1e-5).all()
        want = F.cross_entropy(up, target)
        loss, grad = step(logits, target, align_corners=True)
        close(loss, want)
        close(grad, torch.autograd.grad(want, wide)[0])


def test_past_2_31_elements():
    """The upsampled logits would be; and the last image begins past 2^31 low-resolution logits."""
    logits = torch.randn(70, 150, 512, 400, device="cuda", dtype=torch.float16).requires_grad_()
    target = torch.randint(150, (70, 512, 400), device="cuda", dtype=torch.uint8)
    loss, grad = step(logits, target, reduction="mean")  # their sum is past fp16
    classes = upsample_argmax(logits, (512, 400))
    assert loss.isfinite()
    for image in (0, 69):
        one = slice(image, image + 1)
        alone = step(logits[one].detach().requires_grad_(), target[one], reduction="mean")[1]
        torch.testing.assert_close(grad[one] * len(logits), alone)
        assert torch.equal(classes[one], upsample_argmax(logits[one], (512, 400)))


def test_twenty_runs_give_the_same_bits():
    logits, target = inputs(C=150)
    first = None
    for _ in range(20):
        results = [*step(logits, target, label_smoothing=0.1), upsample_argmax(logits, 128)]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_graph_capture_and_replay():
    logits, target = inputs()
    with torch.no_grad():
        upsample_cross_entropy(logits, target), upsample_argmax(logits, 128)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = upsample_cross_entropy(logits, target), upsample_argmax(logits, 128)
        logits.normal_()
        graph.replay()
        again = upsample_cross_entropy(logits, target), upsample_argmax(logits, 128)
    assert all(torch.equal(a, b) for a, b in zip(captured, again, strict=True))


def test_nothing_waits_for_the_gpu():
    logits, target = inputs()
    step(logits, target), upsample_argmax(logits, 128)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(logits, target), upsample_argmax(logits, 128)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bad", [3, -1, 2**32 + 1])
def test_target_out_of_range_is_reported_and_reads_nothing(bad):
    """In a process of its own: a device-side assertion ends the context."""
    script = f"""
import torch
from fastseg.ops import upsample_cross_entropy
target = torch.zeros(1, 16, 16, dtype=torch.int64, device="cuda")
target[0, 3, 5] = {bad}
upsample_cross_entropy(torch.randn(1, 3, 4, 4, device="cuda"), target)
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "assert" in done.stderr and "illegal memory access" not in done.stderr


def test_peak_memory():
    """30 times below eager at the size of ADE20K batches."""
    logits, target = inputs(16, 150, 128, 512)
    peaks = {}
    eager = lambda: F.cross_entropy(interpolate(logits, False, (512, 512)).float(), target)
    for name, loss in {"fastseg": lambda: upsample_cross_entropy(logits, target), "eager": eager}.items():
        loss().backward()
        logits.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss().backward()
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() - before
        logits.grad = None
    assert peaks["fastseg"] * 30 < peaks["eager"], peaks


@pytest.mark.parametrize("kernel", [name for name in config.kernels() if name.startswith("upsample_")])
def test_every_candidate_gives_the_same(kernel):
    logits, target = inputs(C=40, low=33, full=140)

    def run() -> list[Tensor]:
        return [*step(logits, target), upsample_argmax(logits, 140)]

    check_candidates(kernel, run, close)
