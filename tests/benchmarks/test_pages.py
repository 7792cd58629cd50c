"""The pages of ``make docs``: one for each benchmarked op, and nothing in them but what the code says."""

import pytest

from benchmarks.gpu.ops import OPS
from benchmarks.report import pages


def test_every_op_has_a_page(tmp_path):
    assert {module.OP for module in OPS} == set(pages.KERNELS)
    assert pages.main(["-o", str(tmp_path), "--without-report"]) == 0
    for op, (files, topic) in pages.KERNELS.items():
        text = (tmp_path / f"{op}.md").read_text()
        for name in files:
            assert pages.header(name) in text
        assert "| shape | mode | floor us |" in text
        assert (pages.record.ROOT / "kernels/tools/cases" / f"{topic}.py").exists()
        assert ("](" + op + ".png)" in text) == (tmp_path / f"{op}.png").exists()
    index = (tmp_path / "README.md").read_text()
    assert all(f"]({op}.md)" in index for op in pages.KERNELS)
    committed = {path.name: path.read_text() for path in (pages.record.ROOT / "docs" / "ops").glob("*.md")}
    stale = {path.name for path in tmp_path.glob("*.md") if committed.pop(path.name, None) != path.read_text()}
    assert not stale | committed.keys(), "run `make docs`, and commit docs/ops"


def test_one_page(tmp_path):
    assert pages.main(["-o", str(tmp_path), "--without-report", "--op", "pooling"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"pooling.md", "README.md"} | (
        {"pooling.png"} if (tmp_path / "pooling.png").exists() else set()
    )
    with pytest.raises(SystemExit):
        pages.main(["--op", "nothing"])
