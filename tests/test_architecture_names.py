"""Rules of who may use which name: private names, developer tools, facts about chips; each is shown to bite."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from syntax import ROOT, SOURCES, Finding, calls, module_of

MODULES = {module_of(path.relative_to(ROOT)) for path in SOURCES}
PRIVATE_NAMES = ("fastseg/ops/core/torch_private.py", "kernels/runtime/triton_private.py")


def private(name: str) -> bool:
    """Whether a dotted name has a part that begins with one underscore."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def bound(tree: ast.Module) -> dict[str, str]:
    """Local name -> dotted name, of all that is imported."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def used(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, and of every attribute of something imported, by its full name.

    ``getattr(torch._C, "_x")`` and ``find("torch._C", "_x")`` count as ``torch._C._x``.
    """
    names = bound(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in names and rest.replace(".", "").isidentifier():
                yield node.lineno, f"{names[first]}.{rest}"
    for call, name in calls(tree):
        if name == "getattr" and len(call.args) > 1 and isinstance(call.args[1], ast.Constant):
            first, _, rest = ast.unparse(call.args[0]).partition(".")
            if first in names:
                yield call.lineno, f"{names[first]}.{rest}.{call.args[1].value}".replace("..", ".")


def folder_of(name: str) -> str | None:
    """The folder, as a module, of the longest module of fastseg that ``name`` begins with."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        if module in MODULES:
            return module.rpartition(".")[0]
    return None


def underscores_stay_in_their_folder(tree: ast.Module, path: Path) -> Iterator[Finding]:
    here = module_of(path).rpartition(".")[0]
    for line, name in sorted(set(used(tree))):
        if name.startswith("fastseg.") and private(name) and folder_of(name) != here:
            yield line, f"{name} is private to its folder: give it a public name, or use what is public"


def private_names_in_one_file(tree: ast.Module, path: Path) -> Iterator[Finding]:
    if path.as_posix() in PRIVATE_NAMES:
        return
    for line, name in sorted(set(used(tree))):
        insides = name.startswith(("triton.backends", "triton.compiler", "triton.runtime"))
        if name.split(".")[0] in ("torch", "triton") and (private(name) or insides):
            yield line, f"{name} is private: take it from one of {PRIVATE_NAMES}, with a fallback"
    for node in ast.walk(tree):  # functions of its own are called by name: torch.ops.mkldnn has private ones only
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops.mkldnn":
            yield node.lineno, "torch.ops.mkldnn is private"


def tools_are_for_developers(tree: ast.Module, path: Path) -> Iterator[Finding]:
    allowed = path.as_posix().startswith("kernels/tools/") or path.as_posix() in COMMANDS_OF_TOOLS
    for line, name in sorted(set(used(tree))):
        if name.startswith("fastseg.kernels.tools") and not allowed:
            yield line, f"{name}: nothing that launches imports tools"


COMMANDS_OF_TOOLS = ("fastseg/cli/tune.py", "fastseg/cli/doctor.py")

_CHIP = re.compile(r"(^|_)(MULTIPROCESSORS|SMS|BANDWIDTH|LANES|MUFU|DOT_RATES?|L2|L2_BYTES|TFLOPS|GBPS|LAUNCH_US)($|_)")


def chips_in_one_table(tree: ast.Module, path: Path) -> Iterator[Finding]:
    """A number of 132, or of 1e11 and more, is a fact about a chip; so is a constant that says so by its name."""
    if path.as_posix() == "kernels/runtime/ceilings.py":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            rate = type(node.value) is float and 1e11 <= abs(node.value) < 1e16
            if node.value == 132 or rate:
                yield node.lineno, f"{node.value}: a chip's number; read kernels/runtime/ceilings.py"
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            literal = isinstance(node.value, ast.Constant)
            if isinstance(target, ast.Name) and _CHIP.search(target.id) and literal:
                yield node.lineno, f"{target.id}: a chip's number; read kernels/runtime/ceilings.py"
