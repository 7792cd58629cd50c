"""Modules whose parameters two processes share out by FSDP2 train and predict as one process with the whole batch does.

Runs in two processes, as the other files here: with the interpreter the kernels, else plain PyTorch.
"""

import pytest
import torch
from processes import run_two
from torch import nn

import fastseg
from fastseg.nn import BilinearConvTranspose2d, ConvNormAct2d

# A program of its own: a spawned process could not import a test module by name.
WORKER = """
import copy, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
import fastseg
from fastseg.models import create
from fastseg.nn import BatchNormAct2d, BilinearConvTranspose2d, ConvNormAct2d, SeparableConv2d, SyncBatchNorm
from fastseg.ops.core.dispatch import INTERPRETED

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
mesh = init_device_mesh("cpu", (2,))

def unet():
    return create("unet", 3, padding="same", norm=True, widths=(3, 4))

def separable():
    mid = SeparableConv2d(4, 6, mid_norm=True, mid_act="relu", pre_act="relu", post_act=None)
    return nn.Sequential(ConvNormAct2d(3, 4), mid, SeparableConv2d(6, 5, bias=True))

def norm_alone():  # its map is made again by the backward of a convolution elsewhere, before its own
    return nn.Sequential(ConvNormAct2d(3, 4), BatchNormAct2d(4), ConvNormAct2d(4, 3))

def upsampled():
    return nn.Sequential(ConvNormAct2d(3, 4), BilinearConvTranspose2d(4, 2, trainable=True))

def children(model):
    return [child for child in model.children() if list(child.parameters())]

def leaves(model):
    return [module for module in model.modules() if list(module.parameters(recurse=False))]

def second(model):
    return [model[1]]

def evaluated(model, x):
    training = model.training
    if training:
        model.eval()
    with torch.no_grad():
        y = model(x)
    if training:  # what was trained in eval mode is evaluated without a change of mode
        model.train()
    return y

def check(name, build, parts, training):
    torch.manual_seed(0)
    twin = build()
    for norm in twin.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    model = copy.deepcopy(twin)
    twin.train(training), model.train(training)
    if training:
        model = SyncBatchNorm.convert_sync_batchnorm(model)
    for part in parts(model):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    run = lambda net, x: net(x).square().mean()
    if hasattr(model, "loss"):
        register_fsdp_forward_method(model, "loss")
        run = lambda net, x: net.loss(x, (x.sum(1) > 0).long())
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.2) for net in (model, twin)]
    x = torch.randn(4, 3, 6, 4)

    def same(got, want, what):
        message = lambda text: f"{name} {parts.__name__} {training}, {what}: {text}"
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5, msg=message)

    same(evaluated(model, x), evaluated(twin, x), "evaluated before")
    mine = run(model, x[2 * rank : 2 * rank + 2])
    whole = run(twin, x)
    for loss in (mine, whole):
        loss.backward()
    dist.all_reduce(mine := mine.detach().clone())
    same(mine / 2, whole.detach(), "loss")
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        same(p.grad.full_tensor(), q.grad, f"gradient of {key}")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    same(evaluated(model, x), evaluated(twin, x), "evaluated after")
    model.reshard()
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        same(p.full_tensor().detach(), q.detach(), key)
    for (key, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        same(b, c, key)

check("separable", separable, children, True)
check("norm alone", norm_alone, second, True)
check("norm alone", norm_alone, second, False)
if not INTERPRETED:  # the interpreter takes long
    check("unet", unet, children, False)
    check("unet", unet, leaves, True)
    check("separable", separable, leaves, False)
    check("upsampled", upsampled, children, False)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_sharded_equals_whole(tmp_path):
    run_two(WORKER, tmp_path)


@pytest.mark.parametrize("build", [lambda: ConvNormAct2d(3, 4), lambda: BilinearConvTranspose2d(3, 2, trainable=True)])
def test_values_gathered_into_the_same_tensors_are_seen(build):
    """What FSDP does between two calls, at an address that does not change, and its mark on the modules."""
    net = build().eval()
    x = torch.randn(1, 3, 4, 4)
    for module in net.modules():
        module.register_load_state_dict_post_hook(lambda *_: None)
    with torch.no_grad(), fastseg.reference():
        net(x)
        for p in net.parameters():
            with torch.autograd._unsafe_preserve_version_counter(p):
                p.add_(0.5)
        torch.testing.assert_close(net(x), plain(net, x))


def plain(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(net, ConvNormAct2d):
        return net.norm(net.conv(x)).relu()
    return nn.functional.conv_transpose2d(x, net.weight, None, net.stride, net.padding)
