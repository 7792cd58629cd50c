"""1x1 convolution with everything behind it: the kernel against torch, who runs it, and what it costs."""

import pytest
import torch
from torch import Tensor

import fastseg
from fastseg.ops.conv_act import conv2d_act, conv2d_act_ref
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.registered.pointwise_conv import pointwise_conv2d
from fastseg.testing import compare

CL = torch.channels_last
ONE = ((1, 1), (0, 0), (1, 1), 1)  # stride, padding, dilation, groups


def make(N=2, C=21, COUT=37, H=5, W=7, dtype=torch.float32, device="cpu") -> dict[str, Tensor]:
    """The sums reach past 6 and below 0; images end inside a block of rows."""
    new = lambda *shape: torch.randn(*shape, device=device).to(dtype)
    return {
        "x": new(N, C, H, W).contiguous(memory_format=CL), "weight": new(COUT, C, 1, 1), "bias": new(COUT),
        "residual": new(N, COUT, H, W).contiguous(memory_format=CL), "image_bias": 3 * new(N, COUT),
    }  # fmt: skip


def plain(x, weight, bias=None, residual=None, image_bias=None, act=None) -> Tensor:
    wide = lambda t: None if t is None else t.double().cpu()
    return conv2d_act_ref(wide(x), wide(weight), wide(bias), act, *ONE, wide(residual), wide(image_bias))


def call(x, weight, bias=None, act=None, **options) -> Tensor:
    with torch.no_grad():
        return conv2d_act(x, weight, bias, act, *ONE, **options)


@pytest.mark.parametrize(
    "parts, act",
    [
        (("bias",), None),
        (("bias",), "relu6"),
        (("bias", "residual"), "relu"),  # added before the ReLU
        (("image_bias",), "relu"),
        (("bias", "residual", "image_bias"), "leaky_relu"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_torch(parts, act, dtype, device):
    tensors = make(dtype=dtype, device=device)
    kwargs = {name: tensors[name] for name in ("x", "weight", *parts)}
    with fastseg.explain() as report:
        y = call(**kwargs, act=act)
    assert [d.path for d in report] == ["triton"] and y.is_contiguous(memory_format=CL) and y.dtype == dtype
    compare(y, plain(**kwargs, act=act), terms=21)


def test_many_channels(device):
    """Several blocks of input and of output channels, and of rows."""
    tensors = make(N=3, C=150, COUT=140, H=9, W=6, device=device)
    y = call(**tensors, act="relu6")
    compare(y, plain(**tensors, act="relu6"), terms=150)
    assert (y == 6).any() and (y == 0).any()


def test_nan_stays(device):
    tensors = make(device=device)
    tensors["x"][1, :, 2, 3] = float("nan")
    y = call(**tensors, act="relu6")
    assert y[1, :, 2, 3].isnan().all() and y.isnan().sum() == 37


def test_autocast(device):
    """fp32 parameters, as a module without a norm has them."""
    t = make(device=device)
    with torch.autocast(device, torch.bfloat16), fastseg.explain() as report:
        y = call(t["x"], t["weight"], t["bias"], "relu6", image_bias=t["image_bias"])
    assert y.dtype == torch.bfloat16 and [d.path for d in report] == ["triton"]
    exact = plain(t["x"], t["weight"], t["bias"], image_bias=t["image_bias"], act="relu6")
    assert (y.double().cpu() - exact).norm() < 2 * torch.finfo(torch.bfloat16).eps * exact.norm()


def test_who_does_not_run_it(device):
    t = make(device=device)
    x, weight = t["x"], t["weight"]
    want = plain(x, weight, t["bias"])

    def path(x=x, weight=weight, args=ONE) -> str:
        with fastseg.explain() as report, torch.no_grad():
            y = conv2d_act(x, weight, t["bias"], None, *args)
        if args == ONE:
            compare(y, want, terms=21)
        (decision,) = report
        return f"{decision.path}: {decision.why}"

    assert path().startswith("triton: one launch: model says own kernel ")
    assert path(x.contiguous()) == "reference: not channels_last: the kernel would need copies"
    for args in (((2, 2), *ONE[1:]), ((1, 1), (1, 1), *ONE[2:]), ((1, 1), "same", *ONE[2:])):
        assert path(args=args).startswith("reference: "), args
    with fastseg.reference():
        assert path() == "reference: inside fastseg.reference()"
    assert path(weight=weight.clone().requires_grad_()).startswith("triton")  # nobody can want its gradient here
    with pytest.raises(RuntimeError):  # torch's error, not ours
        path(weight=weight.double())


def test_gradients_reach_everything(device):
    """In training the same call is torch's functions."""
    t = {name: v.detach().requires_grad_() for name, v in make(device=device).items()}
    y = conv2d_act(t["x"], t["weight"], t["bias"], "relu", *ONE, residual=t["residual"], image_bias=t["image_bias"])
    ours = torch.autograd.grad(y.sum(), list(t.values()))
    theirs = torch.autograd.grad(plain(**t, act="relu").sum(), list(t.values()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(a), rtol=1e-4, atol=1e-4)


def test_shapes_are_checked(device):
    t = make(device=device)
    with pytest.raises(ValueError, match=r"image_bias \(2, 36\); it must be \(2, 37\)"):
        pointwise_conv2d(t["x"], t["weight"], image_bias=t["image_bias"][:, 1:])


def test_the_cost_model():
    """Where cuDNN's call does it all it is used; bias, ReLU6 or no activation behind it make the difference."""
    from fastseg.kernels.dense_conv.pointwise import plan

    half = torch.bfloat16
    for pixels, C, COUT in ((16 * 128**2, 24, 144), (1024, 160, 960), (16 * 1024, 1280, 256)):
        sizes = (pixels, C, COUT, half)
        assert not plan(*sizes, (), residual=False, tf32=True).pays  # one call
        assert plan(*sizes, (2,), residual=False, tf32=True).pays  # a minimum after it
        assert plan(*sizes, (3, 2, 2), residual=True, tf32=True).pays
    assert not plan(2**20, 4096, 4096, half, (2,), residual=False, tf32=True).pays  # products decide
    assert not plan(2**16, 512, 512, torch.float32, (2, 2), residual=False, tf32=False).pays  # on the lanes
    text = str(plan(1024, 96, 576, half, (2, 2), residual=False, tf32=True))
    assert text.startswith("one launch: model says own kernel 2.3 us, library ") and "in 3 launches" in text


@pytest.mark.skipif(not INTERPRETED, reason="traffic is counted under the interpreter")
def test_traffic_is_what_the_header_says():
    from traffic import count_traffic

    t = make(N=2, C=32, COUT=16, H=16, W=16)
    A, Y, weights = 4 * t["x"].numel(), 4 * t["residual"].numel(), 4 * 32 * 16
    with count_traffic() as traffic:
        call(t["x"], t["weight"], t["bias"], "relu6")
    total = traffic.total
    assert (total.read_bytes, total.written_bytes, total.launches) == (A + weights + 4 * 16, Y, 1)
    with count_traffic() as traffic:
        call(**t, act="relu6")
    total = traffic.total
    assert (total.read_bytes, total.written_bytes, total.launches) == (A + Y + weights + 4 * 16 * 3, Y, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_candidate_gives_the_same(dtype, device):
    from candidates import check_candidates

    t = make(N=3, C=136, COUT=264, H=33, W=37, dtype=dtype, device=device)
    close = lambda got, want: compare(got, want.double(), terms=136)
    check_candidates("separable_conv_fwd_pw", lambda: [pointwise_conv2d(**t, act="relu6")], close)
