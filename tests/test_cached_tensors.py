"""No function of kernels and ops remembers a tensor: on a device it would outlive the call whose memory it lies in.

CUDA graphs of torch.compile run a first call in a pool of their own and refuse what stays alive there; a capture cannot
copy from the host; and every size would hold memory for good.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CACHES = {"functools.cache", "functools.lru_cache", "cache", "lru_cache", "memoized", "memoized_as_given"}
ON_CPU = ("fastseg/ops/cpu/", "fastseg/ops/core/constants.py")  # its constants, which say so
MAKERS = {
    "arange",
    "as_tensor",
    "cat",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randn",
    "stack",
    "tensor",
    "zeros",
}


def cached_tensors(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of each remembered function that returns a tensor, or makes one."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        names = {ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list}
        if not names & CACHES:
            continue
        called = [ast.unparse(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)]
        made = [name for name in called if name.removeprefix("torch.") in MAKERS]
        made += [name for name in called if name.split(".")[-1].startswith(("new_", "clone", "cuda"))]
        if made or "Tensor" in (ast.unparse(node.returns) if node.returns else ""):
            yield node.lineno, node.name


def test_nothing_remembers_a_tensor():
    paths = [path.relative_to(ROOT) for folder in ("kernels", "fastseg/ops") for path in (ROOT / folder).rglob("*.py")]
    looked_at = [path for path in paths if not path.as_posix().startswith(ON_CPU)]
    assert len(looked_at) > 60
    parsed = {path: ast.parse((ROOT / path).read_text()) for path in looked_at}
    assert [f"{path}:{line}: {name}" for path in parsed for line, name in cached_tensors(parsed[path])] == []


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("@functools.cache\ndef f(n: int) -> Tensor: ...", "@functools.cache\ndef f(n: int) -> int: ..."),
        ("@lru_cache(8)\ndef f(n):\n    return torch.tensor(n)", "def f(n):\n    return torch.tensor(n)"),
        ("@memoized\ndef f(x):\n    return x.new_empty(3)", "@memoized\ndef f(x):\n    return [x] * 3"),
        ("@functools.cache\ndef f() -> tuple[Tensor, int]: ...", "@functools.cache\ndef f() -> tuple[int, int]: ..."),
    ],
)
def test_it_is_seen(bad, good):
    assert [name for _, name in cached_tensors(ast.parse(bad))] == ["f"]
    assert not list(cached_tensors(ast.parse(good)))
