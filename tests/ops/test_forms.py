"""How an op's form is chosen, forced, remembered and explained: on an op of two numbers, and on the library's own."""

import re
import threading
from pathlib import Path

import pytest
import torch

import fastseg
from fastseg import ops
from fastseg.kernels.runtime.verdict import verdict
from fastseg.ops import conv_act
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.core.forms import FORMS, Form, Forms, Reference, Refused, Verdict, forced_blocks, forcing

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


class Half(Form):
    """Takes even numbers; by its model it pays above 10."""

    name = "half"

    def __init__(self):
        self.asked, self.failing, self.failed = 0, set(), set()

    def refuses(self, n):
        self.asked += 1
        return "odd" if n % 2 else "failed before" if n in self.failed else ""

    def cost(self, n):
        return Verdict(n > 10, n / 2, f"model says {n / 2} us")

    def run(self, n):
        if n in self.failing:
            raise Refused("no engine")
        return "half", n // 2

    def remember(self, n, why):
        self.failed.add(n)


@pytest.fixture
def op():
    forms = Forms("halving", [Half(), Reference(lambda n: ("reference", n / 2))])
    yield forms
    del FORMS["halving"]


def run(op, n: int):
    return op(n, n, recorded=torch.zeros(n))


def test_the_first_that_takes_it(op):
    with fastseg.explain() as report:
        assert [run(op, n)[0] for n in (12, 4, 13)] == ["half", "reference", "reference"]
    good, cheap, odd = report
    assert (good.path, good.form, good.microseconds, good.refused) == ("triton", "half", 6.0, ())
    assert good.why == "model says 6.0 us"
    assert (cheap.path, cheap.why) == ("reference", "model says 2.0 us")
    assert cheap.refused == (("half", "model says 2.0 us", 2.0),) and odd.refused == (("half", "odd", None),)
    assert "half (2.0 us): model says 2.0 us" in str(report)


def test_a_request_is_asked_once(op):
    for _ in range(3):
        run(op, 12)
    assert op.forms[0].asked == 1
    run(op, 14)
    assert op.forms[0].asked == 2


def test_forced(op):
    with fastseg.explain() as report:
        with fastseg.force("halving", "half"):
            assert run(op, 4) == ("half", 2)
            with fastseg.force("halving", "reference"):
                assert run(op, 12)[0] == "reference"
            assert run(op, 4)[0] == "half"
            with fastseg.reference():
                assert run(op, 4)[0] == "reference"
            assert run(op, 13)[0] == "reference"  # the form refuses it
        assert run(op, 4)[0] == "reference"
    inside = "inside fastseg.force()"
    assert [d.why for d in report] == [
        f"{inside}; model says 2.0 us", inside, f"{inside}; model says 2.0 us", "inside fastseg.reference()", "odd",
        "model says 2.0 us",
    ]  # fmt: skip


def test_forced_in_one_thread_alone(op):
    seen = {}

    def work(name: str, form: str) -> None:
        with fastseg.force("halving", form):
            ready.wait()
            seen[name] = run(op, 4)[0]
            ready.wait()

    ready = threading.Barrier(3)
    threads = [threading.Thread(target=work, args=(name, name)) for name in ("half", "reference")]
    for thread in threads:
        thread.start()
    ready.wait()
    seen["outside"] = run(op, 12)[0], run(op, 4)[0]
    ready.wait()
    for thread in threads:
        thread.join()
    assert seen == {"half": "half", "reference": "reference", "outside": ("half", "reference")}


