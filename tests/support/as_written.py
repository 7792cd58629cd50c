"""The models as their modules are written: the children called one after another, joined by torch's own functions."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg import nn as fnn
from fastseg.nn.fuse.sequential import Sequential

CONTAINERS = (nn.Sequential, Sequential)


def call(module: nn.Module, x: Tensor) -> Tensor:
    """A module, or a container's children."""
    if type(module) not in CONTAINERS:
        return module(x)
    for child in module:
        x = call(child, x)
    return x


def resize(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def resnet(net: nn.Module, x: Tensor) -> list[Tensor]:
    """-> the maps before the first layer's pool, and after each layer."""
    features = [net.relu(net.bn1(net.conv1(x)))]
    y = net.maxpool(features[0])
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in layer:
            y = residual_block(block, y)
        features.append(y)
    return features


def residual_block(block: nn.Module, x: Tensor) -> Tensor:
    skip = x if block.downsample is None else call(block.downsample, x)
    y = block.relu(block.bn1(block.conv1(x)))
    if not hasattr(block, "conv3"):
        return block.relu(block.bn2(block.conv2(y)) + skip)
    y = block.relu(block.bn2(block.conv2(y)))
    return block.relu(block.bn3(block.conv3(y)) + skip)


def mobilenet(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """-> the maps of stride 4 and the deepest."""
    stem, *blocks = net.features
    maps = [call(stem, x)]
    for block in blocks:
        y = call(block.conv, maps[-1])
        maps.append(maps[-1] + y if block.residual else y)
    return maps[3], maps[-1]


def xception(net: nn.Module, x: Tensor, leaks: bool) -> tuple[Tensor, Tensor]:
    """-> the maps of stride 4 and the deepest."""

    def separable(part: nn.Module, y: Tensor, act_first: bool = True) -> Tensor:
        y = part.bn1(part.depthwise(F.relu(y) if act_first else y))
        y = part.bn2(part.pointwise(y if act_first else F.relu(y)))
        return y if act_first else F.relu(y)

    def block(part: nn.Module, y: Tensor) -> tuple[Tensor, Tensor]:
        skip = F.relu(y) if leaks else y
        skip = skip if part.skip is None else part.skipbn(part.skip(y))
        inner = separable(part.sepconv2, separable(part.sepconv1, y))
        return separable(part.sepconv3, inner) + skip, inner

    y = net.relu(net.bn1(net.conv1(x)))
    y, _ = block(net.block1, net.relu(net.bn2(net.conv2(y))))
    y, low = block(net.block2, y)
    for name in ("block3", *net.middle, "block20"):
        y, _ = block(getattr(net, name), y)
    for part in (net.conv3, net.conv4, net.conv5):
        y = separable(part, y, act_first=False)
    return low, y


def separable_block(part: nn.Module, y: Tensor) -> Tensor:
    y = F.relu(part.mid_norm(part.depthwise(y)))
    return F.relu(part.post_norm(part.pointwise(y)))


def aspp(head: nn.Module, x: Tensor) -> Tensor:
    if head.fusion == "sum":
        return call(head.project, sum(conv(x) for conv in head.convs))
    one = lambda branch: separable_block(branch, x) if isinstance(branch, fnn.SeparableConv2d) else call(branch, x)
    *maps, pooled = map(one, head.convs)
    pooled = pooled.expand(-1, -1, *x.shape[2:])
    return call(head.project, torch.cat([pooled, *maps] if head.pool_first else [*maps, pooled], 1))


def deeplabv2(net: nn.Module, x: Tensor) -> list[Tensor]:
    run = lambda image: aspp(net.aspp, resnet(net.backbone, image)[-1])
    each = [run(x)]
    for s in net.scales:
        small = F.interpolate(x, scale_factor=s, mode="bilinear", align_corners=False)
        each.append(resize(run(small), each[0].shape[2:], False))
    out = [torch.stack(each).amax(0), *(each if net.training else [])]
    return [resize(y, x.shape[2:], False) for y in out]


def deeplabv3(net: nn.Module, x: Tensor) -> list[Tensor]:
    *_, middle, deep = resnet(net.backbone, x)
    first, *rest = net.classifier
    out = [call(nn.Sequential(*rest), aspp(first, deep))]
    if net.training:
        out.append(call(net.aux_classifier, middle))
    return [resize(y, x.shape[2:], False) for y in out]


def deeplabv3plus(net: nn.Module, x: Tensor) -> list[Tensor]:
    if hasattr(net.backbone, "features"):
        low, deep = mobilenet(net.backbone, x)
    elif hasattr(net.backbone, "layer1"):
        _, low, *_, deep = resnet(net.backbone, x)
    else:
        low, deep = xception(net.backbone, x, leaks=not hasattr(net.aspp, "convs"))
    if hasattr(net.aspp, "convs"):
        y = aspp(net.aspp, deep)
    else:
        head = net.aspp
        maps = [call(branch, deep) for branch in (head.branch1, head.branch2, head.branch3, head.branch4)]
        pooled = head.branch5_relu(head.branch5_bn(head.branch5_conv(deep.mean((2, 3), keepdim=True))))
        y = call(head.conv_cat, torch.cat([*maps, pooled.expand(-1, -1, *deep.shape[2:])], 1))
    low = call(net.shortcut_conv, low)
    y = torch.cat([resize(y, low.shape[2:], True), low], 1)
    for part in net.cat_conv:
        y = separable_block(part, y) if isinstance(part, fnn.SeparableConv2d) else call(part, y)
    return [resize(net.cls_conv(y), x.shape[2:], True)]


def fcn(net: nn.Module, x: Tensor) -> list[Tensor]:
    height, width = x.shape[2:]
    if hasattr(net, "fc6"):
        y, pools = x, []
        for i, n in enumerate((2, 2, 3, 3, 3), 1):
            for k in range(n):
                y = F.relu(getattr(net, f"conv{i}_{k + 1}")(y))
            y = F.max_pool2d(y, 2, ceil_mode=True)
            pools.append(y)
        y = net.dropout(F.relu(net.fc7(net.dropout(F.relu(net.fc6(y))))))
        y = net.upscore2(net.score_fr(y))
        y = y + net.score_pool4(pools[3])[..., 5 : 5 + y.shape[2], 5 : 5 + y.shape[3]]
        y = net.upscore_pool4(y)
        y = y + net.score_pool3(pools[2])[..., 9 : 9 + y.shape[2], 9 : 9 + y.shape[3]]
        return [net.upscore8(y)[..., :height, :width]]
    if hasattr(net, "classifier"):
        *_, middle, deep = resnet(net.backbone, x)
        heads = [(net.classifier, deep)] + ([(net.aux_classifier, middle)] if net.training else [])
        return [resize(call(head, y), x.shape[2:], False) for head, y in heads]
    _, *features = resnet(net.backbone, x)
    deepest = y = call(net.score32, features[-1])
    for stride, feature in ((16, features[2]), (8, features[1]), (4, features[0])):
        skip = call(getattr(net, f"score{stride}"), feature)
        y = net.up_score2(y)[..., : skip.shape[2], : skip.shape[3]] + skip
    out = [net.up_score4(y)] + ([net.up_score32(deepest)] if net.training else [])
    return [y[..., :height, :width] for y in out]


def vgg16_pooled(net: nn.Module, x: Tensor) -> tuple[Tensor, list]:
    """-> the deepest map, and each pool's indices with the size before it; no indices where none are kept."""
    pooled, pools = [], (6, 13, 23, 33, 43)
    for i, layer in enumerate(net.encoder.features):
        if i in pools:
            pooled.append((net.pool(x)[1] if getattr(net, "up", "unpool") == "unpool" else None, x.shape[2:]))
        x = layer(x)
    return x, pooled


def risen(net: nn.Module, stage: int, x: Tensor, indices: Tensor | None, size: tuple[int, int]) -> Tensor:
    if indices is not None:
        return net.unpool(x, indices, size)
    if net.up == "bilinear":
        return net.rise[stage](x, size)
    return net.rise[stage].deconv(x)[..., : size[0], : size[1]]


def segnet(net: nn.Module, x: Tensor) -> list[Tensor]:
    x, pooled = vgg16_pooled(net, x)
    for i, (stage, (indices, size)) in enumerate(zip(net.decoder, reversed(pooled), strict=True)):
        x = call(stage, risen(net, i, x, indices, size))
    return [net.classifier(x)]


def deconvnet(net: nn.Module, x: Tensor) -> list[Tensor]:
    x, pooled = vgg16_pooled(net, x)
    height, width = x.shape[2:]
    x = F.pad(x, (0, max(0, net.bottleneck - width), 0, max(0, net.bottleneck - height)))
    x = F.relu(net.bnfc7(net.fc7(F.relu(net.bnfc6(net.fc6(x))))))
    x = F.relu(net.fc6_deconv_bn(net.fc6_deconv(x)))[..., :height, :width]
    for i, count in zip((5, 4, 3, 2, 1), (3, 3, 3, 2, 2), strict=True):
        x = net.unpool(x, *pooled.pop())
        for k in range(1, count + 1):
            x = F.relu(getattr(net, f"debn{i}_{k}")(getattr(net, f"deconv{i}_{k}")(x)))
    return [net.seg_score_voc(x)]


def segnet_basic(net: nn.Module, x: Tensor) -> list[Tensor]:
    x, pooled = net.norm(x), []
    for stage in net.encoder:
        x = F.relu(call(stage, x))
        size = x.shape[2:]
        x, indices = net.pool(x) if net.up == "unpool" else (net.pool(x), None)
        pooled.append((indices, size))
    for i, (stage, (indices, size)) in enumerate(zip(net.decoder, reversed(pooled), strict=True)):
        x = call(stage, risen(net, i, x, indices, size))
    return [net.classifier(x)]


def padded(y: Tensor, skip: Tensor) -> Tensor:
    rows, columns = skip.shape[2] - y.shape[2], skip.shape[3] - y.shape[3]
    return F.pad(y, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def unet(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The padded form."""
    maps = [call(net.inc.double_conv, x)]
    for i in range(1, net.depth + 1):
        pool, double = getattr(net, f"down{i}").maxpool_conv
        maps.append(call(double.double_conv, pool(maps[-1])))
    y = net.dropout(maps.pop())
    for i in range(1, net.depth + 1):
        part, skip = getattr(net, f"up{i}"), maps.pop()
        y = call(part.conv.double_conv, torch.cat([skip, padded(part.up(y), skip)], 1))
    return [net.outc.conv(y)]


def unetplusplus(net: nn.Module, x: Tensor) -> list[Tensor]:
    def node(name: str, y: Tensor) -> Tensor:
        part = getattr(net, name)
        norm1, norm2 = part.bn1 or nn.Identity(), part.bn2 or nn.Identity()
        y = part.dropout(part.relu(norm1(part.conv1(y))))
        return part.dropout(part.relu(norm2(part.conv2(y))))

    maps = {(0, 0): node("conv0_0", x)}
    for i in range(1, net.levels + 1):
        maps[i, 0] = node(f"conv{i}_0", net.pool(maps[i - 1, 0]))
    for j in range(1, net.levels + 1):
        for i in range(net.levels + 1 - j):
            skips = [maps[i, k] for k in range(j)]
            up = padded(getattr(net, f"up{i}_{j}")(maps[i + 1, j - 1]), skips[0])
            maps[i, j] = node(f"conv{i}_{j}", torch.cat([up, *skips] if net.up_first else [*skips, up], 1))
    return [net.final(maps[0, net.levels])]


def mix_transformer(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Tokens as a sequence, attention as a softmax of products."""
    features = []
    for embed, blocks, norm in zip(net.patch_embeddings, net.block, net.layer_norm, strict=True):
        x = embed.proj(x)
        height, width = x.shape[2:]
        as_map = lambda t, height=height, width=width: t.transpose(1, 2).unflatten(2, (height, width))
        t = embed.layer_norm(x.flatten(2).transpose(1, 2))
        for block in blocks:
            own, y = block.attention["self"], block.layer_norm_1(t)
            source = y
            if own.sr is not None:
                source = own.layer_norm(own.sr(as_map(y)).flatten(2).transpose(1, 2))
            q, k, v = (
                layer(z).unflatten(2, (own.heads, -1)).transpose(1, 2)
                for layer, z in ((own.query, y), (own.key, source), (own.value, source))
            )
            weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
            t = t + block.attention["output"]["dense"]((weights @ v).transpose(1, 2).flatten(2))
            y = block.mlp.dense1(block.layer_norm_2(t))
            y = block.mlp.dwconv["dwconv"](as_map(y)).flatten(2).transpose(1, 2)
            t = t + block.mlp.dense2(block.mlp.intermediate_act_fn(y))
        x = as_map(norm(t))
        features.append(x)
    return features


def segformer(net: nn.Module, x: Tensor) -> list[Tensor]:
    features, head = mix_transformer(net.segformer["encoder"], x), net.decode_head
    maps = []
    for feature, projection in zip(features, head.linear_c, strict=True):
        y = projection["proj"](feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        maps.append(resize(y, features[0].shape[2:], False))
    y = head.activation(head.batch_norm(head.linear_fuse(torch.cat(maps[::-1], 1))))
    return [resize(head.classifier(head.dropout(y)), x.shape[2:], False)]


def upernet(net: nn.Module, x: Tensor) -> list[Tensor]:
    block = lambda part, y: part.activation(part.batch_norm(part.conv(y)))
    _, *features = resnet(net.backbone, x)
    head, deep = net.decode_head, features[-1]
    pooled = [resize(block(conv, pool(deep)), deep.shape[2:], False) for pool, conv in head.psp_modules]
    levels = [block(conv, y) for conv, y in zip(head.lateral_convs, features[:3], strict=True)]
    levels.append(block(head.bottleneck, torch.cat([deep, *pooled], 1)))
    for i in (2, 1, 0):
        levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[2:], False)
    maps = [block(conv, y) for conv, y in zip(head.fpn_convs, levels[:3], strict=True)] + [levels[3]]
    y = block(head.fpn_bottleneck, torch.cat([resize(y, maps[0].shape[2:], False) for y in maps], 1))
    out = [head.classifier(y)]
    if net.training:
        aux = net.auxiliary_head
        out.append(aux.classifier(block(aux.convs[0], features[2])))
    return [resize(y, x.shape[2:], False) for y in out]


def deep_supervision(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Of a padded U-Net, supervised where no container is called."""
    if not net.training:
        return unet(net.model, x)
    maps = {}
    hooks = [
        net.model.get_submodule(path).register_forward_hook(lambda m, i, y, path=path: maps.update({path: y}))
        for path in net.at
    ]
    y = unet(net.model, x)
    for hook in hooks:
        hook.remove()
    return [*(resize(h(maps[path]), x.shape[2:], False) for path, h in zip(net.at, net.heads, strict=True)), *y]


def as_written(name: str, net: nn.Module, x: Tensor) -> list[Tensor]:
    """What ``net(x)`` gives, as a list; ``name`` is the model's."""
    return globals()[name](net, x)
