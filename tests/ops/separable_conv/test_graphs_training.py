"""The separable convolution's registered ops: plain implementations, partial gradients, and that nothing aliases.

Runs in two processes: with the interpreter the ops hold the kernels, without it their plain implementations.
"""

import itertools

import pytest
import torch
from torch import Tensor

from fastseg.ops import BatchNormArgs
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.core.register import DECOMPOSITIONS
from fastseg.ops.registered.separable_conv import Call
from fastseg.ops.separable_conv import separable_conv2d_ref
from fastseg.testing import Tolerance, compare

eval_op, train_op, bwd_op = (
    getattr(torch.ops.fastseg, name).default
    for name in ("separable_conv2d", "separable_conv2d_train", "separable_conv2d_bwd")
)
LAYOUTS = {  # of x and of the residual or upstream gradient
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": lambda t: torch.cat([t, t], 1).contiguous(memory_format=torch.channels_last)[:, : t.shape[1]],
    "expanded": lambda t: t[:1, :, :, :1].expand_as(t),
}


def sample(
    pre="none", mid="none", mid_act="none", post="none", post_act="none", *, bias=False, residual=None,
    layout="contiguous", weights="contiguous", dtype=torch.float32, norm_dtype=None, affine=True, N=2, H=5, W=4, K=3,
    stride=1, padding=1, dilation=1,
) -> Call:  # fmt: skip
    """The registered ops' arguments; ``residual`` names its layout."""
    C, COUT = 3, 4
    rand = lambda *shape: torch.randn(shape).to(dtype)

    def norm(kind: str, channels: int) -> tuple[Tensor | None, ...]:
        wide = norm_dtype or dtype
        running = kind == "running"
        mean, var = torch.randn(channels).to(wide), (torch.rand(channels) + 0.5).to(wide)
        weight, shift = (torch.rand(channels) + 0.5).to(wide), torch.randn(channels).to(wide)
        given = kind != "none" and affine
        return (
            mean if running else None,
            var if running else None,
            weight if given else None,
            shift if given else None,
        )

    call = Call(
        LAYOUTS[layout](rand(N, C, H, W)), LAYOUTS[weights](rand(C, 1, K, K) / K),
        LAYOUTS[weights](rand(COUT, C, 1, 1)), rand(C) if bias else None, rand(COUT) if bias else None,
        *norm(mid, C), *norm(post, COUT), None, stride, padding, dilation, pre, mid_act, post_act,
        mid, 1e-5, post, 1e-3,
    )  # fmt: skip
    return call if residual is None else call._replace(residual=LAYOUTS[residual](rand(*call.out_shape)))


SAMPLES: dict[str, dict] = {
    "bare": {},
    "biases": {"bias": True, "layout": "channels_last"},
    "running": {"mid": "running", "mid_act": "relu6", "post": "running", "residual": "contiguous"},
    "running, channels_last": {"mid": "running", "mid_act": "relu", "post": "running", "post_act": "relu",
                               "layout": "channels_last", "residual": "channels_last", "bias": True},
    "batch": {"mid": "batch", "mid_act": "relu", "post": "batch", "post_act": "leaky_relu"},
    "batch, channels_last": {"mid": "batch", "mid_act": "relu6", "post": "batch", "layout": "channels_last",
                             "bias": True},
    "batch and running": {"pre": "relu", "mid": "running", "post": "batch", "residual": "sliced", "affine": False},
    "running and batch": {"mid": "batch", "post": "running", "post_act": "relu", "layout": "sliced", "N": 1},
    "sliced": {"pre": "leaky_relu", "layout": "sliced", "residual": "contiguous", "stride": 2},
    "mixed layouts": {"post": "running", "layout": "contiguous", "residual": "channels_last"},
    "mixed layouts, other way": {"post": "batch", "layout": "channels_last", "residual": "contiguous"},
    "expanded": {"pre": "relu6", "layout": "expanded", "residual": "expanded", "K": 2, "padding": 1},
    "bf16 with fp32 norms": {"mid": "batch", "post": "running", "dtype": torch.bfloat16, "norm_dtype": torch.float32,
                             "residual": "channels_last", "bias": True},
    "fp16 with fp16 norms": {"mid": "batch", "mid_act": "relu", "post": "batch", "dtype": torch.float16,
                             "layout": "channels_last"},
    "running fp16": {"mid": "running", "mid_act": "relu", "post": "running", "dtype": torch.float16},
    "fp64": {"mid": "batch", "mid_act": "relu", "post": "batch", "post_act": "relu", "dtype": torch.float64},
    "one pixel": {"N": 4, "H": 1, "W": 1, "post": "batch", "post_act": "relu"},
    "channels_last weights": {"mid": "running", "weights": "channels_last", "layout": "channels_last"},
    "5x5, dilated": {"K": 5, "dilation": 2, "padding": 2, "H": 7, "W": 8, "post_act": "relu"},
}  # fmt: skip


def leaves(call: Call) -> list[Tensor]:
    """What can require grad: everything but running statistics."""
    wanted = Call.__annotations__.keys() - {"mid_mean", "mid_var", "post_mean", "post_var"}
    return [t for name, t in call._asdict().items() if name in wanted and isinstance(t, Tensor)]


