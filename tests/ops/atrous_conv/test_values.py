"""Atrous convolutions against plain PyTorch in fp64: values, gradients, layouts, dtypes, skipped taps, decisions."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastseg
from fastseg.kernels.runtime import config
from fastseg.kernels.runtime.launch import intercept
from fastseg.kernels.runtime.launch import run as run_kernel
from fastseg.ops import atrous_conv2d
from fastseg.ops.atrous_conv2d import atrous_branches, atrous_conv2d_ref
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.registered import atrous_conv as _atrous
from fastseg.ops.registered.atrous_conv import atrous_branches_ref
from fastseg.testing import Tolerance, check_op, compare, guard, guarded

CL, NCHW = torch.channels_last, torch.contiguous_format
# Half types: the output is rounded once; with an activation the gradient before it is exact, so nothing is added.
HALF = {torch.float16: Tolerance(2**-9, 2**-10), torch.bfloat16: Tolerance(2**-6, 2**-7)}


@pytest.fixture
def own():
    """The own kernels, whatever the cost model says."""
    with fastseg.force("atrous_branches", "kernel"):
        yield


def make(
    kernels=(1, 3), dilations=(1, 2), N=2, C=16, H=5, W=7, COUT=16, bias=True, residual=False,
    dtype=torch.float32, layout=CL, device="cpu",
):  # fmt: skip
    """-> x, weights, biases, dilations, residual; all require grad."""
    grad = lambda t: t.to(dtype).to(device).requires_grad_()
    x = grad(torch.randn(N, C, H, W).to(memory_format=layout))
    weights = [grad(torch.randn(COUT, C, K, K) / (K * C**0.5)) for K in kernels]
    biases = [grad(torch.randn(COUT)) for _ in kernels] if bias else None
    y = (N, COUT * len(kernels), H, W)
    return x, weights, biases, list(dilations), grad(torch.randn(y).to(memory_format=layout)) if residual else None


def check(inputs, act=None, **options) -> None:
    x, weights, biases, dilations, residual = inputs
    terms = sum(w[0].numel() for w in weights)
    check_op(
        atrous_branches, atrous_branches_ref, [x, weights, biases, dilations, act, residual], terms=terms, **options
    )


SIZES: dict[str, dict] = {
    "an ASPP": {"kernels": (1, 3, 3), "dilations": (1, 2, 3), "H": 4, "W": 5},
    "channels past a block": {"C": 33, "COUT": 67, "H": 4, "W": 4, "N": 3, "kernels": (3,), "dilations": (3,)},
    "one channel": {"C": 1, "COUT": 1, "kernels": (3,), "dilations": (3,)},
    "one pixel": {"H": 1, "W": 1, "N": 3},
    "thin": {"H": 1, "W": 13},
    "rates past the map": {"H": 5, "W": 4, "kernels": (3, 3), "dilations": (5, 18)},
    "a rate past one axis": {"H": 4, "W": 11, "kernels": (3,), "dilations": (6,)},
    "rate half the map, undilated beside it": {"H": 4, "W": 4, "N": 1, "kernels": (3, 3), "dilations": (2, 1)},
    "1x1 alone": {"kernels": (1,), "dilations": (1,)},
    "eight branches": {
        "kernels": (1,) * 5 + (3,) * 3,
        "dilations": range(1, 9),
        "H": 1,
        "W": 3,
        "C": 4,
        "COUT": 4,
        "N": 1,
    },
}


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, own, device):
    with guarded():
        check(make(device=device, **SIZES[size]))


@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu"])
def test_activations_after_bias_and_residual(act, own, device):
    check(make((3,), (3,), N=1, H=4, residual=True, device=device), act)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_types(dtype, own, device):
    check(make(C=24, H=4, W=4, N=1, residual=True, dtype=dtype, device=device), "relu", tolerance=HALF[dtype])


@pytest.mark.skipif(not INTERPRETED, reason="no GPU kernel for fp64")
def test_gradcheck(own):
    x, weights, biases, dilations, _ = make(N=1, C=2, COUT=2, H=1, W=3, dtype=torch.float64)
    run = lambda x, a, b, c, d: atrous_branches(x, [a, b], [c, d], dilations, "leaky_relu")
    torch.autograd.gradcheck(run, (x, *weights, *biases), fast_mode=True)


@pytest.mark.parametrize("case", ["contiguous", "slice", "one filter's slice", "zones"])
def test_layouts(case, own, device):
    """What is not dense in channels_last is copied; slices may be misaligned; nothing reads past an end."""
    x, weights, biases, dilations, residual = make(N=1, H=4, W=4, layout=NCHW, residual=True, device=device)
    if case == "slice":
        wide = torch.randn(1, 18, 6, 4, device=device)
        x = wide[:, 1:17, 1:5].requires_grad_()
    if case == "one filter's slice":
        buffer = torch.randn(1 + weights[1].numel(), device=device)
        weights[1] = buffer[1:].view(16, 3, 3, 16).permute(0, 3, 1, 2).requires_grad_()
        biases[1] = torch.randn(17, device=device)[1:].requires_grad_()
    if case == "zones":
        x, residual, weights, biases = (
            guard(x),
            guard(residual),
            [guard(w) for w in weights],
            [guard(b) for b in biases],
        )
    run = lambda *a: atrous_branches(*a).contiguous(memory_format=NCHW) if case != "slice" else atrous_branches(*a)
    check_op(run, atrous_branches_ref, [x, weights, biases, dilations, None, residual], terms=300)


def test_weights_begin_where_the_kernel_says_they_do(device):
    buffer = torch.randn(1 + 9 * 16, device=device)
    (w,) = _atrous.settled([buffer[1:].view(4, 3, 3, 4).permute(0, 3, 1, 2)], torch.float32)
    assert (
        w.data_ptr() % 16 == 0
        and w.is_contiguous(memory_format=CL)
        and torch.equal(w.permute(0, 2, 3, 1).flatten(), buffer[1:])
    )


@pytest.mark.parametrize("parts", [1, 3])
def test_sums_of_weights_walk_over_rows_and_images(parts, own, device, monkeypatch):
    """Several steps a part, whose rectangles are narrower and lower than a step is long, and no multiple of it."""
    from fastseg.kernels.atrous_conv import bwd as atrous_conv_bwd

    monkeypatch.setattr(atrous_conv_bwd, "PROGRAMS", 9 * parts)
    x, (w,), _, (dilation,), _ = make((3,), (2,), N=7, H=4, W=5, bias=False, device=device)
    with config.override("atrous_conv_bwd_weight", BLOCK_M=16):
        y = atrous_conv2d(x.detach(), w, dilation=dilation)
        dy = torch.randn_like(y)
        (dw,) = torch.autograd.grad(y, w, dy)
    want = torch.nn.grad.conv2d_weight(x.detach().double(), w.shape, dy.double(), padding=2, dilation=2)
    compare(dw, want.cpu(), terms=7 * 20)


def test_no_bias_no_residual_and_what_does_not_want_a_gradient(own, device):
    x, weights, _, dilations, _ = make(bias=False, device=device)
    x.requires_grad_(False)
    weights[1].requires_grad_(False)
    check((x, weights, None, dilations, None))
    x.requires_grad_()
    for w in weights:
        w.requires_grad_(False)
    check((x, weights, None, dilations, None))


@pytest.mark.parametrize("layout", [NCHW, CL], ids=str)
def test_public_op(layout, own, device):
    x, (weight,), (bias,), (dilation,), residual = make(
        (3,), (3,), N=1, H=4, W=4, residual=True, layout=layout, device=device
    )
    check_op(atrous_conv2d, atrous_conv2d_ref, [x, weight, bias, dilation], terms=150, act="relu6", residual=residual)
    with torch.no_grad():
        with fastseg.explain() as report:
            y = atrous_conv2d(x, weight, dilation=dilation)
        (decision,) = report
        assert (decision.op, decision.path) == ("atrous_conv2d", "triton") and "of the products" in decision.why
        want = torch.nn.functional.conv2d(x.double(), weight.double(), padding=3, dilation=3)
    compare(y, want.cpu(), terms=144)


def test_a_sum_is_a_chain(own, device):
    """DeepLabV2's: each call adds what was summed before, in its one launch."""
    x, weights, biases, dilations, _ = make((3, 3, 3), (2, 4, 6), device=device)
    with torch.no_grad():
        y, want = None, 0
        for w, b, d in zip(weights, biases, dilations, strict=True):
            y = atrous_conv2d(x, w, b, d, residual=y)
            want = want + torch.nn.functional.conv2d(x.double(), w.double(), b.double(), padding=d, dilation=d)
    compare(y, want.cpu(), terms=450)


