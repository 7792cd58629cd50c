"""Second derivatives, forward-mode AD, ``torch.func``, checkpoints and traces of every public op, against torch's own
steps. Runs in two processes: with the interpreter kernels record what is differentiated, without it plain PyTorch."""

from contextlib import nullcontext

import pytest
import torch
from steps import STEPS, Steps
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastseg
from fastseg import nn
from fastseg.ops import upsample_argmax
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.upsample_bilinear import fwd_op

EVERY = pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
# The Functions over kernels, each once: the interpreter takes seconds where plain PyTorch takes milliseconds.
SAME = ("1d", "3d", "aspp", "unpool_conv", "concat_conv", "2d, running", "_act, batch and", "mean", "volume", "nearest")
KERNELS = {name: steps for name, steps in STEPS.items() if not (INTERPRETED and any(part in name for part in SAME))}
RECORDED = pytest.mark.parametrize("steps", KERNELS.values(), ids=KERNELS)


@pytest.fixture(autouse=True)
def _kernels_run():
    """Whatever the cost model says of maps so small."""
    with fastseg.force("atrous_branches", "kernel") if INTERPRETED else nullcontext():
        yield


def close(got, want) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, check_stride=False)


def leaves(steps: Steps) -> list[Tensor]:
    return [t.requires_grad_() for t in steps.tensors()]


