"""Networks of other codes from a ``state_dict`` in their names, in torch.nn.functional alone, in evaluation."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


class Net:
    """The layers, by name."""

    def __init__(self, state: Mapping[str, Tensor], eps: float = 1e-5):
        self.state, self.eps = state, eps

    def conv(self, x: Tensor, name: str, stride: int = 1, dilation: int = 1, groups: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        bias, padding = self.state.get(f"{name}.bias"), dilation * (weight.shape[-1] // 2)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (self.state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, eps=self.eps)

    def both(self, x: Tensor, conv: str, norm: str, stride: int = 1, dilation: int = 1, groups: int = 1) -> Tensor:
        return self.norm(self.conv(x, conv, stride, dilation, groups), norm)

    def count(self, beginning: str) -> int:
        """How many different segments follow ``beginning``."""
        place = beginning.count(".")
        return len({key.split(".")[place] for key in self.state if key.startswith(beginning)})


def torchvision_mobilenet(net: Net, x: Tensor) -> Tensor:
    """The last of the 17 blocks."""
    x = F.relu6(net.both(x, "features.0.0", "features.0.1", 2))
    for i in range(1, 18):
        name, skip, stride = f"features.{i}.conv", x, 2 if i in (2, 4, 7, 14) else 1
        if i > 1:
            x = F.relu6(net.both(x, f"{name}.0.0", f"{name}.0.1"))
        k = 0 if i == 1 else 1
        x = F.relu6(net.both(x, f"{name}.{k}.0", f"{name}.{k}.1", stride, groups=x.shape[1]))
        x = net.both(x, f"{name}.{k + 1}", f"{name}.{k + 2}")
        x = x + skip if stride == 1 and x.shape == skip.shape else x
    return x


def timm_xception(net: Net, x: Tensor) -> Tensor:
    """The features before pooling, at stride 32; eps is 1e-3."""
    for i, stride in ((0, 2), (1, 1)):
        x = F.relu(net.both(x, f"stem.{i}.conv", f"stem.{i}.bn", stride))
    last = net.count("blocks.") - 1
    for i in range(last + 1):
        skip, stride = x, 2 if i in (0, 1, 2, last - 1) else 1
        for k in (1, 2, 3):
            name = f"blocks.{i}.stack.conv{k}"
            x = x if i == last else F.relu(x)
            x = net.both(x, f"{name}.conv_dw", f"{name}.bn_dw", stride if k == 3 else 1, groups=x.shape[1])
            x = net.both(F.relu(x) if i == last else x, f"{name}.conv_pw", f"{name}.bn_pw")
            x = F.relu(x) if i == last else x
        if i < last:
            name = f"blocks.{i}.shortcut"
            there = f"{name}.conv.weight" in net.state
            x = x + (net.both(skip, f"{name}.conv", f"{name}.bn", stride) if there else skip)
    return x


def kazuto_v2(net: Net, image: Tensor) -> list[Tensor]:
    """DeepLabV2 at three scales: the image's own logits, the copies', the maximum, as in its training."""

    def run(x: Tensor) -> Tensor:
        x = F.relu(net.both(x, "base.layer1.conv1.conv", "base.layer1.conv1.bn", 2))
        x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
        for layer, stride, dilation in ((2, 1, 1), (3, 2, 1), (4, 1, 2), (5, 1, 4)):
            for block in range(1, net.count(f"base.layer{layer}.block") + 1):
                name, skip, s = f"base.layer{layer}.block{block}", x, stride if block == 1 else 1
                x = F.relu(net.both(x, f"{name}.reduce.conv", f"{name}.reduce.bn", s))
                x = F.relu(net.both(x, f"{name}.conv3x3.conv", f"{name}.conv3x3.bn", 1, dilation))
                x = net.both(x, f"{name}.increase.conv", f"{name}.increase.bn")
                if block == 1:
                    skip = net.both(skip, f"{name}.shortcut.conv", f"{name}.shortcut.bn", s)
                x = F.relu(x + skip)
        return sum(net.conv(x, f"base.aspp.c{i}", 1, rate) for i, rate in enumerate((6, 12, 18, 24)))

    each = [run(image)]
    for scale in (0.5, 0.75):
        each.append(run(F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False)))
    size = each[0].shape[2:]
    full = [F.interpolate(y, size=size, mode="bilinear", align_corners=False) for y in each]
    return [*each, torch.stack(full).amax(0)]


def resnet(net: Net, x: Tensor, prefix: str, dilations: tuple) -> list[Tensor]:
    """The four layers; ``dilations``: of the first and the other blocks of each, None where it has a stride of 2."""
    x = F.relu(net.both(x, f"{prefix}conv1", f"{prefix}bn1", 2))
    x, out = F.max_pool2d(x, 3, 2, 1), []
    for layer, (strided, first, others) in enumerate(dilations, 1):
        for block in range(net.count(f"{prefix}layer{layer}.")):
            name, skip = f"{prefix}layer{layer}.{block}", x
            stride, dilation = (2 if strided and block == 0 else 1), (others if block else first)
            x = F.relu(net.both(x, f"{name}.conv1", f"{name}.bn1"))
            x = F.relu(net.both(x, f"{name}.conv2", f"{name}.bn2", stride, dilation))
            x = net.both(x, f"{name}.conv3", f"{name}.bn3")
            if block == 0:
                skip = net.both(skip, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            x = F.relu(x + skip)
        out.append(x)
    return out


SMP_OS8 = ((False, 1, 1), (True, 1, 1), (False, 2, 2), (False, 4, 4))
TORCHVISION_OS8 = ((False, 1, 1), (True, 1, 1), (False, 1, 2), (False, 2, 4))
OS32 = ((False, 1, 1), (True, 1, 1), (True, 1, 1), (True, 1, 1))


def smp_v3(net: Net, image: Tensor, parts: tuple[str, str, str] = ("aspp", "conv", "bn")) -> Tensor:
    """segmentation_models_pytorch's DeepLabV3 at output stride 8."""
    aspp, conv, norm = (f"decoder.{part}" for part in parts)
    deep = resnet(net, image, "encoder.", SMP_OS8)[-1]
    rates = (1, 12, 24, 36)
    maps = [F.relu(net.both(deep, f"{aspp}.convs.{i}.0", f"{aspp}.convs.{i}.1", 1, r)) for i, r in enumerate(rates)]
    pooled = F.relu(net.both(deep.mean((2, 3), keepdim=True), f"{aspp}.convs.4.1", f"{aspp}.convs.4.2"))
    x = torch.cat([*maps, pooled.expand_as(maps[0])], 1)
    x = F.relu(net.both(x, f"{aspp}.project.0", f"{aspp}.project.1"))
    x = net.conv(F.relu(net.both(x, conv, norm)), "segmentation_head.0")
    return F.interpolate(x, scale_factor=8, mode="bilinear", align_corners=True)


