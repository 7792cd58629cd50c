"""The DeepLab family from a ``state_dict``, written with torch.nn.functional alone; statistics move when training."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

# What each depthwise convolution of MobileNetV2 does: (nominal stride, {output stride: (stride, dilation)}).
BLOCKS = {
    **{i: (1, {16: (1, 1), 8: (1, 1)}) for i in (1, 3, 5, 6)},
    **{i: (2, {16: (2, 1), 8: (2, 1)}) for i in (2, 4)},
    7: (2, {16: (2, 1), 8: (1, 1)}),
    **{i: (1, {16: (1, 1), 8: (1, 2)}) for i in range(8, 14)},
    14: (2, {16: (1, 1), 8: (1, 2)}),
    **{i: (1, {16: (1, 2), 8: (1, 4)}) for i in (15, 16, 17)},
}
# Of Xception: {output stride: (strides of block2, block3, block20; dilation of middle and block20, of the last three)}.
XCEPTION = {
    "bubbliiiing": {16: ((2, 2, 1), 1, 1), 8: ((2, 1, 1), 2, 2)},
    "google": {16: ((2, 2, 1), 1, 2), 8: ((2, 1, 1), 2, 4)},
}
# Of ResNet: {style: {output stride: (stride, dilation of the first block, of the others) of the four layers}}.
RESNET = {
    "torchvision": {16: ((1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 1, 2)), 8: ((1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4))},
    "msra": {16: ((1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 2, 2)), 8: ((1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 4, 4))},
}
RATES = {16: (6, 12, 18), 8: (12, 24, 36)}


class Plain:
    """The layers of one net."""

    momentum = 0.1  # outside Xception

    def __init__(self, state: Mapping[str, Tensor], output_stride: int, training: bool):
        self.state, self.output_stride, self.training = state, output_stride, training

    def conv(self, y, key, stride=1, dilation=1, groups=1):
        weight = self.state[f"{key}.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        return F.conv2d(y, weight, self.state.get(f"{key}.bias"), stride, padding, dilation, groups)

    def norm(self, y, key, momentum=None, eps=1e-5):
        mean, var, weight, bias = (self.state[f"{key}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, mean, var, weight, bias, self.training, momentum or self.momentum, eps)

    def conv_norm_relu(self, y, conv, norm, stride=1, dilation=1):
        return F.relu(self.norm(self.conv(y, conv, stride, dilation), norm))

    def dropout(self, y, p):
        return F.dropout(y, p, self.training)

    def count(self, prefix: str) -> int:
        """Blocks named ``prefix`` and a number."""
        return len({key.split(".")[prefix.count(".")] for key in self.state if key.startswith(prefix)})

    def mobilenet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """-> features at stride 4, the deepest."""
        y = F.relu6(self.norm(self.conv(x, "backbone.features.0.0", stride=2), "backbone.features.0.1"))
        for i, (nominal_stride, forms) in sorted(BLOCKS.items()):
            stride, dilation = forms[self.output_stride]
            name, skip = f"backbone.features.{i}.conv", y
            depthwise = 0
            if i > 1:
                y = F.relu6(self.norm(self.conv(y, f"{name}.0"), f"{name}.1"))
                depthwise = 3
            y = self.conv(y, f"{name}.{depthwise}", stride, dilation, groups=y.shape[1])
            y = F.relu6(self.norm(y, f"{name}.{depthwise + 1}"))
            y = self.norm(self.conv(y, f"{name}.{depthwise + 3}"), f"{name}.{depthwise + 4}")
            if nominal_stride == 1 and y.shape[1] == skip.shape[1]:
                y = y + skip
            if i == 3:
                low = y
        return low, y

    def xception(self, x: Tensor, preset: str) -> tuple[Tensor, Tensor]:
        """-> features at stride 4, the deepest."""
        strides, dilation, last = XCEPTION[preset][self.output_stride]
        norm = lambda y, key: self.norm(y, key, momentum=3e-4, eps=1e-5 if preset == "bubbliiiing" else 1e-3)

        def separable(y, key, stride, dilation, relu_first):
            y = F.relu(y) if relu_first else y
            y = norm(self.conv(y, f"{key}.depthwise", stride, dilation, groups=y.shape[1]), f"{key}.bn1")
            y = norm(self.conv(y if relu_first else F.relu(y), f"{key}.pointwise"), f"{key}.bn2")
            return y if relu_first else F.relu(y)

        def block(y, key, stride, dilation):
            if f"{key}.skip.weight" in self.state:
                skip = norm(self.conv(y, f"{key}.skip", stride), f"{key}.skipbn")
            else:
                skip = F.relu(y) if preset == "bubbliiiing" else y
            for i in (1, 2):
                y = separable(y, f"{key}.sepconv{i}", 1, dilation, True)
            return separable(y, f"{key}.sepconv3", stride, dilation, True) + skip, y

        y = F.relu(norm(self.conv(x, "backbone.conv1", 2), "backbone.bn1"))
        y = F.relu(norm(self.conv(y, "backbone.conv2"), "backbone.bn2"))
        y, _ = block(y, "backbone.block1", 2, 1)
        y, low = block(y, "backbone.block2", strides[0], 1)
        y, _ = block(y, "backbone.block3", strides[1], 1)
        for i in range(4, 4 + self.count("backbone.block") - 4):
            y, _ = block(y, f"backbone.block{i}", 1, dilation)
        y, _ = block(y, "backbone.block20", strides[2], dilation)
        for i in (3, 4, 5):
            y = separable(y, f"backbone.conv{i}", 1, last, False)
        return low, y

    def resnet(self, x: Tensor, style: str = "torchvision") -> list[Tensor]:
        """-> the outputs of the four layers."""
        y = self.conv_norm_relu(x, "backbone.conv1", "backbone.bn1", 2)
        y = F.max_pool2d(y, 3, 2, 1, ceil_mode=style == "msra")
        out = []
        for i, (stride, first, rest) in enumerate(RESNET[style][self.output_stride], 1):
            for j in range(self.count(f"backbone.layer{i}.")):
                name, s, d = f"backbone.layer{i}.{j}", 1 if j else stride, rest if j else first
                skip = y
                if f"{name}.downsample.0.weight" in self.state:
                    skip = self.norm(self.conv(y, f"{name}.downsample.0", s), f"{name}.downsample.1")
                if f"{name}.conv3.weight" in self.state:
                    places = (s, 1, 1) if style == "msra" else (1, s, 1)
                    y = self.conv_norm_relu(y, f"{name}.conv1", f"{name}.bn1", places[0])
                    y = self.conv_norm_relu(y, f"{name}.conv2", f"{name}.bn2", places[1], d)
                    y = self.norm(self.conv(y, f"{name}.conv3"), f"{name}.bn3")
                else:
                    y = self.conv_norm_relu(y, f"{name}.conv1", f"{name}.bn1", s, d)
                    y = self.norm(self.conv(y, f"{name}.conv2", dilation=d), f"{name}.bn2")
                y = F.relu(y + skip)
            out.append(y)
        return out


def resize(y: Tensor, size: tuple[int, int], align_corners: bool = True) -> Tensor:
    return F.interpolate(y, size=size, mode="bilinear", align_corners=align_corners)


def plain_v3plus(net: Plain, x: Tensor, backbone: str = "mobilenet_v2", preset: str = "bubbliiiing") -> Tensor:
    """DeepLabV3+: logits of full size."""
    net.momentum = 3e-4 if preset == "google" else 0.1
    if backbone.startswith("resnet"):
        low, *_, y = net.resnet(x)
    else:
        low, y = net.mobilenet(x) if backbone == "mobilenet_v2" else net.xception(x, preset)
    rates = RATES[net.output_stride]
    both = zip((2, 3, 4), rates, strict=True)
    if preset == "google":

        def separable(y, key, dilation=1):
            y = F.relu(net.norm(net.conv(y, f"{key}.depthwise", 1, dilation, y.shape[1]), f"{key}.mid_norm"))
            return F.relu(net.norm(net.conv(y, f"{key}.pointwise"), f"{key}.post_norm"))

        pooled = net.conv_norm_relu(y.mean((2, 3), keepdim=True), "aspp.convs.4.1", "aspp.convs.4.2")
        branches = [resize(pooled, y.shape[-2:]), net.conv_norm_relu(y, "aspp.convs.0.0", "aspp.convs.0.1")]
        branches += [separable(y, f"aspp.convs.{i - 1}", rate) for i, rate in both]
        y = net.dropout(net.conv_norm_relu(torch.cat(branches, 1), "aspp.project.0", "aspp.project.1"), 0.1)
    else:
        branches = [net.conv_norm_relu(y, "aspp.branch1.0", "aspp.branch1.1")]
        branches += [net.conv_norm_relu(y, f"aspp.branch{i}.0", f"aspp.branch{i}.1", dilation=rate) for i, rate in both]
        pooled = net.conv_norm_relu(y.mean(2, True).mean(3, True), "aspp.branch5_conv", "aspp.branch5_bn")
        branches.append(resize(pooled, y.shape[-2:]))
        y = net.conv_norm_relu(torch.cat(branches, 1), "aspp.conv_cat.0", "aspp.conv_cat.1")
    low = net.conv_norm_relu(low, "shortcut_conv.0", "shortcut_conv.1")
    y = torch.cat([resize(y, low.shape[-2:]), low], 1)
    if preset == "google":
        y = separable(separable(y, "cat_conv.0"), "cat_conv.1")
    else:
        y = net.dropout(net.conv_norm_relu(y, "cat_conv.0", "cat_conv.1"), 0.5)
        y = net.dropout(net.conv_norm_relu(y, "cat_conv.4", "cat_conv.5"), 0.1)
    return resize(net.conv(y, "cls_conv"), x.shape[-2:])


def plain_v3(net: Plain, x: Tensor) -> list[Tensor]:
    """DeepLabV3: logits of full size; in training those of the auxiliary head too."""
    *_, middle, y = net.resnet(x)
    pooled = net.conv_norm_relu(y.mean((2, 3), keepdim=True), "classifier.0.convs.4.1", "classifier.0.convs.4.2")
    rates = (1, *RATES[net.output_stride])
    keys = [f"classifier.0.convs.{i}" for i in range(4)]
    branches = [net.conv_norm_relu(y, f"{k}.0", f"{k}.1", dilation=r) for k, r in zip(keys, rates, strict=True)]
    branches.append(pooled.expand(-1, -1, *y.shape[-2:]))
    y = net.conv_norm_relu(torch.cat(branches, 1), "classifier.0.project.0", "classifier.0.project.1")
    y = net.conv_norm_relu(net.dropout(y, 0.5), "classifier.1", "classifier.2")
    out = [net.conv(y, "classifier.4")]
    if net.training:
        y = net.dropout(net.conv_norm_relu(middle, "aux_classifier.0", "aux_classifier.1"), 0.1)
        out.append(net.conv(y, "aux_classifier.4"))
    return [resize(y, x.shape[-2:], False) for y in out]


def plain_v2(net: Plain, x: Tensor, scales: tuple[float, ...]) -> list[Tensor]:
    """DeepLabV2: the largest logits at full size; in training those of each scale too."""

    def run(image):
        deep = net.resnet(image, "msra")[-1]
        return sum(net.conv(deep, f"aspp.convs.{i}", 1, rate) for i, rate in enumerate((6, 12, 18, 24)))

    each = [run(x)]
    for s in scales:
        small = F.interpolate(x, scale_factor=s, mode="bilinear", align_corners=False)
        each.append(resize(run(small), each[0].shape[-2:], False))
    out = [torch.stack(each).amax(0), *(each if net.training else [])]
    return [resize(y, x.shape[-2:], False) for y in out]
