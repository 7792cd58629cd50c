"""`make test` runs every test file: what its pytest commands name and leave out is read from the Makefile."""

import fnmatch
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder, pattern in (("tests", "test_*.py"), ("benchmarks", "test_*.py"), ("benchmarks", "bench_*.py"))
    for path in (ROOT / folder).rglob(pattern)
)


def variables_of(makefile: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)\s*[:?]?=[ \t]*(.*)$", makefile, re.MULTILINE))


def recipes_of(makefile: str) -> dict[str, tuple[list[str], list[str]]]:
    """Target -> its prerequisites, its lines."""
    recipes, lines = {}, []
    for line in makefile.replace("\\\n", " ").splitlines():
        target = re.match(r"([\w.$()/-]+):(?!=)(.*)$", line)
        if line.startswith("\t"):
            lines.append(line.strip())
        elif target and not target[1].startswith("."):
            lines = []
            recipes[target[1]] = target[2].split(), lines
    return recipes


def expanded(text: str, variables: dict[str, str]) -> str:
    """With the values of variables; what is conditional is left empty."""
    for _ in range(9):
        text = re.sub(r"\$\((\w+)\)", lambda found: variables.get(found[1], ""), text)
        text = re.sub(r"\$\(wildcard ([^()]*)\)", r"\1", text)
        text = re.sub(r"\$\(if [^()]*\)", "", text)
    return text


def commands_of(makefile: str, target: str) -> list[list[str]]:
    """The arguments of each pytest that the target, and what it needs and calls, starts. -k chooses tests: left out."""
    variables, recipes = variables_of(makefile), recipes_of(makefile)
    found, seen, todo = [], set(), [target]
    while todo:
        name = todo.pop()
        if name in seen or name not in recipes:
            continue
        seen.add(name)
        needs, lines = recipes[name]
        todo += needs
        for line in lines:
            if "$(MAKE)" in line:
                todo += re.findall(r"[\w-]+", line)
            command = expanded(line, variables)
            if "pytest" in command and "ttsem" not in command:
                arguments = shlex.split(command.partition("pytest")[2].partition(";")[0])
                found += [] if "-k" in arguments else [arguments]
    return found


def runs(arguments: list[str], file: str) -> bool:
    if any(fnmatch.fnmatch(file, a.partition("=")[2]) for a in arguments if a.startswith("--ignore-glob=")):
        return False
    inside = lambda folder: file == folder or file.startswith(f"{folder}/")
    if any(inside(a.partition("=")[2]) for a in arguments if a.startswith("--ignore=")):
        return False
    match = lambda path: file.count("/") == path.count("/") and fnmatch.fnmatch(file, path)
    return any(inside(a) or match(a) for a in arguments if not a.startswith("-"))


def left_out(makefile: str, files: list[str]) -> list[str]:
    commands = commands_of(makefile, "test")
    assert commands
    return [file for file in files if not any(runs(arguments, file) for arguments in commands)]


def test_every_file_is_run():
    assert len(FILES) > 100
    assert left_out(MAKEFILE, FILES) == []


@pytest.mark.parametrize("planted", ["tests/ops/pooling/deeper/test_graphs_x.py", "examples/test_x.py"])
def test_a_file_that_nothing_runs_is_seen(planted):
    assert left_out(MAKEFILE, [*FILES, planted]) == [planted]


@pytest.mark.parametrize(
    "line", ["$(LONG) tests/kernels/aot", "$(INTERPRETED) $(NOT_GRAPHS)", "$(COMPILED) benchmarks"]
)
def test_a_command_that_is_gone_is_seen(line):
    assert MAKEFILE.count(line) == 1
    assert left_out(MAKEFILE.replace(line, "true"), FILES)