# --- padding is skipped


def poisoned(H: int, W: int, dilation: int, device) -> tuple[Tensor, Tensor, Tensor]:
    """x, a 3x3 whose weights are NaN where the tap lies in the map nowhere, and the mask of those."""
    x = torch.randn(2, 16, H, W, device=device).contiguous(memory_format=CL)
    rows = torch.tensor([dilation < H, True, dilation < H])
    columns = torch.tensor([dilation < W, True, dilation < W])
    never = ~(rows[:, None] & columns[None, :]).to(device)
    return x, torch.randn(16, 16, 3, 3, device=device).masked_fill(never, float("nan")), never


@pytest.mark.parametrize("H, W, dilation", [(3, 5, 3), (5, 3, 3), (3, 3, 3)])
def test_weights_of_taps_in_padding_are_not_read(H, W, dilation, own, device):
    x, weight, never = poisoned(H, W, dilation, device)
    x.requires_grad_(), weight.requires_grad_()
    y = atrous_conv2d(x, weight, dilation=dilation)
    dx, dw = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    clean = weight.detach().masked_fill(never, 0)
    want = atrous_conv2d_ref(x.double(), clean.double(), dilation=dilation)
    compare(y, want.detach().cpu(), terms=144)
    assert dx.isfinite().all()
    assert (dw[..., never] == 0).all() and (dw[..., ~never] != 0).all()


