"""torch.compile of DistributedDataParallel of a model: two processes train as one does with the whole batch.

Inductor gives the same (torch 2.13), but its C++ takes a minute to compile: here the graphs run as they are.
"""

import pytest
import torch
from processes import run_two

from fastseg.ops.core.dispatch import INTERPRETED

# A program of its own: a spawned process could not import a test module by name.
WORKER = """
import copy, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch._dynamo.testing import CompileCounterWithBackend
import fastseg
from fastseg.models import create
from fastseg.nn import SyncBatchNorm

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))

def check(training):
    torch.manual_seed(0)
    twin = create("unet", 3, padding="same", norm=True, widths=(3, 4)).train(training)
    model = copy.deepcopy(twin)
    if training:
        model = SyncBatchNorm.convert_sync_batchnorm(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(DistributedDataParallel(model, broadcast_buffers=False), backend=counter)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9) for net in (model, twin)]
    x = torch.randn(4, 3, 8, 6)

    def same(got, want, what):
        message = lambda text: f"training {training}, {what}: {text}"
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5, msg=message)

    for step in range(2):
        mine = slice(2 * rank, 2 * rank + 2)
        y, z = compiled(x[mine]), twin(x)
        same(y, z[mine], f"logits {step}")
        y.square().mean().backward()
        z.square().mean().backward()
        for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            same(p.grad, q.grad, f"gradient {step} of {key}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (key, t), u in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        same(t, u, key)
    assert counter.frame_count if training else counter.frame_count == 1  # sharing statistics breaks graphs

with fastseg.reference():
    check(False)
    check(True)
dist.destroy_process_group()
"""


@pytest.mark.skipif(INTERPRETED, reason="processes and graphs, whatever the ops run: once, in the plain process")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_compiled_two_processes_equal_one(tmp_path):
    run_two(WORKER, tmp_path)
