"""The documents: every relative link leads to a file, the README is one screen, and no table has unmeasured rows."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in ROOT.rglob("*.md") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts))
MADE_BY_A_RUN = ("benchmarks/results/", "docs/figures/")  # folders that a command fills
README_LINES = 110
UNMEASURED = "not measured" + " yet"


def broken_links(page: Path, text: str) -> list[str]:
    """The relative link targets of ``text``, as it stands at ``page``, that are not there."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]
    return [t for t in local if not (page.parent / t).exists()]


def missing_paths(text: str) -> list[str]:
    """The paths in backticks, of files and of tests (``path::name``), that are not in the tree."""
    found = re.findall(r"`((?:fastseg|kernels|tests|benchmarks|docs|examples)/[\w./-]*)(?:::(\w+))?`", text)
    missing = [p for p, _ in found if not p.startswith(MADE_BY_A_RUN) and not (ROOT / p).exists()]
    tests = [(p, name) for p, name in found if name and p not in missing]
    return missing + [f"{p}::{name}" for p, name in tests if f"def {name}(" not in (ROOT / p).read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_paths_exist(page):
    text = page.read_text()
    assert broken_links(page, text) == []
    assert missing_paths(text) == []


def test_a_broken_link_is_noticed():
    text = "[a](docs/nothing.md) [b](LICENSE) [c](https://example.org) [d](docs/README.md#part) [e](#part) ![f](no.png)"
    assert broken_links(ROOT / "README.md", text) == ["docs/nothing.md", "no.png"]
    text = "`fastseg/nothing.py` `fastseg/metrics.py` `tests/test_docs.py::test_nothing` `fastseg/metrics.py::update`"
    assert missing_paths(text) == ["fastseg/nothing.py", "tests/test_docs.py::test_nothing"]


def test_the_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_what_is_unmeasured_is_said_twice():
    """Once on the first screen and once on the page of results, in a sentence that names the command; in no table."""
    counts = {str(p.relative_to(ROOT)): " ".join(p.read_text().split()).count(UNMEASURED) for p in PAGES}
    assert {page: n for page, n in counts.items() if n} == {"README.md": 1, "docs/results.md": 1}
