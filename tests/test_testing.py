"""fastseg/testing.py: guard zones, and what ``check_op`` catches, one planted fault at a time."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastseg.testing import TOLERANCES, Tolerance, check_op, compare, guard, guarded, poison


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("side", ["before", "after"])
def test_guard_zones_catch_an_overrun(side, dtype):
    with pytest.raises(AssertionError, match=rf"1 elements overwritten {side} a buffer of shape \(2, 3\)"), guarded():
        t = torch.empty(2, 3, dtype=dtype)
        t.as_strided((1,), (1,), t.storage_offset() + (-1 if side == "before" else 6)).fill_(1)


def test_guard_zones_catch_an_overrun_of_an_input_and_of_a_nan():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    with pytest.raises(AssertionError, match="the nearest 3 elements past its last"), guarded():
        planted = guard(x)
        assert planted.stride() == x.stride() and torch.equal(planted, x)
        planted.as_strided((1,), (1,), planted.storage_offset() + x.numel() + 2).fill_(float("nan"))


def test_guard_shows_a_read_past_the_end():
    x = guard(torch.randn(2, 3)[:, :2])
    around = x.as_strided((7,), (1,), x.storage_offset() - 1)
    assert around.isnan().tolist() == [True, False, False, True, False, False, True]


def test_guarded_buffers_are_what_torch_would_give():
    x = torch.randn(2, 3, 4, 5, dtype=torch.half).to(memory_format=torch.channels_last)
    with guarded():
        assert torch.equal(torch.zeros_like(x), x * 0) and torch.zeros_like(x).stride() == x.stride()
        assert torch.empty_like(x).isnan().all() and x.new_empty(7).dtype == torch.half
        assert torch.empty_strided((2, 2), (1, 2)).stride() == (1, 2)
        assert torch.zeros(3, requires_grad=True).requires_grad and not torch.zeros(3)._is_view()
        assert torch.zeros(0, 3).shape == (0, 3) and torch.zeros(()).item() == 0
    assert torch.zeros(3).storage_offset() == x.new_empty(3).storage_offset() == 0
    assert "new_empty" not in vars(Tensor)


def test_poison_fills_and_then_leaves_torch_as_it_was():
    torch.use_deterministic_algorithms(False)
    with poison():
        assert torch.empty(7).isnan().all() and (torch.empty(7, dtype=torch.int16) == 2**15 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_guard_keeps_whether_a_gradient_is_wanted():
    assert guard(torch.randn(3, requires_grad=True)).requires_grad and not guard(torch.randn(3)).requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# check_op: a small op, and one fault at a time.


class Norm(NamedTuple):
    running_mean: Tensor | None
    weight: Tensor | None = None
    training: bool = False


def _op_ref(x, g, *, norm=None):
    y = x * torch.sigmoid(g)
    if norm is None:
        return y
    mean = y.mean((0, 2, 3)) if norm.training else norm.running_mean
    if norm.training:
        norm.running_mean.copy_(0.5 * norm.running_mean + 0.5 * mean.detach())
    return (y - mean.view(1, -1, 1, 1)) * norm.weight.view(1, -1, 1, 1)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, g, fault):
        ctx.save_for_backward(x, g)
        ctx.fault = fault
        return _op_ref(x, g)

    @staticmethod
    def backward(ctx, dy):
        x, g = ctx.saved_tensors
        s = torch.sigmoid(g)
        dx, dg = dy * s, dy * x * s * (1 - s)
        if ctx.fault == "overwrites dy":
            dy.zero_()
        if ctx.fault == "overwrites x":
            x.detach().zero_()
        if ctx.fault == "wrong g":
            dg = dg.flip(0)
        return dx, None if ctx.fault == "forgets g" else dg, None


def _first_doubled(t):
    t = t.clone()
    t[1, 2, 3, 4] *= 1 + 1e-4
    return t


def _clears(x):
    x.data[0, 0, 0, 0] = 0.0
    return x


FAULTS = {
    "value": (lambda x, g: _first_doubled(_op_ref(x, g)), r"^output: 1 of 120 .* worst at \(1, 2, 3, 4\): got "),
    "nan": (lambda x, g: _op_ref(x, g) / (torch.arange(5) != 2), r"^output: \+inf in different places: "),
    "shape": (lambda x, g: _op_ref(x, g)[:1], r"^output: shape is \(1, 3, 4, 5\), expected \(2, 3, 4, 5\)"),
    "dtype": (lambda x, g: _op_ref(x, g).half(), "^output: dtype is torch.float16, expected torch.float32"),
    "layout": (lambda x, g: _op_ref(x, g).contiguous(), r"^output: strides \(60, 20, 5, 1\) .*channels_last"),
    "gradient": (lambda x, g: _WrongGradient.apply(x, g, "wrong g"), r"^gradient of inputs\[1\]: "),
    "forgotten": (lambda x, g: _WrongGradient.apply(x, g, "forgets g"), r"^gradient of inputs\[1\] is missing"),
    "detached": (lambda x, g: _op_ref(x, g).detach(), "^output does not require grad"),
    "input": (lambda x, g: _op_ref(_clears(x), g), r"^inputs\[0\] was changed by the forward"),
    "saved": (lambda x, g: _WrongGradient.apply(x, g, "overwrites x"), r"^inputs\[0\] was changed by the backward"),
    "upstream": (lambda x, g: _WrongGradient.apply(x, g, "overwrites dy"), "^the upstream gradient was changed"),
    "outputs": (lambda x, g: (_op_ref(x, g), x), r"^outputs are output\[0\], output\[1\], expected output$"),
}


def _inputs(dtype=torch.float32):
    return [
        torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_() for _ in range(2)
    ]


@pytest.mark.parametrize("fault", FAULTS)
def test_check_op_catches(fault):
    op, message = FAULTS[fault]
    with pytest.raises(AssertionError, match=message):
        check_op(op, _op_ref, _inputs())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_check_op_passes_a_rounded_result(dtype):
    def op(x, g, norm):  # in fp32 or better inside, rounded once
        mean = norm.running_mean
        norm = Norm(mean.double(), norm.weight.double(), True)
        y = _op_ref(x.double(), g.double(), norm=norm).to(x.dtype)
        mean.copy_(norm.running_mean)
        return y

    norm = Norm(torch.randn(3), torch.randn(3, requires_grad=True), training=True)
    check_op(op, _op_ref, _inputs(dtype), norm=norm)
    check_op(lambda x, g: (_op_ref(x, g), x.argmax(1)), lambda x, g: (_op_ref(x, g), x.argmax(1)), _inputs())
    check_op(lambda x, g: x.detach() * 1.0, lambda x, g: x, _inputs(dtype), grad=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_held_to_units_in_the_last_place(dtype):
    eps = torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match=r"^output: "):
        check_op(lambda x, g: x * (1 + 4 * eps), lambda x, g: x * 1, _inputs(dtype), grad=False)


def test_check_op_compares_running_statistics_and_their_gradients():
    def frozen(x, g, norm):  # normalises with the batch's mean, forgets to update the running one
        return _op_ref(x, g, norm=norm._replace(running_mean=norm.running_mean.clone()))

    def no_weight_gradient(x, g, norm):
        return _op_ref(x, g, norm=norm._replace(weight=norm.weight.detach()))

    for training in (True, False):
        norm = Norm(torch.randn(3), torch.randn(3, requires_grad=True), training)
        with pytest.raises(AssertionError, match=r"^gradient of norm\.weight is missing"):
            check_op(no_weight_gradient, _op_ref, _inputs(), norm=norm)
    with pytest.raises(AssertionError, match=r"^norm\.running_mean after the call: 3 of 3 "):
        check_op(frozen, _op_ref, _inputs(), norm=norm._replace(training=True))

    def updates_in_eval(x, g, norm):
        y = _op_ref(x, g, norm=norm)
        norm.running_mean.add_(1)
        return y

    with pytest.raises(AssertionError, match=r"^norm\.running_mean was changed"):
        check_op(updates_in_eval, _op_ref, _inputs(), norm=norm._replace(training=False))


def test_compare_allows_what_the_sum_length_explains():
    want = torch.ones(8, dtype=torch.float64)
    got = (want + 1e-5).float()
    compare(got, want, terms=65536)
    with pytest.raises(AssertionError, match="allowed within 3e-06, error "):
        compare(got, want)
    compare((want + 2.5e-6).float(), want)
    with pytest.raises(AssertionError, match=r"^output: 8 of 8 "):
        compare((want + 3.5e-6).float(), want)
    compare(got, want, tolerance=Tolerance(rtol=0.0, atol_scale=2e-5))
    with pytest.raises(AssertionError, match=r"^labels: 1 of 3 elements differ; worst at \(1,\): got 2, want 5"):
        compare(torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3]), name="labels")
    with pytest.raises(AssertionError, match="NaN in different places"):
        compare(torch.tensor(1.0), torch.tensor(float("nan")).double())
    with pytest.raises(AssertionError, match="-inf in different places"):
        compare(torch.tensor([-torch.inf]), torch.tensor([1.0]).double())
    compare(torch.tensor([2**-24]).half(), torch.tensor([1.9 * 2**-24]).double())  # neighbours among subnormals
    compare(torch.tensor([float("inf"), float("nan"), 1.0]), torch.tensor([1e300, float("nan"), 1.0]).double())


def test_check_op_knows_a_tensor_passed_twice():
    x = _inputs()[0]
    check_op(lambda a, b: a * b, lambda a, b: a * b, [x, x])


def test_check_op_judges_all_by_the_coarsest_dtype():
    def op(x, w):  # keeps its intermediate in bf16, as eager code does: the gradient of the fp32 weight is no better
        return (x * w.to(x.dtype)) * w.to(x.dtype)

    w = torch.randn(2, 3, 4, 5).bfloat16().float().requires_grad_()
    check_op(op, lambda x, w: x * w * w, [_inputs(torch.bfloat16)[0], w])
    with pytest.raises(AssertionError, match=r"^output: "):
        check_op(op, lambda x, w: x * w * w * (1 + 2**-5), [_inputs(torch.bfloat16)[0], w])
