"""The choice of cases that `make test` runs of a test with three parameters or more."""

import itertools
from types import SimpleNamespace

import pytest
from pairwise import covering

VALUES = {"a": "uvw", "b, c": [(0, "x"), (1, "y"), (2, "x")], "d": "st", "fixture": "pq"}


def cases(name: str, values: dict) -> list:
    """Stand-ins for pytest's items, one for each way to choose a value of every decorator and fixture."""
    marks = [pytest.mark.parametrize(names, list(v)).mark for names, v in values.items() if names != "fixture"]
    made = []
    for chosen in itertools.product(*values.values()):
        params: dict[str, object] = {}
        for names, value in zip(values, chosen, strict=True):
            params |= dict(zip(names.split(", "), value if "," in names else (value,), strict=True))
        of_kind = lambda kind: marks if kind == "parametrize" else []
        made.append(
            SimpleNamespace(
                nodeid=f"{name}[{chosen}]", callspec=SimpleNamespace(params=params), iter_markers=of_kind, chosen=chosen
            )
        )
    return made


def pairs(items: list) -> set:
    return {pair for item in items for pair in itertools.combinations(enumerate(item.chosen), 2)}


def test_every_two_values_meet_in_fewer_cases():
    items = cases("test_a", VALUES)
    kept = covering(items)
    assert pairs(kept) == pairs(items)
    assert len(kept) <= 12 < len(items)
    assert [item for item in items if item in kept] == kept, "in order"


def test_two_parameters_and_none_keep_all_cases():
    few = cases("test_b", {"a": "uvw", "b, c": VALUES["b, c"]})
    alone = [SimpleNamespace(nodeid="test_c")]
    assert covering([*few, *alone]) == [*few, *alone]


def test_one_test_does_not_stand_for_another():
    first, second = cases("test_a", VALUES), cases("test_d", VALUES)
    assert len(covering([*first, *second])) == 2 * len(covering(first))
