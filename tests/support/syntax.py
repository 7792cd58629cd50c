"""The project's files as syntax trees, and what the rules that hold for every file ask of them."""

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("kernels", "fastseg") for path in (ROOT / folder).rglob("*.py"))
FILES = SOURCES + sorted(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))

Finding = tuple[int, str]  # line, what is wrong
Rule = Callable[[ast.Module, Path], Iterator[Finding]]


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), filename=str(path))


def findings_of(rule: Rule, folders: tuple[str, ...]) -> list[str]:
    """What breaks the rule in these folders, as ``path:line: what``."""
    paths = [path.relative_to(ROOT) for path in FILES]
    paths = [path for path in paths if path.as_posix().startswith(tuple(f"{folder}/" for folder in folders))]
    assert paths
    return [f"{path}:{line}: {what}" for path in paths for line, what in rule(parsed(path), path)]


def room_of(module: str) -> str:
    """``fastseg.ops.aspp`` -> ``ops``; ``fastseg`` -> the empty string."""
    return module.split(".")[1] if "." in module else ""


def module_of(path: Path) -> str:
    """``kernels/aspp.py`` -> ``fastseg.kernels.aspp``: as installed."""
    parts = path.with_suffix("").parts
    parts = parts if parts[0] == "fastseg" else ("fastseg", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """(call, dotted name of what is called)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def keywords(call: ast.Call) -> set[str | None]:
    return {keyword.arg for keyword in call.keywords}
