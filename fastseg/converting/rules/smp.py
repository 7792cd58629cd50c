"""Rules for segmentation_models_pytorch: decoder blocks that upsample by nearest neighbours, ASPP and its decoders."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from fastseg import ops
from fastseg.converting.rule import Rule
from fastseg.converting.rules.blocks import NOTHING, block_of, is_sequential, nothing_taken
from fastseg.nn.fuse.aspp import run_aspp
from fastseg.nn.fuse.conv_norm_act import run_conv_norm_act
from fastseg.nn.fuse.resize import nearest_pays, not_same_size, run_nearest_concat_conv
from fastseg.nn.fuse.sequential import run_layers
from fastseg.nn.fuse.watch import watched

LIBRARY = "segmentation_models_pytorch"


def parts(module: nn.Module, *names: str) -> list[nn.Module] | str:
    """The submodules of these names, or which of them is missing."""
    found = [getattr(module, name, None) for name in names]
    missing = [name for name, part in zip(names, found, strict=True) if not isinstance(part, nn.Module)]
    return f"it has no {', '.join(missing)}" if missing else found


def run_block(block: nn.Sequential, x: Tensor) -> Tensor:
    """A block of convolution, norm and activation that ``block_of`` knows."""
    conv, norm, act, _ = block_of(block)
    return run_conv_norm_act(x, conv, norm, act)


# --- Unet, Unet++, MAnet: nearest neighbours, concatenation, 3x3


def _nearest_refuses(module: nn.Module) -> str:
    found = parts(module, "conv1", "conv2")
    if isinstance(found, str):
        return NOTHING  # Linknet's block of the same name
    blocks = [block_of(block) for block in found]
    why = next((block for block in blocks if isinstance(block, str)), "") or not_same_size(blocks[0].conv, (3,))
    if getattr(module, "interpolation_mode", "") != "nearest":
        why = why or f"its interpolation is {getattr(module, 'interpolation_mode', 'unknown')}, not nearest"
    attention = getattr(getattr(module, "attention1", None), "attention", None)
    if attention is not None and not isinstance(attention, nn.Identity):
        why = why or f"{type(attention).__name__} stands between the concatenation and the convolution"
    return why


def _convs(module: nn.Module) -> list[nn.Module]:
    return [module.conv1, module.conv2]


def _after(module: nn.Module, x: Tensor, skip: Tensor | None, size) -> Tensor:
    conv, norm, act, _ = block_of(module.conv1)
    y = run_nearest_concat_conv(x, skip, size, conv, norm, act)
    return run_block(module.conv2, y)


def _unet_block(
    module: nn.Module, original: Callable, feature_map: Tensor, target_height, target_width, skip_connection=None
) -> Tensor:
    if not nearest_pays(feature_map, module.conv1[0]):
        return original(feature_map, target_height, target_width, skip_connection)
    y = _after(module, feature_map, skip_connection, (target_height, target_width))
    return module.attention2(y)


def _doubling_block(module: nn.Module, original: Callable, x: Tensor, skip: Tensor | None = None) -> Tensor:
    if getattr(module, "is_empty", False) or not nearest_pays(x, module.conv1[0]):
        return original(x, skip)
    y = _after(module, x, skip, (2 * x.shape[2], 2 * x.shape[3]))
    attention = getattr(module, "attention2", None)
    return y if attention is None else attention(y)


def _doubling_refuses(module: nn.Module) -> str:
    return "" if getattr(module, "is_empty", False) else _nearest_refuses(module)


def _doubling_takes(module: nn.Module) -> list[nn.Module]:
    return [] if getattr(module, "is_empty", False) else _convs(module)


def _gated_refuses(module: nn.Module) -> str:
    found = parts(module, "hl_conv", "SE_ll", "SE_hl")
    if isinstance(found, str):
        return found
    gate = found[2]
    pools = is_sequential(gate) and not watched(gate, type(gate)) and len(gate) > 0
    pools = pools and not watched(gate[0], nn.AdaptiveAvgPool2d) and gate[0].output_size in (1, (1, 1))
    return _nearest_refuses(module) if pools else "its gate does not begin with an average over the map"


def _gated_block(module: nn.Module, original: Callable, x: Tensor, skip: Tensor | None = None) -> Tensor:
    """The gate scales channels by the mean of the doubled map, which is that of the small one: both before doubling."""
    if not nearest_pays(x, module.conv1[0]):
        return original(x, skip)
    x = module.hl_conv(x)
    if skip is not None:
        x = x * (module.SE_hl(x) + module.SE_ll(skip))
    return _after(module, x, skip, (2 * x.shape[2], 2 * x.shape[3]))


# --- DeepLab


def aspp_refuses(module: nn.Module) -> str:
    """Of an ASPP with branches ``convs``, the last of which pools, and ``project``; torchvision's is the same."""
    convs, project = getattr(module, "convs", None), getattr(module, "project", None)
    if not isinstance(convs, nn.ModuleList) or len(convs) < 2 or not is_sequential(project):
        return "it is not built of convs and project"
    pool = convs[-1]
    inside = isinstance(pool, nn.Sequential) and len(pool) > 1 and not watched(pool, type(pool))
    if not inside or watched(pool[0], nn.AdaptiveAvgPool2d) or pool[0].output_size not in (1, (1, 1)):
        return "its last branch is not an average over the map, or has hooks"
    return ""


