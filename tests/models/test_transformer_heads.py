"""SegFormer and UPerNet against Hugging Face's, and what they do by themselves."""

import pytest
import torch
from foreign import foreign
from nets import NARROW, unsettle
from nets_of_libraries import hf_segformer, hf_upernet
from torch import nn
from torch.nn import functional as F

from fastseg import explain, reference, unfused
from fastseg.models import create, load_weights
from fastseg.models.encoders import MixTransformer
from fastseg.models.encoders.mit import VARIANTS
from fastseg.models.upernet import UPerHead
from fastseg.ops.core.dispatch import INTERPRETED

# Of Hugging Face's nets with 150 classes.
PARAMETERS = {"mit_b0": 3_752_694, "mit_b2": 27_461_974, "mit_b5": 84_708_694}


def narrow(name: str, classes: int = 5) -> nn.Module:
    return unsettle(create(name, classes, **NARROW[name])).eval()


@pytest.mark.parametrize("backbone", PARAMETERS)
def test_parameters(backbone):
    with torch.device("meta"):
        model = create("segformer", 150, backbone=backbone)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[backbone]


@pytest.mark.parametrize("size", [(64, 96), (65, 47)])
def test_segformer_reads_hugging_faces_folder(size, tmp_path):
    theirs = hf_segformer()
    theirs.save_pretrained(tmp_path)
    ours = create("segformer", 5, decoder_channels=32, encoder_options={"heads": (1, 2, 2, 4)})
    ours.segformer["encoder"] = _encoder_of(theirs.config)
    ours.decode_head = type(ours.decode_head)([8, 16, 24, 32], 32, 5)
    ours = ours.double().eval()
    load_weights(ours, tmp_path)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(x), theirs(x).logits, rtol=0, atol=1e-10)


def _encoder_of(config) -> MixTransformer:
    """One block a stage, and widths that no variant has."""
    VARIANTS["tiny"] = tuple(config.hidden_sizes), tuple(config.depths)
    try:
        return MixTransformer("tiny", heads=config.num_attention_heads)
    finally:
        del VARIANTS["tiny"]


@pytest.mark.parametrize("backbone", PARAMETERS)
def test_names_and_shapes_are_hugging_faces(backbone, tmp_path):
    hf = foreign("transformers")
    widths, depths = VARIANTS[backbone]
    config = hf.SegformerConfig(
        num_labels=150, depths=depths, hidden_sizes=widths, decoder_hidden_size=256 if backbone == "mit_b0" else 768
    )
    hf.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    model = create("segformer", 150, backbone=backbone)
    load_weights(model, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[backbone]


def test_upernet_head_is_hugging_faces():
    theirs = hf_upernet().decode_head
    ours = UPerHead([8, 16, 24, 32], 16, 5).double().eval()
    ours.load_state_dict(theirs.state_dict())
    maps = [torch.randn(2, c, 32 >> i, 48 >> i, dtype=torch.float64) for i, c in enumerate((8, 16, 24, 32))]
    with torch.no_grad():
        torch.testing.assert_close(ours(maps), theirs(maps), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["segformer", "upernet"])
def test_fused_equals_unfused(name):
    """Also with a hook on each module that a fused op would read, which fires."""
    model, x = narrow(name), torch.randn(1, 3, 47, 65, dtype=torch.float64)
    with torch.no_grad():
        with unfused():
            want = model(x)
        with reference():
            torch.testing.assert_close(model(x), want, rtol=0, atol=1e-10)
            head = model.decode_head
            for module in head.modules():
                if not isinstance(module, nn.ModuleList | nn.ModuleDict):
                    seen = []
                    hook = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
                    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-10)
                    hook.remove()
                    assert seen, type(module).__name__


@pytest.mark.skipif(not INTERPRETED, reason="kernels run interpreted")
def test_segformers_head_is_one_sum():
    model = narrow("segformer")
    with torch.no_grad(), explain() as report:
        model.logits(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert ("upsample_sum", "triton") in {(decision.op, decision.path) for decision in report}


def test_drop_path_leaves_out_whole_branches():
    block = MixTransformer("mit_b0", width=0.25, heads=(1, 1, 1, 1), drop_path=0.5).block[3][1].train()
    assert block.drop_path == 0.5
    tokens = torch.ones(64, 2, 2, 64)
    with torch.no_grad():
        dropped = block._dropped(tokens).flatten(1)
    assert torch.equal(dropped.amin(1), dropped.amax(1)) and set(dropped[:, 0].tolist()) == {0.0, 2.0}
    assert torch.equal(block.eval()._dropped(tokens), tokens)


def test_bad_options():
    for name, options, text in (
        ("segformer", {"backbone": "mit_b6"}, "SegFormer: no backbone 'mit_b6'; use one of mit_b0, "),
        ("segformer", {"decoder_channels": 0}, "SegFormer: decoder_channels is 0"),
        ("segformer", {"encoder_options": {"drop_path": 1.0}}, "MixTransformer: drop_path is 1.0"),
        ("segformer", {"encoder_options": {"heads": (1, 2)}}, r"MixTransformer: heads is \(1, 2\)"),
        ("upernet", {"backbone": "vgg16"}, "UPerNet: no backbone 'vgg16'"),
        ("upernet", {"channels": 0}, "UPerNet: channels is 0"),
    ):
        with pytest.raises(ValueError, match=text):
            create(name, 3, **options)
    with pytest.raises(ValueError, match="the image is 64x31; its sides must be 32 pixels or more"):
        create("segformer", 3)(torch.randn(1, 3, 64, 31))


def test_upernet_trains_with_two_heads():
    model = create("upernet", 3, **NARROW["upernet"])
    x, target = torch.randn(2, 3, 32, 32), torch.randint(3, (2, 32, 32))
    with reference():
        main, auxiliary = model.train()(x)
        loss = model.loss(x, target)
    want = F.cross_entropy(main, target) + 0.4 * F.cross_entropy(auxiliary, target)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
