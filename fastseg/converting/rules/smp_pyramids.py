"""Rules for segmentation_models_pytorch: decoders that resize bilinearly before a convolution."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.converting.rule import Rule
from fastseg.converting.rules.blocks import NOTHING, block_of, is_sequential
from fastseg.converting.rules.smp import LIBRARY, parts, taking
from fastseg.nn.fuse.norm import run_norm_act
from fastseg.nn.fuse.resize import not_same_size, run_linear_fuse, run_resize_concat_conv, taps_pay
from fastseg.nn.fuse.watch import apply_act, watched


def block_refuses(block: nn.Module | None, sizes: tuple[int, ...]) -> str:
    """Why ``block`` is not a plain convolution of one of these sizes with norm and activation, or ""."""
    found = block_of(block)
    return found if isinstance(found, str) else not_same_size(found.conv, sizes)


def run_fused(maps: Sequence[Tensor], size, block: nn.Sequential, *, align_corners: bool = False) -> Tensor:
    """``block(cat([interpolate(m, size) for m in maps], 1))``, bilinear."""
    conv, norm, act, _ = block_of(block)
    return run_resize_concat_conv(maps, size, conv, norm, act, align_corners=align_corners)


# --- SegFormer


def _segformer_refuses(module: nn.Module) -> str:
    found = parts(module, "mlp_stage", "fuse_stage")
    if isinstance(found, str):
        return found
    stages, fuse = found
    if not isinstance(stages, nn.ModuleList) or any(type(stage).__name__ != "MLP" for stage in stages):
        return "its stages are not MLPs"
    for stage in stages:
        why = watched(stage, type(stage)) or watched(getattr(stage, "linear", stage), nn.Linear)
        if why:
            return why
    return block_refuses(fuse, (1,))


def _segformer(module: nn.Module, original: Callable, features: Sequence[Tensor]) -> Tensor:
    size = [n // 4 for n in features[0].shape[2:]]
    maps = (features[2:] if features[1].size(1) == 0 else features[1:])[::-1][: len(module.mlp_stage)]
    conv, norm, act, _ = block_of(module.fuse_stage)
    return run_linear_fuse(maps, [stage.linear for stage in module.mlp_stage], size, conv, norm, act)


# --- UPerNet


def _pyramid_refuses(module: nn.Module) -> str:
    found = parts(module, "blocks", "out_conv")
    if isinstance(found, str):
        return NOTHING  # PSPNet's module of the same name
    return block_refuses(found[1], (3,))


def _pyramid(module: nn.Module, original: Callable, feature: Tensor) -> Tensor:
    maps = [feature, *(block(feature) for block in module.blocks)]
    return run_fused(maps, feature.shape[2:], module.out_conv)


def _upernet_refuses(module: nn.Module) -> str:
    found = parts(module, "feature_norms", "psp", "fpn_lateral_blocks", "fpn_conv_blocks", "fusion_block")
    return found if isinstance(found, str) else block_refuses(found[-1], (3,))


def _upernet(module: nn.Module, original: Callable, features: list[Tensor]) -> Tensor:
    features = [norm(feature) for norm, feature in zip(module.feature_norms, features[2:], strict=True)]
    maps = [module.psp(features[-1])]
    for block, lateral in zip(module.fpn_lateral_blocks, features[:-1][::-1], strict=True):
        maps.append(block(maps[-1], lateral))
    maps[1:] = [conv(m) for conv, m in zip(module.fpn_conv_blocks, maps[1:], strict=True)]
    return run_fused(maps[::-1], maps[-1].shape[2:], module.fusion_block)


# --- PSPNet


def _psp_refuses(module: nn.Module) -> str:
    found = parts(module, "psp", "conv", "dropout")
    if isinstance(found, str):
        return found
    psp = found[0]
    blocks = getattr(psp, "blocks", None)
    if type(psp).__name__ != "PSPModule" or not isinstance(blocks, nn.ModuleList) or watched(psp, type(psp)):
        return "its pyramid is not a PSPModule, or has hooks"
    for block in blocks:
        if type(block).__name__ != "PSPBlock" or not isinstance(getattr(block, "pool", None), nn.Module):
            return "a level of its pyramid is not a PSPBlock"
        if why := watched(block, type(block)):
            return why
    return block_refuses(found[1], (1, 3))


def _psp_takes(module: nn.Module) -> list[nn.Module]:
    return [module.conv]


def _psp(module: nn.Module, original: Callable, features: Sequence[Tensor]) -> Tensor:
    x = features[-1]
    maps = [*(block.pool(x) for block in module.psp.blocks), x]
    return module.dropout(run_fused(maps, x.shape[2:], module.conv, align_corners=True))


# --- FPN: convolution, group norm, ReLU, x2, and again


def _levels(module: nn.Module) -> list[nn.Module]:
    block = getattr(module, "block", None)
    return list(block) if isinstance(block, nn.Sequential) else []


def _segmentation_refuses(module: nn.Module) -> str:
    levels = _levels(module)
    if len(levels) < 2 or not is_sequential(module.block) or watched(module.block, type(module.block)):
        return "nothing to fuse" if len(levels) == 1 else "it is not a Sequential of blocks"
    for level in levels:
        if type(level).__name__ != "Conv3x3GNReLU" or not isinstance(getattr(level, "upsample", None), bool):
            return "it is not built of Conv3x3GNReLU"
        why = watched(level, type(level)) or block_refuses(getattr(level, "block", None), (3,))
        if why:
            return why
    return ""


def _segmentation(module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    doubled = False
    for level in _levels(module):
        size = (2 * x.shape[2], 2 * x.shape[3])
        conv, norm, act, _ = block_of(level.block)
        if doubled and taps_pay(x, size, conv):
            x = run_resize_concat_conv([x], size, conv, None, None, align_corners=True)
            x = apply_act(act, run_norm_act(x, norm, None))
        else:
            x = level.block(_doubled(x) if doubled else x)
        doubled = level.upsample
    return _doubled(x) if doubled else x


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)


# --- DPT


def _fusion_refuses(module: nn.Module) -> str:
    found = parts(module, "residual_conv_block1", "residual_conv_block2", "project")
    return found if isinstance(found, str) else not_same_size(found[2], (1,))


def _fusion(module: nn.Module, original: Callable, feature: Tensor, previous_feature: Tensor | None = None) -> Tensor:
    feature = module.residual_conv_block1(feature)
    if previous_feature is not None:
        feature = feature + previous_feature
    feature = module.residual_conv_block2(feature)
    size = [2 * n for n in feature.shape[2:]]
    return run_resize_concat_conv([feature], size, module.project, None, None, align_corners=True)


PYRAMID = "3x3 of the resized levels from nine taps of each small one"
RULES = (
    Rule("smp_segformer_decoder", LIBRARY, ("SegformerDecoder",), _segformer_refuses, _segformer,
         taking("mlp_stage", "fuse_stage"), "linear layers and 1x1 as one matrix, before the resize"),
    Rule("smp_pyramid", LIBRARY, ("PSPModule",), _pyramid_refuses, _pyramid, taking("out_conv"), PYRAMID),
    Rule("smp_upernet_decoder", LIBRARY, ("UPerNetDecoder",), _upernet_refuses, _upernet, taking("fusion_block"),
         PYRAMID),
    Rule("smp_psp_decoder", LIBRARY, ("PSPDecoder",), _psp_refuses, _psp, _psp_takes,
         "1x1 before the resize, without concatenation"),
    Rule("smp_segmentation_block", LIBRARY, ("SegmentationBlock",), _segmentation_refuses, _segmentation,
         lambda module: [level.block for level in _levels(module)], "3x3 of a doubled map from nine taps of the small"),
    Rule("smp_fusion_block", LIBRARY, ("FusionBlock",), _fusion_refuses, _fusion, taking("project"),
         "1x1 before the resize"),
)  # fmt: skip
