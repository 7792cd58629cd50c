"""A registered op's call skips torch's dispatcher where that would only pass it on, and nowhere else."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastseg.ops.core.torch_private import is_bare
from fastseg.ops.registered.pooling import Geometry, pool_op

ARGS = (*Geometry((4, 6), (2, 3), (2, 2), (2, 2), (0, 0), (1, 1)), 8)
NAME = "fastseg::max_pool"


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, 6)


class Functions(TorchFunctionMode):
    def __init__(self):
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Calls(TorchDispatchMode):
    def __init__(self):
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_skips_the_dispatcher(x, context, monkeypatch):
    excluded = []
    implementation = pool_op.direct["cpu"]
    keys = torch._C._dispatch_tls_local_exclude_set

    def watched(*args):
        excluded.append(keys().raw_repr())
        return implementation(*args)

    monkeypatch.setitem(pool_op.direct, "cpu", watched)
    with context():
        got, want = pool_op(x, *ARGS), pool_op.op(x, *ARGS)
        assert excluded == [keys().raw_repr()]  # once, with nothing of the dispatcher's around it
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0)


def test_records_a_gradient(x):
    pool_op(x.requires_grad_(), *ARGS)[0].sum().backward()
    assert x.grad.sum() == 2 * 3 * 2 * 3


def test_modes_see_it(x):
    for mode in (Calls(), Functions()):
        with mode:
            pool_op(x, *ARGS)
        assert any("max_pool" in str(call) and "fastseg" in str(call) for call in mode.seen), mode.seen


def test_profiler_names_it(x):
    with torch.profiler.profile() as profile:
        pool_op(x, *ARGS)
    assert NAME in {event.key for event in profile.key_averages()}


def test_tracers_record_it(x):
    graph = make_fx(lambda v: pool_op(v, *ARGS)[0])(x)
    assert pool_op.op in {node.target for node in graph.graph.nodes}
    traced = torch.jit.trace(lambda v: pool_op(v, *ARGS)[0], x, check_trace=False)
    assert NAME in str(traced.graph)
    functional = make_fx(torch.func.functionalize(lambda v: pool_op(v, *ARGS)[0]))(x)
    assert pool_op.op in {node.target for node in functional.graph.nodes}


def test_fake_tensors_and_subclasses(x):
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert pool_op(fake, *ARGS)[0].shape == (2, 3, 2, 3)

    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return "named"

    assert pool_op(x.as_subclass(Named), *ARGS) == "named"


def test_negated_views(x):
    want = pool_op(-x, *ARGS)[0]
    torch.testing.assert_close(pool_op(torch._neg_view(x), *ARGS)[0], want)
    inner = torch.view_as_complex(torch.randn(2, 3, 4, 6, 2)).conj().imag  # how one comes about
    assert inner.is_neg()
    torch.testing.assert_close(pool_op(inner, *ARGS)[0], pool_op(inner.resolve_neg(), *ARGS)[0])


def test_lists_of_maps_are_looked_at():
    x = torch.randn(3)
    with torch.enable_grad():
        assert is_bare((x, [x, None, 3], "name", 2.0))
        assert not is_bare((x, [x, torch.randn(3, requires_grad=True)]))
        assert not is_bare((x, [torch._neg_view(x)])) and not is_bare((x, (None, torch._neg_view(x))))
