"""``torch.jit.trace`` of an op or a module, called at other sizes: right, or an error."""

import pytest
import torch
from torch import nn

from fastseg import losses, ops
from fastseg.models import create
from fastseg.nn import ASPP, BatchNormAct2d, ConvNormAct2d
from fastseg.ops.core.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="a trace holds torch's own ops, with kernels as without")

SIDES = ((4, 6, 5), (7, 3, 4))  # of the example, and of the call


def low(k: int, dims: int = 2) -> torch.Tensor:
    return torch.randn(k + 1, 4, *SIDES[k][:dims])


def full(k: int, dims: int = 2) -> torch.Tensor:
    return torch.randn(k + 1, 4, *(2 * side + 1 for side in SIDES[k][:dims]))


def labels(k: int, dims: int = 2) -> torch.Tensor:
    return torch.randint(4, full(k, dims)[:, 0].shape)


def there_and_back(dims: int, **pool):
    """A pooling, and the unpooling to the size before it."""
    down, up = getattr(ops, f"max_pool{dims}d"), getattr(ops, f"max_unpool{dims}d")

    def steps(x):
        y, indices = down(x, 2, return_indices=True, **pool)
        return up(y, indices, 2, output_size=x.shape[2:])

    return steps


EIGHT = torch.randn(5, 8, 3, 3)
TERMS = [(1.0, losses.TopK(0.5)), (1.0, losses.Dice())]
# name -> steps, and what makes their tensors
OPS = {
    "argmax": (lambda x, y: ops.upsample_argmax(x, y.shape[2:]), (low, full)),
    "argmax by a factor": (lambda x: ops.upsample_argmax(x, scale_factor=1.7), (low,)),
    "argmax of a volume": (lambda x: ops.upsample_argmax(x, [2 * n for n in x.shape[2:]]), (lambda k: low(k, 3),)),
    "confidence": (lambda x, y: ops.upsample_confidence(x, (y.shape[2], 9)), (low, full)),
    "confusion": (lambda x, t: ops.upsample_confusion(x, t, 4), (low, labels)),
    "loss": (lambda x, t: ops.upsample_loss(x, t, TERMS, align_corners=False), (low, labels)),
    "bilinear": (lambda x, y: ops.upsample_bilinear(x, (y.shape[2], y.shape[3] // 2)), (low, full)),
    "trilinear": (lambda x: ops.upsample_trilinear(x, scale_factor=1.7), (lambda k: low(k, 3),)),
    "transposed": (lambda x, y: ops.bilinear_conv_transpose2d(x, 2, output_size=y.shape[2:]), (low, full)),
    "nearest": (lambda x, y: ops.upsample_nearest_conv2d(x, y, EIGHT), (low, full)),
    "concatenated": (lambda x, y: ops.resize_concat_conv2d([x, y], EIGHT, size=y.shape[2:]), (low, full)),
    "concatenated, smaller": (lambda x, y: ops.resize_concat_conv2d([x, y], EIGHT, size=x.shape[2:]), (low, full)),
    "unpooled 1": (there_and_back(1, index_format="compact", ceil_mode=True), (lambda k: low(k, 1),)),
    "unpooled 2": (there_and_back(2, index_format="compact", ceil_mode=True), (low,)),
    "unpooled 3": (there_and_back(3), (lambda k: low(k, 3),)),
    "module": (BatchNormAct2d(4).eval(), (low,)),
}


@pytest.mark.parametrize("name", OPS)
def test_trace(name):
    steps, makers = OPS[name]
    traced = torch.jit.trace(steps, tuple(make(0) for make in makers), check_trace=False)
    tensors = [make(1) for make in makers]
    torch.testing.assert_close(traced(*tensors), steps(*tensors))


@pytest.mark.parametrize("name", ["unet", "unet3d"])
def test_a_trace_of_a_net_without_padding_takes_no_other_sides(name):
    dims = 3 if name == "unet3d" else 2
    net = create(name, 2, widths=(2, 2)).eval()
    traced = torch.jit.trace(net, torch.randn(1, 3, *(20,) * dims), check_trace=False)
    x = torch.randn(1, 3, 22, *(20,) * (dims - 1))
    torch.testing.assert_close(traced(x), net(x))
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        traced(x[:, :, 1:])


def test_a_trace_that_is_refused_names_numbers():
    net = create("unet", 2, padding="same", widths=(2, 2)).eval()
    with pytest.raises(ValueError, match=r"x is \(1, 3, 1, 8\)"):
        torch.jit.trace(net, torch.randn(1, 3, 1, 8))


def test_a_bottleneck_is_padded_to_its_kernel_at_any_size():
    net = create("deconvnet", 2, width=0.02, bottleneck=2).eval()
    traced = torch.jit.trace(net, torch.randn(1, 3, 48, 32), check_trace=False)
    for sides in ((32, 48), (66, 33)):
        x = torch.randn(1, 3, *sides)
        torch.testing.assert_close(traced(x), net(x))


def test_all_that_a_module_lists_can_be_read():
    """Tools read every attribute that ``dir`` lists; one that raises anything but AttributeError ends them."""
    for module in nn.Sequential(BatchNormAct2d(4), ConvNormAct2d(4, 4), ASPP(4, 4, (1,))).modules():
        for name in dir(module):
            getattr(module, name, None)
