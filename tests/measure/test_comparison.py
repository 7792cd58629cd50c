"""The comparison with eager PyTorch compares what it says it does, and times fairly."""

import time

import pytest
import torch

import fastseg
from fastseg.measure import comparison
from fastseg.measure.timing import interleaved
from fastseg.models import create
from fastseg.nn.conv import SeparableConv2d


def test_eager_form_calls_the_children_and_agrees():
    model = create("deeplabv3plus", 3, width=0.1, decoder_channels=16).eval()
    plain = comparison.eager_form(model)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), fastseg.explain() as report:
        got = plain(x)
    assert {decision.path for decision in report} == {"reference"}
    assert {decision.why for decision in report} == {"inside fastseg.unfused()"}
    with torch.no_grad(), fastseg.reference(), fastseg.explain() as report:
        want = model(x)
    assert "inside fastseg.unfused()" not in {decision.why for decision in report}  # the original is untouched
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_eager_form_of_fcn_has_dense_transposed_convolutions():
    model = create("fcn", 3, backbone="resnet18", stride=8, width=0.05).eval()
    plain = comparison.eager_form(model)
    x = torch.randn(1, 3, 64, 32)
    with torch.no_grad(), fastseg.explain() as report:
        got = plain(x)
    why = [decision.why.split(",")[0] for decision in report if decision.op != "batch_norm_act"]
    assert why == ["the weight is dense"] * 3
    assert {decision.path for decision in report} == {"reference"}
    with torch.no_grad(), fastseg.reference(), fastseg.explain() as report:
        want = model(x)
    assert not any("dense" in decision.why for decision in report)  # the original is untouched
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@fastseg.reference()
def test_each_op_agrees_with_eager():
    for case in comparison.op_cases(torch.device("cpu"), torch.float32, 32):
        assert comparison.compare(case, seconds=0).difference < 1e-5, case.name


@fastseg.reference()
def test_difference_is_seen():
    module = SeparableConv2d(8, 8).eval()
    other = SeparableConv2d(8, 8).eval()
    case = comparison.module_case("separable_conv2d", "8x8", module, other, torch.randn(1, 8, 8, 8))
    assert comparison.compare(case, seconds=0).difference > 0.1


def test_interleaved_times_each_function():
    calls = []

    def sleeper(name, seconds):
        def call():
            calls.append(name)
            time.sleep(seconds)

        return call

    samples = interleaved({"slow": sleeper("slow", 0.02), "fast": sleeper("fast", 0.0)}, repetitions=6, warmup=2)
    assert len(samples["slow"]) == len(samples["fast"]) == 6
    assert min(samples["slow"]) >= 0.02
    assert calls[:4] == ["slow", "slow", "fast", "fast"]
    rounds = [tuple(calls[i : i + 2]) for i in range(4, 16, 2)]
    assert {frozenset(pair) for pair in rounds} == {frozenset(("slow", "fast"))}
    assert len(set(rounds)) == 2  # both orders occur


def test_table_shows_who_is_faster():
    case = comparison.Case("op", "shape", torch.Tensor, torch.Tensor)
    text = comparison.table({"1 thread": [comparison.Result(case, 0.002, 0.005, 0.0)]})
    assert text.splitlines()[1].split() == ["op", "shape", "2.000", "5.000", "2.50", "0e+00"]


def test_table_has_the_runner_both_thread_counts_and_a_reason_where_fastseg_is_slower():
    case = comparison.Case("net", "shape", torch.Tensor, torch.Tensor, torch.Tensor)
    two = comparison.Result(case, 0.002, 0.004, 0.0, 0.001)
    one = comparison.Result(case, 0.006, 0.004, 1e-6, 0.0042, 0.1, "aspp by reference (CPU tensor)")
    head, plain, runner = comparison.table({"2 threads": [two], "1 thread": [one]}).splitlines()
    assert head.split("  ")[-1] == "why slower" and "2 threads: fastseg ms" in head and "1 thread: fastseg ms" in head
    assert plain.split()[:9] == ["net", "shape", "2.000", "4.000", "2.00", "6.000", "4.000", "0.67", "1e-06"]
    assert plain.endswith("1 thread: 50% slower: aspp by reference (CPU tensor)")
    numbers = ["1.000", "4.000", "4.00", "4.200", "4.000", "0.95", "1e-06"]
    assert runner.split()[:10] == ["net,", "Runner", "shape", *numbers]
    assert runner.endswith("1 thread: 5% slower, within the samples' spread of 10%")


def test_reason_is_the_path_that_ran():
    module = SeparableConv2d(8, 8).eval()
    case = comparison.module_case("separable_conv2d", "8x8", module, module, torch.randn(1, 8, 8, 8))
    with fastseg.reference():
        result = comparison.compare(case, seconds=0)
    assert result.path == "separable_conv2d by reference (inside fastseg.reference())"
    slow = comparison.Result(case, 2.0, 1.0, 0.0, path=result.path)
    assert slow.rows() == [("separable_conv2d", 2.0, f"100% slower: {result.path}")]


@pytest.mark.parametrize("name", ["fastseg", "eager", "runner"])
def test_model_case_gives_class_maps(name):
    model = create("deeplabv3plus", 3, width=0.1, decoder_channels=16)
    case = comparison.model_case("model", model, 33, torch.device("cpu"), torch.float32)
    with torch.no_grad(), fastseg.reference():
        labels = getattr(case, name)()
        x = comparison.random_image(3, 33, torch.device("cpu"), torch.float32)
        want = model.eval()(x).argmax(1)
    assert (labels.long() == want).float().mean() > 0.99
