"""A converted model under torch's tools: compile, export, two processes."""

import copy

import pytest
import torch
from processes import run_two
from rows import shared
from torch import Tensor, nn

import fastseg
from fastseg import ops
from fastseg.ops.core.dispatch import INTERPRETED


class Block(nn.Module):
    """Nearest doubling beside a skip, as in many decoders; stands for the rules whose ops are not ``Sequential``'s."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU())
        self.conv = nn.Conv2d(16, 5, 3, padding=1)
        self.fuse = nn.Conv2d(13, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        coarse = self.deep(fine)
        y = ops.upsample_nearest_conv2d(coarse, fine, self.conv.weight, self.conv.bias, act="relu")
        return ops.resize_concat_conv2d([y, coarse], self.fuse.weight, self.fuse.bias, size=tuple(fine.shape[2:]))


def made() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 3, 16, 24)
    return fastseg.convert(model, x), x


@pytest.mark.parametrize("training", shared([False, True], interpreted=[True], plain=[False]))
def test_compile_without_breaks(training):
    model, x = made()
    assert len(fastseg.conversion(model).converted) == 2
    model.train(training)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in ((16, 24), (16, 24), (20, 28)):
        x = torch.randn(2, 3, *size)
        y, want = compiled(x), twin(x)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
        for m, out in ((model, y), (twin, want)):
            m.zero_grad()
            out.square().sum().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)


def test_a_compiled_part_is_converted_inside_and_the_check_is_not_compiled():
    graphs = []
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Block()).eval()
    model[1] = torch.compile(model[1], backend=lambda graph, inputs: graphs.append(1) or graph.forward)
    x = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        want = model(x)
        before = len(graphs)
        fastseg.convert(model, x)
        assert len(graphs) == before
        assert [row.module for row in fastseg.conversion(model).converted] == ["1._orig_mod.stem", "1._orig_mod.deep"]
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


def test_export_at_any_batch_and_size():
    model, x = made()
    dims = {0: torch.export.Dim("n", max=64), 2: 4 * torch.export.Dim("h", min=2, max=64),
            3: 4 * torch.export.Dim("w", min=2, max=64)}  # fmt: skip
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=(dims,), strict=False).run_decompositions()
        ours = any(str(node.target).startswith("fastseg") for node in program.graph.nodes)
        assert ours <= INTERPRETED, "without kernels the program is of torch's own ops"
        for shape in ((2, 3, 16, 24), (5, 3, 32, 12)):
            x = torch.randn(shape)
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


WORKER = """
import copy, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import fastseg

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
torch.manual_seed(0)
block = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())
plain = nn.Sequential(block(3, 4), block(4, 2)).double()
model = fastseg.convert(copy.deepcopy(plain), torch.randn(1, 3, 8, 8, dtype=torch.float64))
assert len(fastseg.conversion(model).converted) == 2
nets = [DistributedDataParallel(net.eval()) for net in (model, plain)]  # statistics of one process would differ
x = torch.randn(4, 3, 8, 8, dtype=torch.float64)[2 * rank : 2 * rank + 2]
for step in range(2):
    for net in nets:
        net.zero_grad()
        net(x).square().mean().backward()
        torch.optim.SGD(net.parameters(), lr=0.1).step()
for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
    torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(p, q)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_train_a_converted_model(tmp_path):
    run_two(WORKER, tmp_path)
