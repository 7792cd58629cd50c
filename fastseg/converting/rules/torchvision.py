"""Rules for torchvision: ASPP, residual blocks, inverted residuals. Heads are ``Sequential``."""

from collections.abc import Callable

from torch import Tensor, nn

from fastseg.converting.rule import Rule
from fastseg.converting.rules.blocks import NORMS, NOTHING, block_of, is_sequential
from fastseg.converting.rules.smp import aspp, aspp_refuses, aspp_takes, parts, taking
from fastseg.nn.fuse.conv_norm_act import run_conv_norm_act
from fastseg.nn.fuse.inverted_residual import run_inverted_residual
from fastseg.nn.fuse.separable import run_separable
from fastseg.nn.fuse.watch import FUSED_ACTS, watched

LIBRARY = "torchvision"


# --- ResNet


def _refuses(*convs: str) -> Callable[[nn.Module], str]:
    names = [*convs, *(f"bn{conv[4:]}" for conv in convs), "relu"]

    def refuses(module: nn.Module) -> str:
        found = parts(module, *names)
        if isinstance(found, str):
            return found
        return next(filter(None, (watched(getattr(module, conv), nn.Conv2d) for conv in convs)), "")

    return refuses


def _basic(module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    y = run_conv_norm_act(x, module.conv1, module.bn1, module.relu)
    skip = x if module.downsample is None else module.downsample(x)
    return run_conv_norm_act(y, module.conv2, module.bn2, module.relu, skip)


def _bottleneck(module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    y = run_conv_norm_act(x, module.conv1, module.bn1, module.relu)
    y = run_conv_norm_act(y, module.conv2, module.bn2, module.relu)
    skip = x if module.downsample is None else module.downsample(x)
    return run_conv_norm_act(y, module.conv3, module.bn3, module.relu, skip)


# --- MobileNetV2


def _halves(module: nn.Module) -> list[tuple] | str:
    """(convolution, norm, activation) of the expansion, if there is one, the depthwise and the pointwise."""
    conv = getattr(module, "conv", None)
    if conv is None:
        return NOTHING  # MobileNetV3's block of the same name, whose parts are Sequentials
    if not is_sequential(conv) or watched(conv, type(conv)) or len(conv) not in (3, 4):
        return "conv is not a Sequential of an expansion, a depthwise and a pointwise convolution, or has hooks"
    *blocks, pointwise, norm = conv
    found = [block_of(block) for block in blocks]
    why = next((block for block in found if isinstance(block, str)), "") or watched(pointwise, nn.Conv2d)
    if why or not isinstance(norm, NORMS):
        return why or "no norm follows the pointwise convolution"
    if any(type(block.act) not in FUSED_ACTS for block in found):
        return "an activation has no fused form"
    return [block[:3] for block in found] + [(pointwise, norm, None)]


def _inverted_refuses(module: nn.Module) -> str:
    found = _halves(module)
    if isinstance(found, str):
        return found
    return "" if isinstance(getattr(module, "use_res_connect", None), bool) else "it has no use_res_connect"


def _inverted(module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    *expansion, (dw, mid, mid_act), (pw, post, _) = _halves(module)
    skip = x if module.use_res_connect else None
    if not expansion:
        return run_separable(x, dw, mid, mid_act, pw, post, None, residual=skip)
    ((conv, norm, act),) = expansion
    return run_inverted_residual(x, conv, norm, dw, mid, pw, post, residual=module.use_res_connect, acts=(act, mid_act))


CONV = "convolution, norm, activation and skip as one"
RULES = (
    Rule("tv_aspp", LIBRARY, ("ASPP",), aspp_refuses, aspp, aspp_takes, "ASPP without concatenation"),
    Rule("tv_basic_block", LIBRARY, ("BasicBlock",), _refuses("conv1", "conv2"), _basic,
         taking("conv1", "bn1", "conv2", "bn2", "relu"), CONV,
         fuses_only=True),
    Rule("tv_bottleneck", LIBRARY, ("Bottleneck",), _refuses("conv1", "conv2", "conv3"), _bottleneck,
         taking("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "relu"), CONV,
         fuses_only=True),
    Rule("tv_inverted_residual", LIBRARY, ("InvertedResidual",), _inverted_refuses, _inverted, taking("conv"),
         "inverted residual in two ops",
         fuses_only=True),
)  # fmt: skip