def test_what_is_launched_is_what_the_planner_counts(own, device):
    """The launch's own tables: rows times taps, tile by tile."""
    from fastseg.kernels.atrous_conv.regions import REGION, TAPS, Branch, executed, forward_regions, input_regions

    x, weights, _, dilations, _ = make((1, 3), (1, 3), N=3, H=7, W=4, C=4, COUT=4, bias=False, device=device)
    branches = tuple(Branch(w.shape[-1], d) for w, d in zip(weights, dilations, strict=True))
    launched = []

    def watch(kernel, grid, args, kwargs) -> None:
        if kernel.fn.__name__ == "_atrous_conv_fwd_kernel":
            items, regions = (t.tolist() for t in args[4:6])
            taps = [sum(r[REGION + 3 + i] * r[REGION + 4 + i] for i in range(0, r[5] * TAPS, TAPS)) for r in regions]
            assert grid == (len(items) * -(-kwargs["COUT"] // kwargs["BLOCK_N"]),)
            launched.append(sum(taps[index] for index, _ in items) * kwargs["BLOCK_M"])
        run_kernel(kernel, grid, args, kwargs)

    with config.override("atrous_conv_fwd", BLOCK_M=16), intercept(watch):
        y = atrous_branches(x, weights, None, dilations)
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert launched == [executed(f(7, 4, branches), 3, 16) for f in (forward_regions, input_regions)]


# --- decisions


def test_small_rates_go_to_the_library(device):
    """The real cost model: one 3x3 at rate 1 never pays, an ASPP on a small map does; the reason has the numbers."""
    x, weights, *_ = make((3,), (1,), device=device)
    with fastseg.explain() as report, torch.no_grad():
        atrous_conv2d(x, weights[0])
        atrous_branches(x, [weights[0]] * 3, None, [2, 4, 6], "relu")
    undilated, aspp = (d for d in report if d.op != "conv2d_act")  # how the library is called is a record of its own
    assert undilated.path == "reference" and "the library's dense convolution" in undilated.why
    assert aspp.path == "triton" and "model says own" in aspp.why


def test_one_decision_holds_for_a_captured_call(device):
    """The registered op asks the cost model itself: a graph has no sizes to ask with."""
    x, weights, biases, dilations, residual = make(residual=True, device=device)
    arguments = (x, weights, biases, residual, dilations, "relu")
    launches = []
    count = lambda kernel, grid, args, kwargs: (launches.append(kernel), run_kernel(kernel, grid, args, kwargs))
    with intercept(count), torch.no_grad():
        own = _atrous.fwd_op.op(*arguments)
        with fastseg.force("atrous_branches", "reference"):
            library = _atrous.fwd_op.op(*arguments)
    assert [kernel.fn.__name__ for kernel in launches] == ["_atrous_conv_tables_kernel", "_atrous_conv_fwd_kernel"]
    torch.testing.assert_close(own, library, atol=1e-5, rtol=1e-5)


def test_what_the_kernel_does_not_take(device):
    x, weights, biases, dilations, _ = make(device=device)
    five = torch.randn(16, 16, 5, 5, device=device)
    cases = {
        "kernel size 5": lambda: atrous_conv2d(x, five, dilation=2),
        "9 branches": lambda: atrous_branches(x, weights[:1] * 9, None, [1] * 9),
        "empty tensors": lambda: atrous_branches(x[:0], weights, biases, dilations),
        "a transform": lambda: torch.func.vmap(lambda x: atrous_conv2d(x, weights[1], dilation=2))(x[None]),
        "inside fastseg.reference()": lambda: fastseg.reference()(atrous_conv2d)(x, weights[1], dilation=2),
    }
    for why, run in cases.items():
        with fastseg.explain() as report:
            run()
        assert [(d.path, d.why[: len(why)]) for d in report] == [("reference", why)]
    assert atrous_branches(x[:0], weights, biases, dilations).shape == (0, 32, 5, 7)


def test_second_derivative(own, device):
    x, weights, *_ = make((3,), (2,), device=device)
    found = []
    for y in (atrous_conv2d(x, weights[0], dilation=2), F.conv2d(x, weights[0], padding=2, dilation=2)):
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), x)[0])
    assert found[1].abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3 * float(found[1].abs().max()))


