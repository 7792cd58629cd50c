"""Models of other libraries, converted, against themselves: values and gradients in float64, even and odd sizes."""

import functools

import pytest
import torch
from foreign import foreign
from nets_of_libraries import SMP, hf_segformer, hf_upernet, ready, same_converted, smp_net, timm_net, torchvision_net
from torch import nn

import fastseg
from fastseg.measure.counting import products_and_bytes

EVEN, ODD = (64, 96), (75, 83)
MOBILE = {"tv_inverted_residual": 17}  # SMP's MobileNetV2
RULES = {
    "unet": {"smp_unet_block": 5},
    "unetplusplus": {"smp_doubling_block": 11},
    "manet": {"smp_gated_block": 4, "smp_doubling_block": 1},
    "linknet": {},
    "fpn": {"smp_segmentation_block": 2},
    "pspnet": {"smp_psp_decoder": 1},
    "deeplabv3": {"smp_aspp": 1, "smp_deeplabv3_decoder": 1},
    "deeplabv3plus": {"smp_aspp": 1, "smp_deeplabv3plus_decoder": 1},
    "pan": {"smp_conv_bn": 14},
    "upernet": {"smp_upernet_decoder": 1, "smp_pyramid": 1},
    "segformer": {"smp_segformer_decoder": 1},
    "dpt": {"smp_fusion_block": 4, "smp_residual": 8},
}


@pytest.mark.parametrize("architecture", SMP)
def test_smp(architecture):
    size = (128, 128) if architecture == "pan" else (96, 64)  # PAN pools what is left three times
    taken = same_converted(smp_net(architecture), size, training=False)
    want = RULES[architecture] if architecture == "dpt" else MOBILE | RULES[architecture]
    assert {rule: count for rule, count in taken.items() if rule != "sequential"} == want


@pytest.mark.long
@pytest.mark.parametrize("encoder", ["resnet18", "efficientnet-b0", "mit_b0"])
@pytest.mark.parametrize("architecture", [a for a in SMP if a != "dpt"])
def test_smp_on_other_encoders(architecture, encoder):
    if encoder == "mit_b0" and architecture in ("unetplusplus", "linknet", "deeplabv3", "deeplabv3plus", "pan"):
        pytest.skip("the library does not build it")
    same_converted(smp_net(architecture, encoder), (128, 128) if architecture == "pan" else EVEN, example=True)


@pytest.mark.parametrize("size", [EVEN, ODD])
@pytest.mark.parametrize(("make", "rule"), [(hf_segformer, "hf_segformer_head"), (hf_upernet, "hf_upernet_head")])
def test_hugging_face(make, rule, size):
    assert same_converted(make(), size, example=size == ODD)[rule] == 1


@pytest.mark.parametrize(
    ("make", "want"),
    [
        (functools.partial(torchvision_net, "deeplabv3_mobilenet_v3_large"), {"tv_aspp": 1}),
        (functools.partial(torchvision_net, "lraspp_mobilenet_v3_large"), {"sequential": 47}),
        (functools.partial(torchvision_net, "mobilenet_v2"), {"tv_inverted_residual": 17}),
        (functools.partial(torchvision_net, "resnet18"), {"tv_basic_block": 8}),
        (functools.partial(timm_net, "mobilenetv2_050"), {"timm_inverted_residual": 16, "timm_separable": 1}),
        (functools.partial(timm_net, "efficientnet_b0"), {"timm_inverted_residual": 15, "timm_separable": 1}),
        (functools.partial(timm_net, "mobilenetv3_small_050"), {"timm_inverted_residual": 10, "timm_separable": 1}),
        (functools.partial(timm_net, "mobilenetv4_conv_small"), {"timm_conv": 39, "timm_norm": 5}),
        (functools.partial(timm_net, "resnet18"), {"timm_basic_block": 8}),
    ],
    ids=lambda value: value.args[0] if isinstance(value, functools.partial) else "",
)
def test_torchvision_and_timm(make, want):
    taken = same_converted(make(), (65, 64), training=False)
    assert {rule: taken[rule] for rule in want} == want


@pytest.mark.parametrize("act", ["ReLU", "SiLU", "Hardswish", "GELU"])
def test_blocks_of_timm(act):
    """With a squeeze-and-excite between depthwise and pointwise, and without; a norm by itself."""
    foreign("timm")
    from timm.layers import BatchNormAct2d, ConvNormAct, SqueezeExcite
    from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual

    layer = getattr(nn, act)
    blocks = [
        ConvNormAct(3, 8, 3, act_layer=layer),
        *(made(8, 8, act_layer=layer, se_layer=se) for made in (DepthwiseSeparableConv, InvertedResidual)
          for se in (None, SqueezeExcite)),
        BatchNormAct2d(8, act_layer=layer),
    ]  # fmt: skip
    taken = same_converted(ready(nn.Sequential(*blocks)), (9, 12))
    want = {"timm_conv": 1, "timm_separable": 2, "timm_inverted_residual": 2, "timm_norm": 1}
    assert taken == (want if act == "ReLU" else {k: n for k, n in want.items() if k != "timm_norm"})


@pytest.mark.long
@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_torchvision_segmentation(name):
    assert same_converted(torchvision_net(name), ODD)["tv_bottleneck"] == 16


def test_odd_maps_in_nearest_decoders_are_interpolated():
    """SMP lets Unet take sides that do not halve, if its check is not asked."""
    model = smp_net("unet")
    model.requires_divisible_input_shape = False
    same_converted(model, ODD, training=False)


# --- products, as counted in the project's table: 512^2, batch 1


def giga(model: nn.Module, *inputs) -> float:
    return products_and_bytes(lambda: model(*inputs))[0] * 1e-9


def test_products_of_segformers_head():
    """B2's head: 42.1 -> 3.45 G where the matrices' products are made once, 3.90 G where they are made at each call."""
    hf = foreign("transformers")
    from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

    widths = [64, 128, 320, 512]
    config = hf.SegformerConfig(num_labels=150, hidden_sizes=widths, decoder_hidden_size=768)
    maps = [torch.empty(1, width, 128 >> i, 128 >> i, device="meta") for i, width in enumerate(widths)]
    before = giga(SegformerDecodeHead(config).eval().to("meta"), maps)
    head = fastseg.convert(SegformerDecodeHead(config).eval()).to("meta")
    after = giga(head, maps)
    with torch.no_grad(), fastseg.frozen(head):
        head(maps)
        once = giga(head, maps)
    assert 42.0 < before < 42.2 and 3.85 < after < 3.95 and 3.4 < once < 3.5


def test_products_of_smps_unet():
    """MobileNetV2, 21 classes: 14.1 -> 9.8 G."""
    smp = foreign("segmentation_models_pytorch")
    make = lambda: smp.Unet("mobilenet_v2", encoder_weights=None, classes=21).eval()
    x = torch.empty(1, 3, 512, 512, device="meta")
    before, after = giga(make().to("meta"), x), giga(fastseg.convert(make()).to("meta"), x)
    assert 14.0 < before < 14.2 and 9.7 < after < 9.9
