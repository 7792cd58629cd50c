"""The lines of docs/inference.md for Ray and a DataLoader, run as they stand on a local Ray. Last run: Ray 2.60.0."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastseg
from fastseg.inference.segment import segment
from fastseg.io.checkpoint import save_checkpoint
from fastseg.models import create

PAGE = Path(__file__).parents[2] / "docs" / "inference.md"


def page_block() -> str:
    blocks = [block.split("```")[0] for block in PAGE.read_text().split("```python\n")[1:]]
    (block,) = (block for block in blocks if "import ray\n" in block)
    return block


def test_block_compiles():
    compile(page_block(), "inference.md", "exec")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
def test_block_runs(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (6, 16, 24, 3), np.uint8)
    (tmp_path / "images").mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "images" / f"{i}.png")
    model = create("segnet_basic", 3, channels=8).eval()
    save_checkpoint(tmp_path / "best.pt", model, "segnet_basic", {"channels": 8}, list("abc"))
    (tmp_path / "block.py").write_text(page_block())
    quiet = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    subprocess.run([sys.executable, "block.py"], cwd=tmp_path, env=os.environ | quiet, check=True, timeout=240)
    with fastseg.reference():
        want = segment(model, pictures)
    assert len(np.unique(want)) > 1
    for folder in ("maps", "same_maps"):
        files = sorted((tmp_path / folder).iterdir())
        assert [file.name for file in files] == [f"{i}.png" for i in range(6)]
        np.testing.assert_array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), want)
