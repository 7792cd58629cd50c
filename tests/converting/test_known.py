"""The texts that rules were written for are those of the installed libraries."""

import importlib
import inspect

import pytest
from foreign import foreign

from fastseg.converting import known
from fastseg.converting.rule import fingerprint

MODULES = {
    "smp": (
        "segmentation_models_pytorch",
        *(f"segmentation_models_pytorch.decoders.{name}.decoder" for name in (
            "unet", "unetplusplus", "manet", "deeplabv3", "pan", "dpt", "segformer", "upernet", "pspnet", "fpn")),
    ),
    "hf": ("transformers", "transformers.models.segformer.modeling_segformer",
           "transformers.models.upernet.modeling_upernet"),
    "tv": ("torchvision", "torchvision.models.segmentation.deeplabv3", "torchvision.models.resnet",
           "torchvision.models.mobilenetv2"),
    "timm": ("timm", "timm.layers.conv_bn_act", "timm.layers.norm_act", "timm.models._efficientnet_blocks",
             "timm.models.resnet"),
}  # fmt: skip


@pytest.mark.parametrize("library", MODULES)
def test_known_texts(library):
    root, *places = MODULES[library]
    foreign(root)
    modules = [importlib.import_module(place) for place in places]
    checked = 0
    for rule, kinds in known.KNOWN.items():
        if not rule.startswith(f"{library}_"):
            continue
        for kind, methods in kinds.items():
            found = [getattr(m, kind) for m in modules if hasattr(m, kind)]
            assert found, kind
            for method, prints in methods.items():
                here = {fingerprint(inspect.unwrap(getattr(c, method))) for c in found if hasattr(c, method)}
                assert here & set(prints), f"{rule}: {kind}.{method} is {here}; check the rule, then add it to known.py"
                checked += 1
    assert checked


def test_a_fingerprint_is_of_what_is_done():
    def one(self, x: int) -> int:
        """Text."""
        return x + 1  # comment

    def two(self, x):
        return x + 1

    def three(self, x):
        return x + 2

    two.__name__ = "one"
    texts = [fingerprint(f) for f in (one, two, three)]
    assert texts[0] and texts[0] != texts[2]
    assert fingerprint(len) == ""


def test_copied_nets_are_known():
    """milesial's text, with other comments and quotes, as people reformat it."""
    assert fingerprint(_Up.forward) in known.KNOWN["unet_up"]["Up"]["forward"]


class _Up:
    def forward(self, x1, x2):
        """Up."""
        x1 = self.up(x1)
        diffY = x2.size()[2] - x1.size()[2]
        diffX = x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [diffX // 2, diffX - diffX // 2, diffY // 2, diffY - diffY // 2])  # noqa: F821
        x = torch.cat([x2, x1], dim=1)  # noqa: F821
        return self.conv(x)
