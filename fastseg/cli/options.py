"""The values that ``--option NAME=VALUE`` may have: a model's options, from the signature of its constructor."""

import inspect
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from fastseg.io.files import printable
from fastseg.models import MODELS, names

FIXED = {"num_classes": "it follows from the data set's classes", "in_channels": "pictures are RGB, of 3 channels"}


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """The options of a model that can be given on the command line."""
    parameters = inspect.signature(MODELS[name]).parameters
    return {option: parameter for option, parameter in parameters.items() if option not in FIXED}


def describe_options() -> str:
    """The options of every model with their defaults, one line each."""
    lines = []
    for name in names():
        shown = (f"{option}={_json(parameter.default)}" for option, parameter in options_of(name).items())
        lines.append(f"  {name}: {', '.join(shown)}")
    return "\n".join(lines)


def fault_of(name: str, options: Mapping[str, Any]) -> str | None:
    """What is wrong with the first option of bad name or type, or None."""
    known = options_of(name)
    for option, value in options.items():
        if option in FIXED:
            return f"{option}: cannot be chosen; {FIXED[option]}"
        if option not in known:
            return f"{printable(option)}: {name} has no such option; it has {', '.join(known)}"
        hint = known[option].annotation
        if not fits(value, hint):
            shown = printable(repr(value))
            return f"{option}={shown[:80]}: {name} takes {_words(hint)}"
    return None


def fits(value: object, hint: Any) -> bool:
    """True if a JSON value has the type of an annotation."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in inner)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if origin is Sequence or origin in (list, tuple):
        return isinstance(value, list) and all(fits(part, inner[0]) for part in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint is type(None):
        return value is None
    return type(value) is (origin or hint)  # True is not an integer


def _words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, inner))
    if origin is Literal:
        return "one of " + ", ".join(map(_json, inner))
    if origin is Sequence or origin in (list, tuple):
        return f"a list, each entry {_words(inner[0])}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return words.get(hint, "an object" if hint is dict else str(hint))


def _json(value: object) -> str:
    """As ``--option`` takes it."""
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(_json, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