def curved(y: Tensor) -> Tensor:
    """A scalar of ``y``, whose gradient is not constant."""
    return (y.sin() * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()


def results_of(f, tensors: list[Tensor], directions: list[Tensor], *dys: Tensor) -> list:
    """One recorded call, differentiated in every way: twice, with named inputs, with a dual gradient, under vmap."""
    made = [t + 0.1 * tensors[0].mean() for t in tensors]  # one tensor is made of another
    y = f(*made)
    first = torch.autograd.grad(curved(y), tensors, create_graph=True)
    penalty = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
    second = torch.autograd.grad(penalty, tensors, retain_graph=True)
    tensors[-1].grad = None
    (penalty + sum(g.square().sum() for g in first)).backward(inputs=[tensors[-1]], retain_graph=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(dys[0], dys[1])
        grads = torch.autograd.grad(y, tensors, dual, retain_graph=True)
        tangents = [forward_ad.unpack_dual(g).tangent for g in grads]
    batched = torch.autograd.grad(y, tensors, torch.stack(dys), is_grads_batched=True)
    return [first, second, tensors[-1].grad, tangents, batched]


@RECORDED
def test_gradients_of_gradients(steps):
    tensors = leaves(steps)
    directions = [torch.randn_like(t) for t in tensors]
    dys = [torch.randn_like(steps.torchs(*tensors)) for _ in range(2)]
    got, want = (results_of(f, tensors, directions, *dys) for f in (steps.ours, steps.torchs))
    close(got, want)


@RECORDED
@pytest.mark.parametrize("use_reentrant", [False] if INTERPRETED else [False, True])
def test_checkpoint(steps, use_reentrant):
    results = []
    tensors = leaves(steps)
    for f in (lambda *t: checkpoint(steps.ours, *t, use_reentrant=use_reentrant), steps.torchs):
        y = f(*tensors)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
        results.append([t.grad for t in tensors])
        for t in tensors:
            t.grad = None
    close(*results)


def test_checkpointed_modules():
    """Convolutions that keep recipes of norms' outputs, unpooled and joined maps."""
    block = torch.nn.Sequential(
        nn.ConvNormAct2d(2, 3), nn.ConvNormAct2d(3, 2, 1), nn.SeparableConv2d(2, 3, mid_norm=True), nn.BatchNormAct2d(3)
    )
    x = torch.randn(2, 2, 4, 4)
    results = []
    for f in (block, lambda v: checkpoint(block, v, use_reentrant=False)):
        block.zero_grad()
        f(x).square().sum().backward()
        results.append([p.grad.clone() for p in block.parameters()])
    torch.testing.assert_close(*results)


@EVERY
def test_forward_mode(steps):
    """Together, and each alone with gradients recorded."""
    tensors = steps.tensors()
    tangents = [torch.randn_like(t) for t in tensors]
    close(*(jvp(f, tuple(tensors), tuple(tangents)) for f in (steps.ours, steps.torchs)))
    for i in range(len(tensors)):
        results = []
        for f in (steps.ours, steps.torchs):
            with forward_ad.dual_level():
                duals = [t.detach().requires_grad_() for t in tensors]
                duals[i] = forward_ad.make_dual(duals[i], tangents[i])
                results.append(forward_ad.unpack_dual(f(*duals)).tangent)
        close(*results)


@EVERY
def test_torch_func(steps):
    tensors = steps.tensors()
    every = tuple(range(len(tensors)))
    scalar = lambda f: lambda *t: curved(f(*t))
    for transform in (lambda f: grad(scalar(f), every), jacrev, jacfwd, lambda f: hessian(scalar(f))):
        close(*(transform(f)(*tensors) for f in (steps.ours, steps.torchs)))


@EVERY
def test_vmap(steps):
    """Over copies of the maps; what is not mapped is shared."""
    tensors = steps.tensors()
    dims = tuple(0 if i in steps.batched else None for i in range(len(tensors)))
    several = [torch.stack([t, -t, t + 1]) if d == 0 else t for t, d in zip(tensors, dims, strict=True)]
    close(*(vmap(f, dims)(*several) for f in (steps.ours, steps.torchs)))
    only = (0, *[None] * (len(tensors) - 1))
    scalar = lambda f: lambda *t: curved(f(*t))
    close(*(vmap(grad(scalar(f)), only)(several[0], *tensors[1:]) for f in (steps.ours, steps.torchs)))


@EVERY
@pytest.mark.parametrize("recorded", [False, True])
def test_jit_trace(steps, recorded):
    tensors = tuple(steps.tensors() if not recorded else leaves(steps))
    with torch.set_grad_enabled(recorded):
        traced = torch.jit.trace(steps.ours, tensors, check_trace=False)
        assert "fastseg::" not in str(traced.inlined_graph)
        others = steps.tensors()
        close(traced(*others), steps.torchs(*others))


def test_argmax_under_vmap():
    x = torch.randn(3, 2, 5, 3, 4)
    want = vmap(lambda v: torch.nn.functional.interpolate(v, (6, 5), mode="bilinear").argmax(1))(x)
    assert torch.equal(vmap(lambda v: upsample_argmax(v, (6, 5), dtype=torch.int64))(x), want)


def test_hessian_of_the_loss():
    """``torch.autograd.functional``, with and without vmap."""
    steps = STEPS["upsample_cross_entropy, mean"]
    (x,) = steps.tensors()
    for vectorize in (False, True):
        got, want = (torch.autograd.functional.hessian(f, x, vectorize=vectorize) for f in (steps.ours, steps.torchs))
        assert want.abs().max() > 1e-3
        close(got, want)


def test_tangents_of_registered_ops():
    """Called by fastseg they take torch's steps; called from elsewhere, as exported programs do, they refuse."""
    x, t = torch.randn(2, 1, 2, 3, 3)
    args = ((5, 4), False, None, None)
    want = torch.nn.functional.interpolate(t, (5, 4), mode="bilinear")
    close(jvp(lambda v: fwd_op(v, *args), (x,), (t,))[1], want)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        close(forward_ad.unpack_dual(fwd_op(dual, *args)).tangent, want)
        with pytest.raises(NotImplementedError, match="fastseg::upsample_bilinear has no forward-mode derivative"):
            fwd_op.op(dual, *args)
    for transform in (lambda f: jvp(f, (x,), (t,)), lambda f: jacfwd(f)(x), lambda f: vmap(jacfwd(f))(x)):
        with pytest.raises(NotImplementedError, match="fastseg::upsample_bilinear has no forward-mode derivative"):
            transform(lambda v: fwd_op.op(v, *args))


def test_functional_call():
    block = nn.SeparableConv2d(2, 3, mid_norm=True, mid_act="relu").double().eval()
    x, params = torch.randn(2, 2, 3, 3, dtype=torch.double), dict(block.named_parameters())
    got = grad(lambda p: functional_call(block, p, (x,)).square().sum())(params)
    block(x).square().sum().backward()
    close(got, {name: p.grad for name, p in block.named_parameters()})


def test_reference_restores():
    """Left in another thread than it was entered in, as generators may be, it leaves nothing behind in either."""
    import threading

    from fastseg.ops.core.explain import in_reference

    seen = []

    def generator():
        with fastseg.reference():
            yield in_reference()

    def elsewhere():
        items.close()
        seen.append(in_reference())

    items = generator()
    assert next(items)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [False] and not in_reference()
    again = fastseg.reference()
    with again:
        with again:
            assert in_reference()
        assert in_reference()
