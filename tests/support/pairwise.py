"""Fewer cases of tests with three parameters or more: every two of their values still meet in one case."""

import itertools
from collections.abc import Iterable

import pytest


def covering(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The items to run, in order. A fault that shows for two values, whatever the others are, is seen in one of them.

    Of a test with one or two parameters all cases stay.
    """
    items = list(items)
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {id(item) for cases in tests.values() for item in _covering_cases(cases)}
    return [item for item in items if id(item) in kept]


def _covering_cases(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Greedy: the case with the most pairs that no earlier one has, until none has any."""
    factors = _factors(cases)
    if len(factors) < 3:
        return cases
    left = []
    for case in cases:
        values = [tuple(id(case.callspec.params[name]) for name in names) for names in factors]
        left.append((case, set(itertools.combinations(enumerate(values), 2))))
    kept: list[pytest.Item] = []
    while left:
        case, new = max(left, key=lambda pair: len(pair[1]))
        if not new:
            break
        kept.append(case)
        left = [(other, pairs - new) for other, pairs in left if other is not case]
    return kept


def _factors(cases: list[pytest.Item]) -> list[tuple[str, ...]]:
    """The parameters of each decorator, which vary together, and of each fixture."""
    if not all(hasattr(case, "callspec") for case in cases):
        return []
    names = set(cases[0].callspec.params)
    if any(set(case.callspec.params) != names for case in cases):
        return []
    of_decorators = []
    for mark in cases[0].iter_markers("parametrize"):
        given = mark.args[0] if mark.args else mark.kwargs["argnames"]
        of_decorators.append(tuple(n.strip() for n in given.split(",")) if isinstance(given, str) else tuple(given))
    return [*of_decorators, *((name,) for name in sorted(names.difference(*of_decorators)))]
