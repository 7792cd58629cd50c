"""Rules for Hugging Face transformers: the heads of SegFormer and UPerNet."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastseg.converting.rule import Rule
from fastseg.converting.rules.smp import parts, taking
from fastseg.nn.fuse.conv_norm_act import run_conv_norm_act
from fastseg.nn.fuse.resize import not_same_size, run_linear_fuse, run_resize_concat_conv
from fastseg.nn.fuse.watch import watched

LIBRARY = "transformers"


# --- SegFormer


def _projections(module: nn.Module) -> nn.ModuleList | None:
    """``linear_projections``; ``linear_c`` before transformers 5."""
    found = getattr(module, "linear_projections", None) or getattr(module, "linear_c", None)
    return found if isinstance(found, nn.ModuleList) else None


def _segformer_refuses(module: nn.Module) -> str:
    found = parts(module, "linear_fuse", "batch_norm", "activation", "dropout", "classifier")
    if isinstance(found, str):
        return found
    projections = _projections(module)
    if projections is None:
        return "it has no linear projections"
    for projection in projections:
        why = watched(projection, type(projection)) or watched(getattr(projection, "proj", projection), nn.Linear)
        if why:
            return why
    return not_same_size(found[0], (1,))


def _segformer(module: nn.Module, original: Callable, encoder_hidden_states: Sequence[Tensor], **kwargs) -> Tensor:
    projections = _projections(module)
    if len(encoder_hidden_states) < len(projections) or any(state.dim() != 4 for state in encoder_hidden_states):
        return original(encoder_hidden_states, **kwargs)
    maps = list(encoder_hidden_states[: len(projections)])[::-1]
    linears = [projection.proj for projection in projections][::-1]
    size = encoder_hidden_states[0].shape[2:]
    y = run_linear_fuse(maps, linears, size, module.linear_fuse, module.batch_norm, module.activation)
    return module.classifier(module.dropout(y))


# --- UPerNet


def _module_refuses(module: nn.Module | None) -> str:
    if not isinstance(module, nn.Module):
        return "a block is missing"
    found = parts(module, "conv", "batch_norm", "activation")
    return found if isinstance(found, str) else watched(found[0], nn.Conv2d)


def _module(module: nn.Module, original: Callable, input: Tensor) -> Tensor:
    return run_conv_norm_act(input, module.conv, module.batch_norm, module.activation)


def _fused_refuses(block: nn.Module | None) -> str:
    why = _module_refuses(block)
    return why or watched(block, type(block)) or not_same_size(block.conv, (3,))


def _fused(maps: Sequence[Tensor], block: nn.Module, size, align_corners: bool) -> Tensor:
    return run_resize_concat_conv(
        maps, size, block.conv, block.batch_norm, block.activation, align_corners=align_corners
    )


def _upernet_refuses(module: nn.Module) -> str:
    found = parts(module, "psp_modules", "bottleneck", "lateral_convs", "fpn_convs", "fpn_bottleneck", "classifier")
    if isinstance(found, str):
        return found
    pyramid = found[0]
    if not isinstance(getattr(pyramid, "blocks", None), list) or not hasattr(pyramid, "align_corners"):
        return "its pyramid has no blocks"
    return watched(pyramid, type(pyramid)) or _fused_refuses(module.bottleneck) or _fused_refuses(module.fpn_bottleneck)


def _upernet(module: nn.Module, original: Callable, encoder_hidden_states: Sequence[Tensor]) -> Tensor:
    corners, pyramid = module.align_corners, module.psp_modules
    laterals = [conv(encoder_hidden_states[i]) for i, conv in enumerate(module.lateral_convs)]
    deep = encoder_hidden_states[-1]
    levels = [deep, *(block(deep) for block in pyramid.blocks)]
    laterals.append(_fused(levels, module.bottleneck, deep.shape[2:], pyramid.align_corners))
    for i in range(len(laterals) - 1, 0, -1):
        up = nn.functional.interpolate(
            laterals[i], size=laterals[i - 1].shape[2:], mode="bilinear", align_corners=corners
        )
        laterals[i - 1] = laterals[i - 1] + up
    maps = [conv(lateral) for conv, lateral in zip(module.fpn_convs, laterals, strict=False)]
    maps.append(laterals[-1])
    return module.classifier(_fused(maps, module.fpn_bottleneck, maps[0].shape[2:], corners))


RULES = (
    Rule("hf_segformer_head", LIBRARY, ("SegformerDecodeHead",), _segformer_refuses, _segformer,
         taking("linear_projections", "linear_c", "linear_fuse", "batch_norm", "activation"),
         "linear layers and 1x1 as one matrix, before the resize"),
    Rule("hf_upernet_head", LIBRARY, ("UperNetHead",), _upernet_refuses, _upernet,
         taking("bottleneck", "fpn_bottleneck"), "3x3 of the resized levels from nine taps of each small one"),
    Rule("hf_conv_module", LIBRARY, ("UperNetConvModule",), _module_refuses, _module,
         taking("conv", "batch_norm", "activation"), "convolution, norm and activation as one",
         fuses_only=True),
)  # fmt: skip
