"""Second derivatives, forward-mode AD, ``torch.func``, checkpoints and traces of every public op, against torch's own
steps. Runs in two processes: with the interpreter kernels record what is differentiated, without it plain PyTorch."""

import pytest
import torch
from steps import STEPS, Steps
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from fastseg.ops import _atrous, upsample_argmax

EVERY = pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)


@pytest.fixture(autouse=True)
def _kernels_run(monkeypatch):
    """Whatever the cost model says of maps so small."""
    if hasattr(_atrous, "plan"):
        plan = _atrous.plan
        monkeypatch.setattr(_atrous, "plan", lambda *sizes: plan(*sizes)._replace(own=True))


def close(got, want) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, check_stride=False)


def leaves(steps: Steps) -> list[Tensor]:
    return [t.requires_grad_() for t in steps.tensors()]


def weighted(f, like: Tensor):
    """``f`` with a scalar result, whose gradient at f's is not constant."""
    factors = torch.linspace(-1, 2, like.numel(), dtype=like.dtype).view_as(like)
    return lambda *tensors: (f(*tensors).sin() * factors).sum()


@EVERY
def test_second_derivatives(steps):
    """Also where one tensor was made of another, and where the second backward names its inputs."""
    tensors = leaves(steps)
    like = steps.torchs(*tensors).detach()
    directions = [torch.randn_like(t) for t in tensors]
    results = []
    for f in (steps.ours, steps.torchs):
        made = [t + 0.1 * tensors[0].mean() for t in tensors]
        first = torch.autograd.grad(weighted(f, like)(*made), tensors, create_graph=True)
        penalty = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
        second = torch.autograd.grad(penalty, tensors, retain_graph=True)
        last = tensors[-1]
        last.grad = None
        (penalty + sum(g.square().sum() for g in first)).backward(inputs=[last])
        results.append((first, second, last.grad))
    close(*results)


@EVERY
def test_forward_mode(steps):
    tensors = steps.tensors()
    tangents = [torch.randn_like(t) for t in tensors]
    got, want = (jvp(f, tuple(tensors), tuple(tangents)) for f in (steps.ours, steps.torchs))
    close(got, want)
    for i in range(len(tensors)):  # each alone, with gradients recorded: dual numbers
        results = []
        for f in (steps.ours, steps.torchs):
            with forward_ad.dual_level():
                duals = leaves(steps)
                duals = [t.detach().requires_grad_() for t in tensors]
                duals[i] = forward_ad.make_dual(duals[i], tangents[i])
                results.append(forward_ad.unpack_dual(f(*duals)).tangent)
        close(*results)


@EVERY
def test_a_dual_gradient(steps):
    """Forward over reverse: what the backward is given carries the tangent."""
    results = []
    tensors = steps.tensors()
    v = torch.randn_like(steps.torchs(*tensors))
    for f in (steps.ours, steps.torchs):
        recorded = [t.detach().requires_grad_() for t in tensors]
        y = f(*recorded)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones_like(y), v)
            grads = torch.autograd.grad(y, recorded, dual, allow_unused=True)
            results.append([g if g is None else forward_ad.unpack_dual(g).tangent for g in grads])
    close(*results)


@EVERY
def test_torch_func(steps):
    tensors = steps.tensors()
    every = tuple(range(len(tensors)))
    like = steps.torchs(*tensors)
    ours, torchs = weighted(steps.ours, like), weighted(steps.torchs, like)
    close(grad(ours, every)(*tensors), grad(torchs, every)(*tensors))
    close(jacrev(steps.ours)(*tensors), jacrev(steps.torchs)(*tensors))
    close(jacfwd(steps.ours)(*tensors), jacfwd(steps.torchs)(*tensors))
    close(hessian(ours)(*tensors), hessian(torchs)(*tensors))


@EVERY
def test_vmap(steps):
    """Over copies of the maps; what is not mapped is shared. And over the gradients of a backward."""
    tensors = steps.tensors()
    dims = tuple(0 if i in steps.batched else None for i in range(len(tensors)))
    several = [torch.stack([t, -t, t + 1]) if d == 0 else t for t, d in zip(tensors, dims, strict=True)]
    close(*(vmap(f, dims)(*several) for f in (steps.ours, steps.torchs)))
    only_x = (0, *[None] * (len(tensors) - 1))
    like = steps.torchs(*tensors)
    arguments = [several[0], *tensors[1:]]
    close(*(vmap(grad(weighted(f, like)), only_x)(*arguments) for f in (steps.ours, steps.torchs)))
    recorded = [t.requires_grad_() for t in tensors]
    v = torch.randn(3, *like.shape, dtype=like.dtype)
    results = []
    for f in (steps.ours, steps.torchs):
        y = f(*recorded)
        results.append(torch.autograd.grad(y, recorded[0], v, is_grads_batched=True, allow_unused=True))
    close(*results)


@EVERY
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(steps, use_reentrant):
    tensors = leaves(steps)
    results = []
    for run in (steps.ours, lambda *t: checkpoint(steps.ours, *t, use_reentrant=use_reentrant)):
        y = run(*tensors)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
        results.append([t.grad for t in tensors])
        for t in tensors:
            t.grad = None
    close(*results)


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


def test_functional_call():
    from fastseg import nn

    block = nn.SeparableConv2d(2, 3, mid_norm=True, mid_act="relu").double().eval()
    x, params = torch.randn(2, 2, 3, 3, dtype=torch.double), dict(block.named_parameters())
    got = grad(lambda p: functional_call(block, p, (x,)).square().sum())(params)
    block(x).square().sum().backward()
    close(got, {name: p.grad for name, p in block.named_parameters()})