def torchvision_fcn(net: Net, image: Tensor) -> list[Tensor]:
    """torchvision's FCN: the logits and those of the auxiliary head."""
    *_, middle, deep = resnet(net, image, "backbone.", TORCHVISION_OS8)
    out = []
    for x, name in ((deep, "classifier"), (middle, "aux_classifier")):
        x = net.conv(F.relu(net.both(x, f"{name}.0", f"{name}.1")), f"{name}.4")
        out.append(F.interpolate(x, size=image.shape[2:], mode="bilinear", align_corners=False))
    return out


def article_fcn(net: Net, image: Tensor) -> dict[str, Tensor]:
    """The FCN article's FCN-4s, at sides that divide by 32."""
    maps = resnet(net, image, "backbone.", OS32)
    scores = [
        net.conv(F.leaky_relu(net.both(x, f"pool{i}_FCNHead.0", f"pool{i}_FCNHead.1")), f"pool{i}_FCNHead.4")
        for i, x in enumerate(maps, 1)
    ]
    up = lambda x, s: F.conv_transpose2d(x, net.state[f"up_score{s}.0.weight"], None, s, s // 2)
    x = scores[3]
    for skip in scores[2::-1]:
        x = up(x, 2) + skip
    return {"out": up(x, 4), "aux": up(scores[3], 32)}


def caffe_segnet(net: Net, x: Tensor, norm) -> Tensor:
    """The reference's segnet_inference.prototxt; ``norm(x, name)`` is its BN layer."""
    memory = []
    for stage, count in enumerate((2, 2, 3, 3, 3), 1):
        for k in range(1, count + 1):
            x = F.relu(norm(net.conv(x, f"conv{stage}_{k}"), f"conv{stage}_{k}_bn"))
        size = x.shape[2:]
        x, indices = F.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)
        memory.append((indices, size))
    for stage, count in reversed(list(enumerate((2, 2, 3, 3, 3), 1))):
        indices, size = memory.pop()
        x = F.max_unpool2d(x, indices, 2, 2, output_size=size)
        for k in range(count, 0, -1):
            if (stage, k) == (1, 1):
                return net.conv(x, "conv1_1_D")
            x = F.relu(norm(net.conv(x, f"conv{stage}_{k}_D"), f"conv{stage}_{k}_D_bn"))


def caffe_basic(net: Net, x: Tensor, norm) -> Tensor:
    """The reference's segnet_basic_inference.prototxt."""
    x, memory = F.local_response_norm(x, 5, 1e-4, 0.75), []
    for i in (1, 2, 3, 4):
        x = F.relu(norm(net.conv(x, f"conv{i}"), f"conv{i}_bn"))
        size = x.shape[2:]
        x, indices = F.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)
        memory.append((indices, size))
    for i in (4, 3, 2, 1):
        indices, size = memory.pop()
        x = F.max_unpool2d(x, indices, 2, 2, output_size=size)
        x = norm(net.conv(x, f"conv_decode{i}"), f"conv_decode{i}_bn")
    return net.conv(x, "conv_classifier")
