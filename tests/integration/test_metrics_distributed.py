"""The confusion matrix summed over two processes."""

import re

import pytest
import torch
from processes import run_two

from fastseg.metrics import ConfusionMatrix
from fastseg.ops.core.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="no kernel runs here: once, in the plain process")

# A program of its own: a spawned process could not import a test module by name.
WORKER = """
import sys
import torch
import torch.distributed as dist
from fastseg.metrics import ConfusionMatrix

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
confusion = ConfusionMatrix(3, ignore_index=255)
data = torch.load(f"{out}/data{rank}.pt", weights_only=True)
if rank == 0:  # the other process has no batch, and still takes part
    confusion.update(*data[0])
    confusion.update(*data[1])
confusion.reduce()
torch.save(confusion.matrix, f"{out}/matrix{rank}.pt")
confusion.reset()
for pred, target in data:
    confusion.update(pred, target)
confusion.reduce()
torch.save(confusion.matrix, f"{out}/both{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes(tmp_path):
    whole, first = (ConfusionMatrix(3, ignore_index=255) for _ in range(2))
    for rank in range(2):
        batches = [(torch.randint(3, (2, 9, 7)), torch.randint(3, (2, 9, 7))) for _ in range(2)]
        batches[0][1][:, :2] = 255
        torch.save(batches, tmp_path / f"data{rank}.pt")
        for pred, target in batches:
            whole.update(pred, target)
            if rank == 0:
                first.update(pred, target)
    run_two(WORKER, tmp_path)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"matrix{rank}.pt", weights_only=True), first.matrix)
        assert torch.equal(torch.load(tmp_path / f"both{rank}.pt", weights_only=True), whole.matrix)


def test_a_process_that_fails_is_seen(tmp_path):
    for script, statuses in (
        ("assert False", "[1, 1]"),
        ("import os, sys\nos.abort() if sys.argv[1] == '1' else 0", "[0, -6]"),
    ):
        with pytest.raises(AssertionError, match=re.escape(statuses)):
            run_two(script, tmp_path)


def test_one_process_needs_no_group():
    confusion = ConfusionMatrix(2)
    confusion.update(torch.tensor([0, 1]), torch.tensor([1, 1]))
    confusion.reduce()
    assert confusion.matrix.tolist() == [[0, 0], [1, 1]]
