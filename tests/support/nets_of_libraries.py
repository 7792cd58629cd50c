"""Small models of other libraries, with weights and statistics that tell layers apart; float64, in evaluation."""

import copy
from collections import Counter
from collections.abc import Callable

import torch
from foreign import foreign
from nets import unsettle
from torch import Tensor, nn

import fastseg
from fastseg.converting.classes import fused_everywhere

TOLERANCE = 1e-10
SMP = ("unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "deeplabv3", "deeplabv3plus", "pan", "upernet",
       "segformer", "dpt")  # fmt: skip
NARROW = {
    "unet": {"decoder_channels": (24, 16, 8, 8, 4)},
    "unetplusplus": {"decoder_channels": (24, 16, 8, 8, 4)},
    "manet": {"decoder_channels": (24, 16, 8, 8, 4), "decoder_pab_channels": 8},
    "fpn": {"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 32},
    "pspnet": {"psp_out_channels": 16},
    "deeplabv3": {"decoder_channels": 16},
    "deeplabv3plus": {"decoder_channels": 16},
    "upernet": {"decoder_channels": 16},
    "segformer": {"decoder_segmentation_channels": 16},
    "dpt": {"decoder_intermediate_channels": (8, 12, 16, 16), "decoder_fusion_channels": 8},
}


def smp_net(architecture: str, encoder: str = "mobilenet_v2") -> nn.Module:
    smp = foreign("segmentation_models_pytorch")
    options = dict(NARROW.get(architecture, {}))
    if architecture == "dpt":
        encoder, options["dynamic_img_size"] = "tu-vit_tiny_patch16_224", True
    return ready(smp.create_model(architecture, encoder, encoder_weights=None, classes=3, **options))


def hf_segformer() -> nn.Module:
    hf = foreign("transformers")
    config = hf.SegformerConfig(
        num_labels=5, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=32,
    )  # fmt: skip
    return ready(hf.SegformerForSemanticSegmentation(config))


def hf_upernet() -> nn.Module:
    hf = foreign("transformers")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = hf.ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], out_features=stages)
    config = hf.UperNetConfig(
        backbone_config=backbone, hidden_size=16, num_labels=5, auxiliary_in_channels=24, auxiliary_channels=8
    )
    return ready(hf.UperNetForSemanticSegmentation(config))


def torchvision_net(name: str) -> nn.Module:
    models = foreign("torchvision").models
    make = getattr(models.segmentation, name, None) or getattr(models, name)
    return ready(make(weights=None, **({"weights_backbone": None} if hasattr(models.segmentation, name) else {})))


def timm_net(name: str) -> nn.Module:
    return ready(foreign("timm").create_model(name, pretrained=False, features_only=True))


def ready(model: nn.Module) -> nn.Module:
    """Dropout off, and what is drawn at random in training."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(getattr(module, "drop_prob", None), float):
            module.drop_prob = 0.0
    return unsettle(model).eval()


def outputs(found) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return list(found.values()) if hasattr(found, "values") else list(found)


def run(model: nn.Module, x: Tensor, *, grad: bool, training: bool = False) -> tuple[list[Tensor], list]:
    """Outputs and gradients of one call."""
    model.train(training)
    x = x.clone().requires_grad_(grad)
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad):
        found = [t for t in outputs(model(x)) if isinstance(t, Tensor)]
        if not grad:
            return found, []
        total = sum((t * torch.linspace(0, 5, t.numel(), dtype=t.dtype).cos().view(t.shape)).sum() for t in found)
        return found, list(torch.autograd.grad(total, [x, *model.parameters()], allow_unused=True))


def errors(got: list, want: list) -> float:
    """The largest relative error. A gradient that is zero but for rounding counts as the others' rounding."""
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if b is not None]
    top = max((float(b.abs().max()) for _, b in pairs), default=0.0)
    return max((float((a - b).abs().max()) / max(float(b.abs().max()), 1e-4 * top) for a, b in pairs), default=0.0)


Maker = Callable[[], nn.Module]


def same_converted(model: nn.Module, size: tuple[int, int], *, training: bool = True, example: bool = False) -> Counter:
    """Convert a copy, compare, revert; returns how often each rule was taken."""
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    converted = fastseg.convert(copy.deepcopy(model), x if example else None)
    taken = Counter(row.rule for row in fastseg.conversion(converted).converted)
    for grad, mode in ((False, False), (True, False), (True, True))[: 3 if training else 2]:
        want = run(model, x, grad=grad, training=mode)
        with fused_everywhere():  # also what on a CPU would run as it is written
            got = run(converted, x, grad=grad, training=mode)
        assert errors(got[0], want[0]) < TOLERANCE
        assert errors(got[1], want[1]) < TOLERANCE
    kinds = [type(m) for m in model.modules()]
    assert [type(m) for m in fastseg.revert(converted).modules()] == kinds
    return taken
