"""The rule that an oracle is torch's own lines, on a file's syntax tree."""

import ast
from collections.abc import Iterator
from pathlib import Path

from syntax import Finding

NOT_TORCHS = ("fastseg.kernels", "fastseg.ops.cpu", "fastseg.ops.registered", "fastseg.ops.core.forms")
DECISIONS = {"decide", "choose", "runs_kernel", "FORMS"}


def references_are_torchs(tree: ast.Module, path: Path) -> Iterator[Finding]:
    """An ``<op>_ref``, with the functions of its file that it calls, uses torch and other oracles alone."""
    origin = {
        alias.asname or alias.name: str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for reference in (name for name in functions if name.endswith("_ref")):
        asked, seen = [functions[reference]], {reference}
        while asked:
            for line, name, dotted in _used(asked.pop()):
                if not dotted and name in functions and name not in seen and not name.endswith("_ref"):
                    asked.append(functions[name])
                    seen.add(name)
                ours = not dotted and origin.get(name, "").startswith(NOT_TORCHS) and not name.endswith("_ref")
                if ours or name in DECISIONS:
                    yield line, f"{reference}: {name} is no line of torch; what is fast is a form"


def _used(function: ast.FunctionDef) -> Iterator[tuple[int, str, bool]]:
    """(line, name, whether it is an attribute) of what the body uses."""
    for statement in function.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                yield node.lineno, node.id, False
            elif isinstance(node, ast.Attribute):
                yield node.lineno, node.attr, True
