"""A rule: which class it knows, what a module of it must look like, and what computes the same."""

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastseg.converting.known import KNOWN


@dataclass(frozen=True)
class Rule:
    """How blocks of one class are computed otherwise.

    Attributes:
        name: names the rule in the report and in pickles; never changes.
        library: the first part of the module that the class is defined in; "" for any, as of code that is copied.
        classes: names of the classes that define the ``forward`` which the rule replaces.
        refuses: ``refuses(module)`` says why the module is not built as the rule expects, or "". It is asked at each
            call, so it must be quick; where it refuses, the original runs.
        run: ``run(module, original, *inputs)`` computes ``original(*inputs)``.
        takes: the submodules that ``run`` reads in place of calling them, which therefore stay as they are.
        what: one line for the report and the documentation.
        fuses_only: True if ``run`` has the products of the original. On a CPU that brings passes over small maps, and
            folding a norm at each call costs more: there the original runs, except inside ``fastseg.frozen`` and in a
            ``Runner``, which fold once.
    """

    name: str
    library: str
    classes: tuple[str, ...]
    refuses: Callable[[nn.Module], str]
    run: Callable[..., Any]
    takes: Callable[[nn.Module], Iterable[nn.Module]]
    what: str = ""
    fuses_only: bool = False

    def knows(self, owner: type) -> bool:
        """True if ``owner``, a class that defines a ``forward``, is one of its classes."""
        return owner.__name__ in self.classes and self.library in ("", owner.__module__.partition(".")[0])


@functools.lru_cache(maxsize=4096)
def fingerprint(function: Callable) -> str:
    """A hash of what a function does: its text without comments, docstring and annotations; "" if there is no text."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return ""
    if not isinstance(node, ast.FunctionDef):
        return ""
    node.decorator_list, node.returns = [], None
    for arg in ast.walk(node):
        if isinstance(arg, ast.arg):
            arg.annotation = None
    if ast.get_docstring(node) is not None:
        node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(node).encode()).hexdigest()[:12]


def unknown_source(rule: Rule, module: nn.Module) -> str:
    """Why the text of the class is not one that the rule was written for, or "". Another text needs an example."""
    if rule.library == "torch":
        return ""
    known = KNOWN.get(rule.name, {})
    seen = False
    for part in module.modules():
        kind = type(part)
        for method, fingerprints in known.get(kind.__name__, {}).items():
            seen = seen or part is module
            if fingerprint(inspect.unwrap(getattr(kind, method, object))) not in fingerprints:
                return f"{kind.__name__}.{method} is not a version that the rule knows; give an example"
    return "" if seen else f"no version of {type(module).__name__} is known; give an example"
