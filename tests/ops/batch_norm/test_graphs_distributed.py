"""Batch statistics shared by two processes equal those of one process on the whole batch.

Runs in two processes, as the other files here: with the interpreter the kernels, else plain PyTorch.
"""

import pytest
import torch
from processes import run_two
from torch import Tensor

from fastseg.nn import BatchNormAct2d

# A program of its own: a spawned process could not import a test module by name.
WORKER = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
import fastseg
from fastseg.nn import BatchNormAct2d, SyncBatchNorm

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
alone = [dist.new_group([r]) for r in range(2)][rank]
for name, case in torch.load(f"{out}/cases.pt", weights_only=True).items():
    norm = BatchNormAct2d(4, momentum=case["momentum"])
    norm.load_state_dict(case["state"])
    norm = SyncBatchNorm.convert_sync_batchnorm(norm, alone if name == "alone" else None)
    x, r, dy = (t[rank] for t in (case["x"], case["r"], case["dy"]))
    x.requires_grad_(), r.requires_grad_()
    if name == "reference":
        with fastseg.reference():
            y = norm(x, r)
    else:
        y = norm(x, r)
    y.backward(dy)
    result = {"y": y.detach(), "dx": x.grad, "dr": r.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad}
    norm.eval()
    with torch.no_grad():
        result["eval"] = norm(x)
    torch.save(result | norm.state_dict(), f"{out}/{name}{rank}.pt")
dist.destroy_process_group()
"""

SIZES = {"even": (2, 2), "uneven": (1, 3), "empty": (0, 3), "reference": (2, 1), "alone": (2, 2)}


def make_case(sizes: tuple[int, int], momentum: float | None, layout: torch.memory_format) -> dict:
    draw = lambda: [(torch.randn(n, 4, 5, 3) * 2 + 100).contiguous(memory_format=layout) for n in sizes]
    norm = BatchNormAct2d(4)
    torch.nn.init.uniform_(norm.weight, -1.5, 1.5)
    torch.nn.init.uniform_(norm.bias, -0.5, 0.5)
    residual = [torch.randn(n, 4, 5, 3).contiguous(memory_format=layout) for n in sizes]
    upstream = [torch.randn(n, 4, 5, 3) for n in sizes]
    return {"x": draw(), "r": residual, "dy": upstream, "momentum": momentum, "state": norm.state_dict()}


def whole(case: dict, ranks: tuple[int, ...]) -> dict[str, Tensor]:
    """One process, the batches of ``ranks`` one after another."""
    norm = BatchNormAct2d(4, momentum=case["momentum"]).double()
    norm.load_state_dict(case["state"])
    x, r, dy = (torch.cat([case[name][rank] for rank in ranks]).double() for name in ("x", "r", "dy"))
    x.requires_grad_(), r.requires_grad_()
    y = norm(x, r)
    y.backward(dy)
    result = {"y": y.detach(), "dx": x.grad, "dr": r.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad}
    norm.eval()
    return result | {"eval": norm(x).detach()} | norm.state_dict()


def test_two_processes_equal_one(tmp_path):
    layouts = (torch.contiguous_format, torch.channels_last)
    cases = {
        name: make_case(sizes, None if name == "uneven" else 0.1, layouts[i % 2])
        for i, (name, sizes) in enumerate(SIZES.items())
    }
    torch.save(cases, tmp_path / "cases.pt")
    run_two(WORKER, tmp_path)
    for name, case in cases.items():
        parts = [torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in range(2)]
        same = lambda got, want, what, name=name: torch.testing.assert_close(
            got.double(), want.double(), rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}, {what}: {text}"
        )
        groups = [((rank,), [parts[rank]]) for rank in range(2)] if name == "alone" else [((0, 1), parts)]
        for ranks, members in groups:
            want = whole(case, ranks)
            for key in ("y", "dx", "dr", "eval"):
                same(torch.cat([part[key] for part in members]), want[key], key)
            for key in ("dweight", "dbias"):  # of each process's own pixels; DDP adds them up
                same(sum(part[key] for part in members), want[key], key)
            for key in ("running_mean", "running_var", "num_batches_tracked"):
                for part in members:
                    same(part[key], want[key], key)


@pytest.mark.parametrize("training", [True, False])
def test_without_a_process_group_sync_changes_nothing(training):
    x = torch.randn(2, 4, 3, 3)
    results = [BatchNormAct2d(4, sync=sync).train(training)(x) for sync in (False, True)]
    assert torch.equal(*results)
