"""What only a GPU shows of the bilinear kernels: past 2^31 elements, streams, graphs, alerts, every candidate."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.kernels.runtime import config
from fastseg.nn import BilinearConvTranspose2d
from fastseg.ops import bilinear_conv_transpose2d, upsample_bilinear

pytestmark = pytest.mark.gpu

CL, NCHW = torch.channels_last, torch.contiguous_format
LAYOUT = pytest.mark.parametrize("layout", [NCHW, CL], ids=["nchw", "nhwc"])
OPS = {
    "upsample": lambda x: upsample_bilinear(x, scale_factor=4),
    "corners": lambda x: upsample_bilinear(x, scale_factor=4, align_corners=True),
    "smaller": lambda x: upsample_bilinear(x, scale_factor=0.3),
    "deconv": lambda x: bilinear_conv_transpose2d(x, 4),
}


def draw(*shape: int, layout=CL, dtype=torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=layout).requires_grad_()


def both_ways(op, x: Tensor) -> list[Tensor]:
    y = op(x)
    dy = torch.linspace(-1, 1, y.numel(), device="cuda").to(y.dtype).view_as(y).contiguous(memory_format=CL)
    return [y.detach(), *torch.autograd.grad(y, x, dy)]


@LAYOUT
def test_past_2_31_elements(layout):
    """pytorch#81665, #141831: channels_last upsampling past 2^31 elements fails, or gives zeros."""
    x = torch.empty(17, 256, 512, 512, device="cuda", dtype=torch.bfloat16, memory_format=layout).normal_()
    with torch.no_grad():
        y = upsample_bilinear(x, scale_factor=2)
        for image in (0, 7, 8, 16):
            assert torch.equal(y[image], upsample_bilinear(x[image : image + 1], scale_factor=2)[0])
        del x
        dx = torch.ops.fastseg.upsample_bilinear_bwd.default(y, (512, 512), False, None, None)
        for image in (0, 8, 16):
            want = torch.ops.fastseg.upsample_bilinear_bwd.default(y[image : image + 1], (512, 512), False, None, None)
            assert torch.equal(dx[image], want[0])


@LAYOUT
def test_more_planes_than_a_grid_axis_holds(layout):
    x = draw(100_000, 2, 3, 3, layout=layout, dtype=torch.float32)
    y, dx = both_ways(OPS["upsample"], x)
    torch.testing.assert_close(y, F.interpolate(x.detach(), scale_factor=4, mode="bilinear"), atol=1e-5, rtol=1e-5)
    assert dx.isfinite().all()


@pytest.mark.parametrize("C", [256, 21, 150, 4])
@pytest.mark.parametrize("name", OPS)
@LAYOUT
def test_large_maps_match_fp64(name, C, layout):
    """Against the CPU's fp64; fp32 positions of 260 pixels cost 260 roundings of the slope."""
    x = draw(2, C, 33, 65, layout=layout, dtype=torch.float32)
    reference = {
        "upsample": lambda x: F.interpolate(x, scale_factor=4, mode="bilinear"),
        "corners": lambda x: F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=True),
        "smaller": lambda x: F.interpolate(x, scale_factor=0.3, mode="bilinear"),
        "deconv": BilinearConvTranspose2d(C, 4).double(),
    }[name]
    y = OPS[name](x)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = x.detach().cpu().double().requires_grad_()
    want = reference(exact)
    (want_dx,) = torch.autograd.grad(want, exact, dy.cpu().double())
    torch.testing.assert_close(y.cpu().double(), want, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(dx.cpu().double(), want_dx, atol=5e-4, rtol=1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_twenty_runs_give_the_same_bits(name, deterministic):
    x = draw(4, 21, 65, 33)
    torch.use_deterministic_algorithms(deterministic)  # torch's own bilinear backward alerts
    first = both_ways(OPS[name], x)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, both_ways(OPS[name], x), strict=True))


def test_half_gradients_are_summed_in_fp32():
    """1024 outputs of a pixel: sums in bf16, torch's, lose them one by one."""
    x = draw(1, 8, 4, 4)
    (dx,) = torch.autograd.grad(upsample_bilinear(x, scale_factor=32).float().sum(), x)
    assert (dx.float() - 1024).abs().max() <= 1024 * 2**-8


def test_waits_for_its_stream():
    x = draw(2, 64, 64, 64).detach()
    want = OPS["upsample"](x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        got = OPS["upsample"](late)
    stream.synchronize()
    assert torch.equal(got, want)


def test_graph_capture_and_replay():
    module, x = BilinearConvTranspose2d(21, 8).cuda().bfloat16(), draw(2, 21, 32, 32).detach()
    run = lambda: upsample_bilinear(module(x), scale_factor=2)
    run()  # compiles, and looks at the weight
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    x.normal_()
    graph.replay()
    assert torch.equal(y, run())


def test_no_wait_for_the_device():
    module, x = BilinearConvTranspose2d(21, 8).cuda().bfloat16(), draw(2, 21, 32, 32)
    module(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x).backward(torch.ones(2, 21, 256, 256, device="cuda", dtype=torch.bfloat16))
        OPS["upsample"](x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_allocates_its_output_alone():
    x = draw(8, 256, 64, 64).detach()
    OPS["upsample"](x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = OPS["upsample"](x)
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + 2**16


def test_autocast_is_torchs():
    x = draw(1, 8, 4, 4)
    with torch.autocast("cuda", torch.bfloat16):
        assert OPS["upsample"](x).dtype == F.interpolate(x, scale_factor=4, mode="bilinear").dtype == torch.float32
        assert OPS["deconv"](x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", ["bilinear_fwd", "bilinear_bwd"])
@pytest.mark.parametrize(("C", "layout"), [(136, CL), (21, CL), (21, NCHW)], ids=["vectors", "elements", "nchw"])
@pytest.mark.parametrize("name", OPS)
def test_every_candidate_gives_the_same(name, C, layout, kernel):
    x = draw(2, C, 33, 37, layout=layout)
    asked = {}
    with config.observe_selects(lambda name, size, key: asked.setdefault(name, (size, key))):
        want = both_ways(OPS[name], x)
    size, key = asked[kernel]
    for values in config.candidates_of(kernel, size, **key):
        with config.override(kernel, **values):
            got = both_ways(OPS[name], x)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, atol=1e-2, rtol=1e-2)
