"""Rules for nets that people copy: milesial's U-Net; bubbliiiing's U-Net, PSPNet and DeepLabV3+.

Their classes have common names and lie in anybody's modules, so the text of ``forward`` decides, or an example.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.converting.rule import Rule
from fastseg.converting.rules.blocks import block_of, is_sequential
from fastseg.converting.rules.smp import parts, taking
from fastseg.nn.fuse.aspp import run_aspp
from fastseg.nn.fuse.conv_norm_act import run_conv_norm_act
from fastseg.nn.fuse.resize import not_same_size, run_resize_concat_conv
from fastseg.nn.fuse.sequential import opened, run_layers
from fastseg.nn.fuse.upsample_concat import run_upsample_concat, run_upsample_concat_conv
from fastseg.nn.fuse.watch import watched

UPSAMPLES = (nn.Upsample, nn.UpsamplingBilinear2d)


def _doubles(up: nn.Module) -> str:
    """Why ``up`` is not a bilinear doubling with aligned corners, or ""."""
    if type(up) not in UPSAMPLES:
        return "nothing to fuse"
    if why := watched(up, type(up)):
        return why
    plain = up.mode == "bilinear" and up.align_corners and up.size is None and up.scale_factor == 2
    return "" if plain else "its upsampling is not a bilinear doubling with aligned corners"


# --- milesial: up, pad, cat([skip, up]), two convolutions


def _up_refuses(module: nn.Module) -> str:
    found = parts(module, "up", "conv")
    if isinstance(found, str):
        return found
    if why := _doubles(found[0]):
        return why
    layers = opened(getattr(found[1], "double_conv", None)) if not watched(found[1], type(found[1])) else None
    return not_same_size(layers[0], (3,)) if layers else "conv is not a double convolution, or has hooks"


def _up(module: nn.Module, original: Callable, x1: Tensor, x2: Tensor) -> Tensor:
    if [2 * n for n in x1.shape[2:]] != list(x2.shape[2:]):
        return original(x1, x2)
    return run_upsample_concat(x1, x2, module.conv.double_conv, align_corners=True, up_first=False)


# --- bubbliiiing


def _unet_refuses(module: nn.Module) -> str:
    found = parts(module, "conv1", "conv2", "up")
    if isinstance(found, str):
        return found
    return _doubles(found[2]) or not_same_size(found[0], (3,)) or watched(found[1], nn.Conv2d)


def _unet(module: nn.Module, original: Callable, inputs1: Tensor, inputs2: Tensor) -> Tensor:
    if [2 * n for n in inputs2.shape[2:]] != list(inputs1.shape[2:]):
        return original(inputs1, inputs2)
    act = getattr(module, "relu", None)
    y = run_upsample_concat_conv(inputs2, inputs1, module.conv1, None, act, align_corners=True, up_first=False)
    return run_conv_norm_act(y, module.conv2, None, act)


def _pyramid_refuses(module: nn.Module) -> str:
    found = parts(module, "stages", "bottleneck")
    if isinstance(found, str):
        return found
    layers = opened(found[1])
    return not_same_size(layers[0], (3,)) if layers and len(layers) > 2 else "its bottleneck is no Sequential"


def _pyramid(module: nn.Module, original: Callable, features: Tensor) -> Tensor:
    maps = [features, *(stage(features) for stage in module.stages)]
    conv, norm, act, *rest = module.bottleneck
    return run_layers(run_resize_concat_conv(maps, features.shape[2:], conv, norm, act, align_corners=True), rest)


BRANCHES = ("branch1", "branch2", "branch3", "branch4")


def _aspp_refuses(module: nn.Module) -> str:
    found = parts(module, *BRANCHES, "branch5_conv", "branch5_bn", "branch5_relu", "conv_cat")
    if isinstance(found, str):
        return found
    return "" if is_sequential(module.conv_cat) else "conv_cat is no Sequential"


def _aspp(module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    pool = lambda x: run_conv_norm_act(
        x.mean((2, 3), keepdim=True), module.branch5_conv, module.branch5_bn, module.branch5_relu
    )
    return run_aspp(x, [getattr(module, branch) for branch in BRANCHES], pool, module.conv_cat)


def _deeplab_refuses(module: nn.Module) -> str:
    found = parts(module, "backbone", "aspp", "shortcut_conv", "cat_conv", "cls_conv")
    if isinstance(found, str):
        return found
    layers = opened(found[3])
    return not_same_size(layers[0], (3,)) if layers else "cat_conv is no Sequential, or has hooks"


def _deeplab(module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    low, deep = module.backbone(x)
    y = run_upsample_concat(module.aspp(deep), module.shortcut_conv(low), module.cat_conv, align_corners=True)
    return F.interpolate(module.cls_conv(y), size=x.shape[2:], mode="bilinear", align_corners=True)


def _dense_branches(module: nn.Module) -> list[nn.Module]:
    dense = [getattr(module, branch) for branch in BRANCHES]
    dense = [branch for branch in dense if not isinstance(block_of(branch), str)]
    return [*dense, module.branch5_conv, module.branch5_bn, module.branch5_relu, module.conv_cat]


UP = "3x3 of the upsampled map from nine taps of the small one, where that pays"
RULES = (
    Rule("unet_up", "", ("Up",), _up_refuses, _up, taking("conv", "up"), UP),
    Rule("unet_up_bubbliiiing", "", ("unetUp",), _unet_refuses, _unet, taking("conv1", "conv2", "up", "relu"), UP),
    Rule("psp_bubbliiiing", "", ("_PSPModule",), _pyramid_refuses, _pyramid, taking("bottleneck"),
         "3x3 of the resized levels from nine taps of each small one"),
    Rule("aspp_bubbliiiing", "", ("ASPP",), _aspp_refuses, _aspp, _dense_branches, "ASPP without concatenation"),
    Rule("deeplab_bubbliiiing", "", ("DeepLab",), _deeplab_refuses, _deeplab, taking("cat_conv"), UP),
)  # fmt: skip
