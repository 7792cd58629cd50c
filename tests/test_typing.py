"""The package says that it is typed: every public function names the types of its arguments and of its result."""

import importlib
import inspect
import types
from collections.abc import Callable, Iterator

import pytest

ROOMS = ("fastseg", "fastseg.ops", "fastseg.nn", "fastseg.models", "fastseg.inference", "fastseg.metrics",
         "fastseg.training", "fastseg.testing", "fastseg.measure.counting", "fastseg.measure.machine",
         "fastseg.demo.training", "fastseg.demo.latency", "fastseg.optimizing")  # fmt: skip


def public(room: str) -> Iterator[tuple[str, Callable]]:
    """(name, function) of what a room exports: functions, and the methods that its classes write themselves."""
    module = importlib.import_module(room)
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    for name in names:
        value = getattr(module, name)
        ours = getattr(value, "__module__", "").startswith("fastseg.")
        if isinstance(value, types.FunctionType) and ours:
            yield name, value
        elif inspect.isclass(value) and ours:
            for method, function in vars(value).items():
                function = getattr(function, "__func__", function)
                written = isinstance(function, types.FunctionType) and function.__qualname__.startswith(value.__name__)
                if written and (not method.startswith("_") or method in ("__init__", "__call__")):
                    yield f"{name}.{method}", function


def gaps(function: Callable) -> list[str]:
    """The arguments without a type, and "return"."""
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    named = [
        name
        for i, (name, parameter) in enumerate(signature.parameters.items())
        if parameter.annotation is empty and not (i == 0 and name in ("self", "cls"))
    ]
    returns = signature.return_annotation is empty and not function.__qualname__.endswith("__init__")
    return named + ["return"] * returns


@pytest.mark.parametrize("room", ROOMS)
def test_public_functions_are_annotated(room):
    found = {name: missing for name, function in public(room) if (missing := gaps(function))}
    assert not found
    assert room == "fastseg" or list(public(room))


def test_a_gap_is_seen():
    assert gaps(lambda x: x) == ["x", "return"]
    assert gaps(test_a_gap_is_seen) == ["return"]
