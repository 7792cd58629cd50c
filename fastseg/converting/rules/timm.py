"""Rules for timm: its norm with an activation inside, convolution blocks, mobile blocks and residual blocks."""

from collections.abc import Callable

from torch import Tensor, nn

from fastseg.converting.rule import Rule
from fastseg.converting.rules.smp import parts, taking
from fastseg.nn.fuse.conv_norm_act import run_conv_norm_act
from fastseg.nn.fuse.inverted_residual import run_inverted_residual
from fastseg.nn.fuse.norm import run_norm_act
from fastseg.nn.fuse.separable import run_separable
from fastseg.nn.fuse.watch import FUSED_ACTS, watched
from fastseg.ops.core.dispatch import followed

LIBRARY = "timm"


def opened_norm(norm: nn.Module | None) -> tuple[nn.BatchNorm2d, nn.Module | None] | str:
    """timm's ``BatchNormAct2d`` as a batch norm and the activation after it, or why it is not both.

    The batch norm is another view of the same object: it shares its ``__dict__``, so parameters, statistics, counters,
    modes and hooks are one.
    """
    if type(norm).__name__ != "BatchNormAct2d" or not isinstance(norm, nn.BatchNorm2d):
        return f"a norm is {type(norm).__name__}, not BatchNormAct2d"
    why = watched(norm, type(norm))
    if why or not type(norm).__module__.startswith("timm."):
        return why or "a norm is not timm's"
    if watched(norm.drop, nn.Identity):
        return "a norm drops values"
    view = object.__new__(nn.BatchNorm2d)
    view.__dict__ = norm.__dict__
    return view, None if type(norm.act) is nn.Identity and not watched(norm.act, nn.Identity) else norm.act


def run_conv(x: Tensor, conv: nn.Module, norm: nn.Module, residual: Tensor | None = None) -> Tensor:
    """``norm(conv(x)) + residual``; a norm of another kind is called."""
    found = opened_norm(norm)
    if isinstance(found, str) or (residual is not None and found[1] is not None):
        y = norm(conv(x))
        return y if residual is None else y + residual
    return run_conv_norm_act(x, conv, *found, residual)


def plain(module: nn.Module | None) -> bool:
    """True if the module is absent or an ``nn.Identity`` that nobody watches."""
    return module is None or not watched(module, nn.Identity)


def in_a_graph(run: Callable) -> Callable:
    """``run``, but the original in a captured graph, a trace or a transform."""

    def call(module: nn.Module, original: Callable, *args, **kwargs):
        return original(*args, **kwargs) if followed() else run(module, original, *args, **kwargs)

    return call


def _norm_refuses(module: nn.Module) -> str:
    if watched(getattr(module, "drop", module), nn.Identity):
        return "it drops values"
    return "" if type(getattr(module, "act", None)) in FUSED_ACTS else "nothing to fuse"