def test_left_in_another_thread(op):
    """As a generator may be: it is left where it was entered too."""
    block = fastseg.force("halving", "half")
    block.__enter__()
    thread = threading.Thread(target=block.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert run(op, 4)[0] == "reference"


def test_a_decorated_function_may_call_itself(op):
    @fastseg.force("halving", "half")
    def deep(n: int):
        return [run(op, 4)[0], *(deep(n - 1) if n else [])]

    assert deep(2) == ["half"] * 3 and run(op, 4)[0] == "reference"


def test_carried_to_another_thread(op):
    with fastseg.force("halving", "half"):
        blocks, seen = forced_blocks(), []

        def work() -> None:
            seen.append(run(op, 4)[0])
            with forcing(blocks):
                seen.append(run(op, 4)[0])
            seen.append(run(op, 4)[0])

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == ["reference", "half", "reference"]


def test_what_a_call_shows_is_remembered(op):
    op.forms[0].failing.add(12)
    with fastseg.explain() as report:
        assert [run(op, 12)[0] for _ in range(2)] == ["reference"] * 2
    assert [d.refused for d in report] == [(("half", "failed before", None),)] * 2 and op.forms[0].failed == {12}


@pytest.mark.parametrize(
    "names, message",
    [
        (("conv", "cudnn"), "no op 'conv' has forms to choose from; known: .*conv2d_act"),
        (("conv2d_act", "whole"), "conv2d_act has no form 'whole'; use one of pointwise, cudnn, .*packed, reference"),
    ],
)
def test_unknown_names(names, message):
    with pytest.raises(ValueError, match=message):
        fastseg.force(*names)


def test_every_list_ends_with_what_takes_everything():
    import fastseg.ops  # noqa: F401

    assert "conv2d_act" in FORMS
    for forms in FORMS.values():
        names = [form.name for form in forms.forms]
        assert len(set(names)) == len(names), forms.op
        assert isinstance(forms.forms[-1], Reference), forms.op


def test_every_public_op_has_a_list():
    """But those that call other ops, what is made of weights, and what has one way alone."""
    of_others = {"aspp", "upsample_confusion", "upsample_loss", "upsample_threshold"}
    no_ops = {"BatchNormArgs", "PoolIndices", "bilinear_kernel", "compose_pointwise"}
    assert {name for name in ops.__all__ if name not in FORMS} == of_others | no_ops


def test_the_worked_example(monkeypatch):
    """CONTRIBUTING.md: one class, one entry in the list, one forced call that equals the oracle."""
    blocks = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(), re.S)
    one_class, entry, call = (next(b for b in blocks if word in b) for word in ("class One", "LIST =", "fastseg.force"))
    tensors = torch.randn(2, 8, 1, 1), torch.randn(5, 8, 1, 1), torch.randn(5)
    scope = {**vars(conv_act), "fastseg": fastseg, "torch": torch} | dict(
        zip(("x", "weight", "bias"), tensors, strict=True)
    )
    exec(one_class, scope)
    exec(entry, scope)
    assert [form.name for form in scope["LIST"][1:]] == [form.name for form in conv_act.LIST]
    monkeypatch.setitem(FORMS, "conv2d_act", None)  # put back behind the new list
    monkeypatch.setattr(conv_act, "FORMS", Forms("conv2d_act", scope["LIST"]))
    with torch.no_grad(), fastseg.explain() as report:
        exec(call, scope)
    assert [d.form for d in report] == ["one_pixel"]


@pytest.mark.skipif(not INTERPRETED, reason="kernels are interpreted")
@pytest.mark.parametrize("op", ["max_pool2d", "upsample_bilinear", "separable_conv2d", "batch_norm_act"])
def test_every_op_is_forced_to_torchs(op):
    """What has one kernel, and what has several: the op of torch, differentiated by torch."""
    x, weight = torch.randn(1, 4, 6, 6, requires_grad=True), torch.randn(4, 4, 1, 1)
    norm = ops.BatchNormArgs(torch.zeros(4), torch.ones(4))
    run = {
        "max_pool2d": lambda: ops.max_pool2d(x, 2),
        "upsample_bilinear": lambda: ops.upsample_bilinear(x, 9),
        "separable_conv2d": lambda: ops.separable_conv2d(x, weight[:, :1], weight),
        "batch_norm_act": lambda: ops.batch_norm_act(x, norm, "relu"),
    }[op]
    with fastseg.explain() as report:
        want = run()
        with fastseg.force(op, "reference"):
            y = run()
    assert [(d.path, d.form) for d in report][1] == ("reference", "reference") and report.decisions[0].path == "triton"
    assert report.decisions[1].why == "inside fastseg.force()" and "fastseg" not in type(y.grad_fn).__name__.lower()
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    assert "Backward0" in type(y.grad_fn).__name__


def test_a_verdict_asked_about_the_other_form():
    fused = verdict(False, "fused", 2e-6, "split", 1e-6, "split", "an H200")
    assert str(fused) == "split: model says fused 2.0 us, split 1.0 us on an H200"
    assert fused.reversed() == Verdict(True, 1.0, fused.says, 2.0) and fused.reversed().reversed() == fused
