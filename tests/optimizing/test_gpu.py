"""What only a GPU shows of optimised models: the kernels that passes put in, their captured graphs, and a Runner's."""

import copy

import pytest
import torch
from nets import unsettle
from torch import Tensor, nn
from torch.nn import functional as F

import fastseg
from fastseg.inference import Runner

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


class Net(nn.Module):
    """What the passes know, as other libraries write it: residuals, depthwise pairs, an ASPP, a head, a class map."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.down, self.down_norm = nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32)
        self.point, self.point_norm = nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64)
        self.branches = nn.ModuleList(nn.Conv2d(64, 32, 3, padding=r, dilation=r) for r in (2, 4, 6))
        self.head = nn.Conv2d(96 + 32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.stem_norm(self.stem(x)))
        b = F.relu(self.point_norm(self.point(F.relu(self.down_norm(self.down(F.max_pool2d(a, 2)))))))
        c = torch.cat([F.relu(branch(b)) for branch in self.branches], 1)
        c = F.interpolate(c, size=a.shape[2:], mode="bilinear", align_corners=False)
        return F.interpolate(self.head(torch.cat([c, a], 1)), size=x.shape[2:], mode="bilinear", align_corners=False)


class Classes(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


def net(kind: type[Net] = Net, dtype: torch.dtype = torch.float32) -> nn.Module:
    return unsettle(kind()).to(DEVICE, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (2, 3, 96, 128)), device=DEVICE, dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert (got.float() - want.float()).abs().max() <= tolerance * want.float().abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2**-4)], ids=str)
def test_an_optimised_model_keeps_its_values(dtype, tolerance):
    model, x = net(dtype=dtype), image(dtype=dtype)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        close(fastseg.optimize(model, (x,))(x), exact, tolerance)


def test_its_class_map():
    model, x = net(Classes), image()
    with torch.no_grad():
        want = model(x)
        assert (fastseg.optimize(model, (x,))(x) != want).float().mean() <= 1e-3


def test_it_is_captured():
    model, x = net(), image()
    with torch.no_grad():
        optimised = fastseg.optimize(model, (x,))
        optimised(x)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = optimised(x)
        x.normal_()
        graph.replay()
        assert torch.equal(y, optimised(x))


def test_a_runner_of_a_model_that_is_not_ours():
    """Its graph of the second call of a shape gives what its launches gave; another shape, and changed weights."""
    model = net()
    runner = Runner(model, image())
    for x in (image(), image(1, 3, 64, 96), image(), image(1, 3, 64, 96)):
        with torch.no_grad():
            want = copy.deepcopy(model).double()(x.double())
        for _ in range(3):
            close(runner(x), want, 1e-4)
    model.head.weight.mul_(2)
    with torch.no_grad():
        x = image()
        close(runner(x), copy.deepcopy(model).double()(x.double()), 1e-4)