def requiring_grad(call: Call) -> Call:
    kept = {id(t) for t in leaves(call)}
    return Call(*(t.detach().requires_grad_() if id(t) in kept else t for t in call))


def backward_args(call: Call, layout: str, needs: list[bool] | None = None) -> tuple:
    y, *saved = train_op(*call)
    present = [True, True, True, call.dw_bias is not None, call.pw_bias is not None, call.mid_weight is not None,
               call.post_weight is not None]  # fmt: skip
    return LAYOUTS[layout](torch.randn_like(y)), *saved, present if needs is None else needs, *call


def test_opcheck_of_partial_gradients():
    call = sample("relu", "running", "relu", "batch", "relu", bias=True, layout="channels_last")
    for wanted in range(0, 7, 3 if INTERPRETED else 1):
        torch.library.opcheck(bwd_op, backward_args(call, "channels_last", [i == wanted for i in range(7)]))


def test_opcheck_where_only_a_weight_requires_grad():
    call = requiring_grad(sample("none", "batch", "relu", "running", layout="channels_last", H=3, W=3))
    for t in leaves(call):
        t.requires_grad_(t is call.pw)
    torch.library.opcheck(train_op, call)


def widened(args: tuple) -> list:
    return [t.double() if isinstance(t, Tensor) else t for t in args]


# u, z, dz and du are rounded on the way.
HALF = {torch.float16: Tolerance(2**-8, 2**-8), torch.bfloat16: Tolerance(2**-5, 2**-5)}


@pytest.mark.parametrize("name", SAMPLES)
def test_what_the_ops_hold_is_their_plain_implementation(name):
    """The registered implementations, kernels or plain, against the plain ones in fp64; nothing aliases or changes."""
    call = sample(**SAMPLES[name])
    for op, args in ((train_op, call), (bwd_op, backward_args(call, "channels_last"))):
        before = [t.clone() if isinstance(t, Tensor) else t for t in args]
        outputs = op(*args)
        for old, t in zip(before, args, strict=True):
            assert not isinstance(t, Tensor) or torch.equal(t, old)
        storages = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor) and t.numel() > 0}
        for i, (got, want) in enumerate(zip(outputs, DECOMPOSITIONS[op](*widened(args)), strict=True)):
            compare(got, want, name=f"{op.name()}[{i}]", tolerance=HALF.get(call.x.dtype), terms=200)
            assert got.numel() == 0 or got.untyped_storage().data_ptr() not in storages
    assert not any(argument.alias_info for op in (eval_op, train_op, bwd_op) for argument in op._schema.arguments)


def test_fp64_is_accumulated_in_fp64():
    call = sample("relu", "batch", "relu6", "batch", "leaky_relu", dtype=torch.float64, residual="contiguous")
    for op, args in ((train_op, call), (bwd_op, backward_args(call, "contiguous"))):
        for got, want in zip(op(*args), DECOMPOSITIONS[op](*args), strict=True):
            compare(got, want, terms=10)


KINDS = [("none", "none"), ("none", "batch"), ("running", "batch"), ("batch", "running"), ("batch", "batch"),
         ("running", "running")]  # fmt: skip


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_plain_backward_is_autograd_of_the_reference(kinds, affine):
    mid, post = kinds
    acts = itertools.product(("none", "relu6"), ("none", "relu"), ("none", "leaky_relu"))
    for i, (pre, mid_act, post_act) in enumerate(acts):
        options = {"stride": 2, "dilation": 2, "padding": 3} if i % 2 else {}
        call = sample(pre, mid, mid_act, post, post_act, bias=True, residual="contiguous", dtype=torch.float64,
                      affine=affine, **options)  # fmt: skip
        call = requiring_grad(call._replace(x=call.x * 4))  # past the kink of relu6
        norm = lambda kind, tensors, eps: (
            None if kind == "none" else BatchNormArgs(*tensors, training=kind == "batch", eps=eps)
        )
        none = lambda act: None if act == "none" else act
        want_y = separable_conv2d_ref(
            *call[:5], stride=call.stride, padding=call.padding, dilation=call.dilation, pre_act=none(pre),
            mid_norm=norm(mid, call[5:9], call.mid_eps), mid_act=none(mid_act), post_act=none(post_act),
            post_norm=norm(post, call[9:13], call.post_eps), residual=call.residual,
        )  # fmt: skip
        dy = torch.randn_like(want_y)
        tensors = [t for t in leaves(call) if t is not call.residual]
        want = torch.autograd.grad(want_y, tensors, dy)
        with torch.no_grad():
            y, *saved = DECOMPOSITIONS[train_op](*call)
            present = [True] * 5 + [affine and mid != "none", affine and post != "none"]
            grads = DECOMPOSITIONS[bwd_op](dy, *saved, present, *call)
        compare(y, want_y)
        got = [g for g, t in zip(grads, (*call[:5], *call[7:9], *call[11:13]), strict=True) if t is not None]
        for g, w in zip(got, want, strict=True):
            if w.abs().max() > 1e-9:
                compare(g, w, tolerance=Tolerance(1e-9, 1e-9))
            else:  # what batch statistics cancel
                assert g.abs().max() < 1e-9