def _norm(module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    view = object.__new__(nn.BatchNorm2d)
    view.__dict__ = {**module.__dict__, **{key: {} for key in HOOKS}}  # its hooks run around this call
    return run_norm_act(x, view, module.act)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _conv_refuses(module: nn.Module) -> str:
    found = parts(module, "conv", "bn")
    if isinstance(found, str):
        return found
    norm = opened_norm(found[1])
    return watched(found[0], nn.Conv2d) or (norm if isinstance(norm, str) else "")


def _conv(module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    y = run_conv(x, module.conv, module.bn)
    aa = getattr(module, "aa", None)
    return y if aa is None else aa(y)


# --- mobile blocks; a squeeze-and-excite between depthwise and pointwise is called


def _mobile_refuses(*names: str) -> Callable[[nn.Module], str]:
    def refuses(module: nn.Module) -> str:
        found = parts(module, *names)
        if isinstance(found, str):
            return found
        if not isinstance(getattr(module, "has_skip", None), bool):
            return "it has no has_skip"
        norms = [opened_norm(norm) for norm in found if isinstance(norm, nn.BatchNorm2d)]
        return next((norm for norm in norms if isinstance(norm, str)), "") if norms else "it has no BatchNormAct2d"

    return refuses


def _start(module: nn.Module, x: Tensor) -> Tensor:
    return x if module.conv_s2d is None else module.bn_s2d(module.conv_s2d(x))


def _skipped(module: nn.Module, y: Tensor, skip: Tensor) -> Tensor:
    return module.drop_path(y) + skip if module.has_skip else y


def _norms(module: nn.Module, *names: str) -> list:
    return [opened_norm(getattr(module, name)) for name in names]


def _fusible(module: nn.Module, norms: list, convs: list) -> bool:
    """True if nothing but convolutions, norms and fused activations stand between the ends of the block."""
    acts = all(not isinstance(n, str) and (n[1] is None or type(n[1]) in FUSED_ACTS) for n in norms)
    between = plain(module.aa) and plain(module.se) and (not module.has_skip or plain(module.drop_path))
    return acts and between and not any(watched(conv, nn.Conv2d) for conv in convs) and norms[-1][1] is None


def _separable(module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    y, norms = _start(module, x), _norms(module, "bn1", "bn2")
    if _fusible(module, norms, [module.conv_dw, module.conv_pw]):
        (mid, act), (post, _) = norms
        skip = x if module.has_skip else None
        return run_separable(y, module.conv_dw, mid, act, module.conv_pw, post, None, residual=skip)
    y = module.se(module.aa(run_conv(y, module.conv_dw, module.bn1)))
    return _skipped(module, run_conv(y, module.conv_pw, module.bn2), x)


def _inverted(module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    y, norms = _start(module, x), _norms(module, "bn1", "bn2", "bn3")
    convs = [module.conv_pw, module.conv_dw, module.conv_pwl]
    if y is x and _fusible(module, norms, convs):
        (one, act), (two, mid), (three, _) = norms
        acts = act, mid
        return run_inverted_residual(
            x, convs[0], one, convs[1], two, convs[2], three, residual=module.has_skip, acts=acts
        )
    y = run_conv(run_conv(y, module.conv_pw, module.bn1), module.conv_dw, module.bn2)
    return _skipped(module, run_conv(module.se(module.aa(y)), module.conv_pwl, module.bn3), x)


# --- ResNet; its norms are BatchNorm2d, its activations modules of their own


def _residual_refuses(*numbers: int) -> Callable[[nn.Module], str]:
    def refuses(module: nn.Module) -> str:
        found = parts(module, *(f"{kind}{n}" for n in numbers for kind in ("conv", "bn", "act")))
        if isinstance(found, str):
            return found
        return next(filter(None, (watched(getattr(module, f"conv{n}"), nn.Conv2d) for n in numbers)), "")

    return refuses


def _residual(last: int) -> Callable:
    def run(module: nn.Module, original: Callable, x: Tensor) -> Tensor:
        dropped = last - 1  # DropBlock and the blur stand in front of and behind this activation
        y = x
        for n in range(1, last):
            conv, norm, act = (getattr(module, f"{kind}{n}") for kind in ("conv", "bn", "act"))
            if n == dropped and not (plain(module.drop_block) and plain(module.aa)):
                y = module.aa(act(module.drop_block(run_conv_norm_act(y, conv, norm, None))))
            else:
                y = run_conv_norm_act(y, conv, norm, act)
        skip = x if module.downsample is None else module.downsample(x)
        conv, norm, act = (getattr(module, f"{kind}{last}") for kind in ("conv", "bn", "act"))
        if module.se is None and module.drop_path is None:
            return run_conv_norm_act(y, conv, norm, act, skip)
        y = run_conv_norm_act(y, conv, norm, None)
        y = y if module.se is None else module.se(y)
        y = y if module.drop_path is None else module.drop_path(y)
        return act(y + skip)

    return run


CONV = "convolution, norm and activation as one"
RULES = (
    Rule("timm_conv", LIBRARY, ("ConvNormAct",), _conv_refuses, in_a_graph(_conv), taking("conv", "bn"), CONV,
         fuses_only=True),
    Rule("timm_separable", LIBRARY, ("DepthwiseSeparableConv",), _mobile_refuses("conv_dw", "bn1", "conv_pw", "bn2"),
         in_a_graph(_separable), taking("conv_dw", "bn1", "conv_pw", "bn2"), "separable convolution",
         fuses_only=True),
    Rule("timm_inverted_residual", LIBRARY, ("InvertedResidual",),
         _mobile_refuses("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"), in_a_graph(_inverted),
         taking("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"), "inverted residual",
         fuses_only=True),
    Rule("timm_basic_block", LIBRARY, ("BasicBlock",), _residual_refuses(1, 2), _residual(2),
         taking("conv1", "bn1", "act1", "conv2", "bn2", "act2"), CONV,
         fuses_only=True),
    Rule("timm_bottleneck", LIBRARY, ("Bottleneck",), _residual_refuses(1, 2, 3), _residual(3),
         taking("conv1", "bn1", "act1", "conv2", "bn2", "act2", "conv3", "bn3", "act3"), CONV,
         fuses_only=True),
    Rule("timm_norm", LIBRARY, ("BatchNormAct2d",), _norm_refuses, in_a_graph(_norm), lambda module: [module.act],
         "norm and activation as one",
         fuses_only=True),
)  # fmt: skip
