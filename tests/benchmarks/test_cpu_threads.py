"""Every case of the table of CPU times computes the same twice, and is timed."""

import pytest
import torch

import fastseg
from benchmarks.studies import cpu_threads

LAYERS = {
    "separable": ((8, 16, 9, 2),),
    "atrous": ((8, 8, 9, 2),),
    "pooling": ((3, 8),),
    "winograd": ((64, 24), (8, 6)),  # Winograd's form, and oneDNN's
}


def _cases(op: str, layout: str):
    if op in cpu_threads.HEADS:
        return [case for classes in (1, 2, 5) for case in cpu_threads.HEADS[op](layout, classes, (32,))]
    if op == "runner":
        return list(cpu_threads.runner_cases(layout, 32, ["unetplusplus", "segnet_basic"]))
    return list(cpu_threads.LAYERS[op](layout, LAYERS[op]))


@pytest.mark.parametrize("layout", cpu_threads.LAYOUTS)
@pytest.mark.parametrize("op", [*cpu_threads.HEADS, *cpu_threads.LAYERS])
def test_both_sides_of_a_case_are_equal(op, layout):
    cases = _cases(op, layout)
    assert len({case.name for case in cases}) == len(cases) > 0
    for case in cases:
        with torch.set_grad_enabled(op in ("loss", "upsampling")), fastseg.reference():  # the CPU's path
            results = [f() for f in (case.fastseg, case.eager, case.other) if f is not None]
        for result in results[1:]:
            if op in ("argmax", "runner"):
                assert (results[0] == result).float().mean() >= 0.999, case.name
            else:
                torch.testing.assert_close(results[0], result, rtol=1e-4, atol=1e-4, msg=lambda m, c=case: c.name + m)


def test_a_row_is_of_its_number_of_threads(monkeypatch):
    monkeypatch.setattr(cpu_threads, "LEAST_SAMPLES", 1)
    before, seen = torch.get_num_threads(), []
    case = cpu_threads.Case("case", lambda: seen.append(torch.get_num_threads()), lambda: None)
    rows = [cpu_threads.compare(case, n, 0.0) for n in (1, 2)]
    assert set(seen) == {1, 2} and torch.get_num_threads() == before
    assert [row.threads for row in rows] == [1, 2] and all(row.median > 0 for row in rows)
    assert cpu_threads.table(rows, [1, 2]).splitlines()[-1].startswith("| case | ")


def test_the_summary_names_what_takes_longer():
    row = lambda name, threads, median: cpu_threads.Row(name, threads, median, median, None, 1.0)
    rows = [row("argmax a", 1, 0.5), row("argmax a", 2, 1.2), row("argmax b", 1, 0.7), row("argmax b", 2, 0.6)]
    last = cpu_threads.summary(rows, [1, 2]).splitlines()[-1]
    assert last == "| argmax | 2 | 0.50, 0.60, 0.70 | 0.60, 0.90, 1.20 | a, 2: 1.20 |"