def test_autocast(own, device):
    x, weights, biases, dilations, _ = make(device=device)
    with torch.autocast(device, torch.bfloat16):
        y = atrous_branches(x, weights, biases, dilations, "relu")
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {t.grad.dtype for t in (x, *weights, *biases)} == {torch.float32}
    want = atrous_branches_ref(x, weights, biases, dilations, "relu")
    assert (y - want).abs().max() <= 2**-6 * want.abs().max()


def test_x_is_kept_once(own, device):
    x, weights, biases, dilations, _ = make(device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        atrous_branches(x, weights, biases, dilations)
    assert kept.count(x.shape) == 1 and len(kept) == 1 + len(weights)


def test_bad_arguments(device):
    x, weights, biases, dilations, residual = make(residual=True, device=device)
    w = weights[1]
    for error, text, run in (
        (ValueError, "act is 'tanh'", lambda: atrous_conv2d(x, w, act="tanh")),
        (ValueError, r"x is \(16, 5, 7\)", lambda: atrous_conv2d(x[0], w)),
        (TypeError, "x is torch.int64", lambda: atrous_conv2d(x.long(), w)),
        (ValueError, "no groups", lambda: atrous_conv2d(x, w[:, :8])),
        (ValueError, r"K, K\), K odd", lambda: atrous_conv2d(x, w[..., :2, :2])),
        (ValueError, r"dilation is \(2, 2\)", lambda: atrous_conv2d(x, w, dilation=(2, 2))),
        (ValueError, "dilation is 0", lambda: atrous_conv2d(x, w, dilation=0)),
        (ValueError, "a bias is", lambda: atrous_conv2d(x, w, biases[0][:3])),
        (ValueError, "residual is", lambda: atrous_conv2d(x, w, residual=residual)),
        (TypeError, "a weight torch.float64", lambda: atrous_conv2d(x, w.double())),
        (ValueError, "2 weights, 1 biases", lambda: atrous_branches(x, weights, biases[:1], dilations)),
        (ValueError, "the same COUT", lambda: atrous_branches(x, [w, w[:8]], None, [1, 2])),
    ):
        with pytest.raises(error, match=text):
            run()


def test_each_branch_has_its_own_bias_gradient(own, device):
    """Sums of its channels of the gradient alone; also where one bias alone requires it."""
    x, weights, biases, dilations, _ = make((1, 3, 3), (1, 2, 3), N=1, H=3, W=4, C=4, COUT=3, device=device)
    upstream = torch.randn(1, 9, 3, 4, device=device)
    want = upstream.sum((0, 2, 3)).split(3)
    grads = torch.autograd.grad(atrous_branches(x, weights, biases, dilations), biases, upstream)
    for got, sums in zip(grads, want, strict=True):
        torch.testing.assert_close(got, sums)
    for branch in range(3):
        alone = [b.detach().requires_grad_(i == branch) for i, b in enumerate(biases)]
        y = atrous_branches(x.detach(), [w.detach() for w in weights], alone, dilations)
        torch.testing.assert_close(torch.autograd.grad(y, alone[branch], upstream)[0], want[branch])
