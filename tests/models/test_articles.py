"""docs/articles.md: every row names code and a test that are there, or says that it is open."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "articles.md"
HEADS = ("FCN", "U-Net", "3D U-Net", "UNet++", "SegNet", "DeepLab V1 to V3", "DeepLabV3+")


def rows(text: str) -> list[list[str]]:
    """The cells of each row of each table, without heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if row[0] != "statement" and set(row[0]) != {"-"}]


def fault(row: list[str]) -> str:
    """What is wrong with a row, or ""."""
    if len(row) != 3 or not row[0]:
        return "not statement, where, test"
    code, tests = (re.findall(r"`([^`]+)`", cell) for cell in row[1:])
    missing = [path for path in code if not (ROOT / path).is_file()]
    if missing or not code:
        return f"no file {missing or row[1]}"
    if row[2] == "**open**":
        return ""
    for name in tests:
        path, _, function = name.partition("::")
        if not (ROOT / path).is_file() or not path.startswith("tests/"):
            return f"no file {path}"
        if not re.search(rf"^\s*def {re.escape(function)}\(", (ROOT / path).read_text(), re.MULTILINE):
            return f"no test {name}"
    return "" if tests else "no test"


def test_every_row_is_true():
    found = rows(PAGE.read_text())
    assert len(found) > 60
    assert {f"{row[0]}: {fault(row)}" for row in found if fault(row)} == set()


def test_every_article_is_there():
    assert re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE) == list(HEADS)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("| a | `fastseg/nothing.py` | `tests/models/test_articles.py::test_every_row_is_true` |", "no file"),
        ("| a | `fastseg/metrics.py` | `tests/models/test_articles.py::test_nothing` |", "no test"),
        ("| a | `fastseg/metrics.py` | `tests/nothing.py::test_nothing` |", "no file"),
        ("| a | `fastseg/metrics.py` | soon |", "no test"),
        ("| a | somewhere | **open** |", "no file"),
    ],
)
def test_a_wrong_row_is_noticed(row, why):
    assert fault(*rows(row)).startswith(why)