def aspp_takes(module: nn.Module) -> list[nn.Module]:
    dense = [branch for branch in list(module.convs)[:-1] if not isinstance(block_of(branch), str)]
    return [*dense, module.convs[-1], module.project]


def aspp(module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    pool = module.convs[-1]
    return run_aspp(x, list(module.convs)[:-1], lambda x: run_layers(x, list(pool)), module.project)


def _v3_refuses(module: nn.Module) -> str:
    found = parts(module, "aspp", "conv", "bn", "relu")
    return found if isinstance(found, str) else watched(found[1], nn.Conv2d)


def _v3(module: nn.Module, original: Callable, features: Sequence[Tensor]) -> Tensor:
    return run_conv_norm_act(module.aspp(features[-1]), module.conv, module.bn, module.relu)


def _v3plus_refuses(module: nn.Module) -> str:
    found = parts(module, "aspp", "up", "block1", "block2")
    if isinstance(found, str):
        return found
    up = found[1]
    if watched(up, nn.Upsample) or up.mode != "bilinear" or not up.align_corners or up.size is not None:
        return "its upsampling is not bilinear with aligned corners, or has hooks"
    return "" if isinstance(up.scale_factor, (int, float)) else "its upsampling has two factors"


def _v3plus(module: nn.Module, original: Callable, features: Sequence[Tensor]) -> Tensor:
    deep, low = module.aspp(features[-1]), module.block1(features[2])
    size = [int(n * module.up.scale_factor) for n in deep.shape[2:]]
    if size != list(low.shape[2:]):
        return original(features)
    return module.block2(ops.upsample_concat(deep, [low], align_corners=True, up_first=True))


# --- blocks of convolution, norm and activation that are no Sequential


def _conv_bn_refuses(module: nn.Module) -> str:
    found = parts(module, "conv", "bn", "activation")
    return found if isinstance(found, str) else watched(found[0], nn.Conv2d)


def _conv_bn(module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    y = run_conv_norm_act(x, module.conv, module.bn, module.activation if module.add_relu else None)
    if module.interpolate:
        y = F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=True)
    return y


def _residual_refuses(module: nn.Module) -> str:
    found = parts(module, "conv_1", "batch_norm_1", "conv_2", "batch_norm_2", "activation")
    return found if isinstance(found, str) else watched(found[0], nn.Conv2d) or watched(found[2], nn.Conv2d)


def _residual(module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    y = run_conv_norm_act(module.activation(x), module.conv_1, module.batch_norm_1, module.activation)
    return run_conv_norm_act(y, module.conv_2, module.batch_norm_2, None, x)


def taking(*names: str) -> Callable[[nn.Module], list[nn.Module]]:
    """Take the submodules of these names."""
    return lambda module: [getattr(module, name) for name in names if getattr(module, name, None) is not None]


NEAREST = "nearest x2 and 3x3 as one transposed convolution"
CONV = "convolution, norm and activation as one"
RULES = (
    Rule("smp_unet_block", LIBRARY, ("UnetDecoderBlock",), _nearest_refuses, _unet_block, _convs, NEAREST),
    Rule("smp_doubling_block", LIBRARY, ("DecoderBlock",), _doubling_refuses, _doubling_block, _doubling_takes,
         NEAREST),
    Rule("smp_gated_block", LIBRARY, ("MFABBlock",), _gated_refuses, _gated_block, _convs,
         "gate before doubling; nearest x2 and 3x3 as one transposed convolution"),
    Rule("smp_aspp", LIBRARY, ("ASPP",), aspp_refuses, aspp, aspp_takes, "ASPP without concatenation"),
    Rule("smp_deeplabv3_decoder", LIBRARY, ("DeepLabV3Decoder",), _v3_refuses, _v3, taking("conv", "bn", "relu"), CONV,
         fuses_only=True),
    Rule("smp_deeplabv3plus_decoder", LIBRARY, ("DeepLabV3PlusDecoder",), _v3plus_refuses, _v3plus, nothing_taken,
         "upsampled beside the skip, written once"),
    Rule("smp_conv_bn", LIBRARY, ("ConvBnRelu",), _conv_bn_refuses, _conv_bn, taking("conv", "bn", "activation"), CONV,
         fuses_only=True),
    Rule("smp_residual", LIBRARY, ("ResidualConvBlock",), _residual_refuses, _residual,
         taking("conv_1", "batch_norm_1", "conv_2", "batch_norm_2", "activation"), CONV,
         fuses_only=True),
)  # fmt: skip
