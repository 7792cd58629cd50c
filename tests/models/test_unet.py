"""U-Net: golden counts, sizes and names; the nets written with torch alone; tiles; errors."""

import copy

import pytest
import torch
from nets import unsettle
from torch import Tensor, nn
from torch.nn import functional as F

import fastseg
from fastseg.measure.comparison import eager_form
from fastseg.models import UNet, create

CL = torch.channels_last
VALID = {"widths": (4, 6, 8)}
FORMS = {
    "paper": VALID,
    "valid, norm, bilinear": {**VALID, "norm": True, "up": "bilinear"},
    "same": {**VALID, "padding": "same"},
    "same, norm": {**VALID, "padding": "same", "norm": True},
    "same, norm, bilinear": {**VALID, "padding": "same", "norm": True, "up": "bilinear"},
}
EACH = pytest.mark.parametrize("form", FORMS)


def narrow(form: str) -> UNet:
    """fp64; norms that are not the identity, biases that are not 0."""
    return unsettle(UNet(3, **FORMS[form]))


def image(form: str, batch: int = 2) -> Tensor:
    """The smallest sides that leave logits to the valid form, one above; and odd ones: 37x22, 18x11, 9x5."""
    sides = (37, 22) if FORMS[form].get("padding") == "same" else (44, 48)
    return torch.randn(batch, 3, *sides, dtype=torch.float64)


class TestGolden:
    @pytest.mark.parametrize(
        ("options", "count"),
        [
            ({"num_classes": 2, "in_channels": 1}, 31_030_658),
            ({"num_classes": 21}, 31_033_045),
            ({"num_classes": 2, "padding": "same", "norm": True}, 31_037_698),
            ({"num_classes": 2, "padding": "same", "norm": True, "up": "bilinear"}, 17_263_042),
        ],
        ids=str,
    )
    def test_counts(self, options, count):
        with torch.device("meta"):
            model = UNet(**options)
        assert sum(p.numel() for p in model.parameters()) == count
        convs = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
        assert len(convs) == (19 if options.get("up") == "bilinear" else 23)  # the paper's 23 layers

    def test_the_papers_sizes(self):
        """572 -> 388: maps of each level, what the transposed convolutions make, crops of 4, 16, 40 and 88 pixels."""
        with torch.device("meta"):
            model, x = UNet(2, 1), torch.empty(1, 1, 572, 572)
        downs, ups, skips = [], [], []
        for i in range(1, 5):
            note = lambda kept: lambda module, args, y: kept.append(y.shape[-1])
            getattr(model, f"down{i}").register_forward_hook(note(downs))
            getattr(model, f"up{i}").up.register_forward_hook(note(ups))
            getattr(model, f"up{i}").register_forward_pre_hook(lambda module, args: skips.append(args[1].shape[-1]))
        assert model.eval()(x).shape == (1, 2, 388, 388)
        assert downs == [280, 136, 64, 28]
        assert ups == [56, 104, 200, 392]
        assert [(skip - up) // 2 for skip, up in zip(skips, ups, strict=True)] == [4, 16, 40, 88]
        assert (model.margin, model.stride) == (92, 16)

    def test_names(self):
        """Those of milesial's Pytorch-UNet; without norm the convolutions move together."""
        with torch.device("meta"):
            state = UNet(2, padding="same", norm=True).state_dict()
            bilinear = UNet(2, padding="same", norm=True, up="bilinear").state_dict()
            paper = UNet(2, 1).state_dict()
        norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        double = ["0.weight", "3.weight", *(f"{i}.{part}" for i in (1, 4) for part in norm)]
        blocks = ["inc", *(f"down{i}.maxpool_conv.1" for i in range(1, 5)), *(f"up{i}.conv" for i in range(1, 5))]
        names = {f"{block}.double_conv.{part}" for block in blocks for part in double}
        names |= {"outc.conv.weight", "outc.conv.bias"}
        assert bilinear.keys() == names
        assert state.keys() == names | {f"up{i}.up.{part}" for i in range(1, 5) for part in ("weight", "bias")}
        assert tuple(state["up1.up.weight"].shape) == (1024, 512, 2, 2)
        assert tuple(bilinear["up1.conv.double_conv.0.weight"].shape) == (512, 1024, 3, 3)
        assert tuple(bilinear["up1.conv.double_conv.3.weight"].shape) == (256, 512, 3, 3)
        assert "up4.conv.double_conv.2.bias" in paper


def plain(model: UNet, x: Tensor, form: str, training: bool) -> Tensor:
    """U-Net from the tensors of ``model``, with torch.nn.functional alone; running statistics stay as they are."""
    options, state = FORMS[form], dict(model.named_parameters()) | dict(model.named_buffers())
    padded = options.get("padding") == "same"

    def double(x: Tensor, name: str) -> Tensor:
        for i in (0, 3) if options.get("norm") else (0, 2):
            key = f"{name}.double_conv.{i}"
            x = F.conv2d(x, state[f"{key}.weight"], state.get(f"{key}.bias"), padding=int(padded))
            if options.get("norm"):
                key = f"{name}.double_conv.{i + 1}"
                stats = (None, None) if training else (state[f"{key}.running_mean"], state[f"{key}.running_var"])
                x = F.batch_norm(x, *stats, state[f"{key}.weight"], state[f"{key}.bias"], training)
            x = F.relu(x)
        return x

    skips = [double(x, "inc")]
    for i in (1, 2):
        skips.append(double(F.max_pool2d(skips[-1], 2), f"down{i}.maxpool_conv.1"))
    x = skips.pop()
    for i in (1, 2):
        skip = skips.pop()
        if options.get("up") == "bilinear":
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        else:
            x = F.conv_transpose2d(x, state[f"up{i}.up.weight"], state[f"up{i}.up.bias"], stride=2)
        rows, columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
        if padded:  # an odd side: one row or column of zeros at the end
            x = F.pad(x, (0, columns, 0, rows))
        else:
            top, left = rows // 2, columns // 2
            skip = skip[:, :, top : top + x.shape[2], left : left + x.shape[3]]
        x = double(torch.cat([skip, x], 1), f"up{i}.conv")
    return F.conv2d(x, state["outc.conv.weight"], state["outc.conv.bias"])


@EACH
@pytest.mark.parametrize(
    ("training", "kernels"), [(True, True), (True, False), (False, False)], ids=["train, kernels", "train", "eval"]
)
def test_equals_plain_pytorch(form, training, kernels, device):
    model, x = narrow(form).to(device).train(training), image(form).to(device)
    if kernels:
        x = x.contiguous(memory_format=CL)
        got = model(x)
    else:
        with fastseg.reference():
            got = model(x)
    want = plain(model, x, form, training)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    upstream, learnt = torch.randn_like(want), list(model.parameters())
    with fastseg.reference() if not kernels else torch.enable_grad():
        ours = torch.autograd.grad(got, learnt, upstream)
    theirs = torch.autograd.grad(want, learnt, upstream)
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * float(upstream.norm()), msg=name)


@EACH
def test_folded_evaluation_equals_the_unfolded(form):
    model, x = narrow(form).eval(), image(form)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad(), fastseg.reference():
        torch.testing.assert_close(model(x), eager_form(model)(x), rtol=1e-10, atol=1e-11)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_valid_heads():
    """predict and loss are those of the logits' window; the target may have either size."""
    model, x = narrow("paper").eval(), image("paper")
    target = torch.randint(3, (2, 44, 48))
    with torch.no_grad(), fastseg.reference():
        logits = model(x)
        assert model.margin == 20 and logits.shape == (2, 3, 4, 8)
        assert torch.equal(model.predict(x).long(), logits.argmax(1))
        window = target[:, 20:-20, 20:-20]
        want = F.cross_entropy(logits, window)
        torch.testing.assert_close(model.loss(x, target), want)
        torch.testing.assert_close(model.loss(x, window), want)
        with pytest.raises(ValueError, match=r"logits are \(2, 3, 4, 8\), target is \(2, 5, 8\)"):
            model.loss(x, target[:, :5, :8])


def test_tiles_at_multiples_of_the_stride_see_what_the_image_does():
    model = narrow("paper").eval()
    x = torch.randn(1, 3, 56, 60, dtype=torch.float64)
    with torch.no_grad(), fastseg.reference():
        whole = model(x)
        for top, left in ((0, 4), (8, 12)):
            tile = model(x[:, :, top : top + 48, left : left + 48])
            torch.testing.assert_close(tile, whole[:, :, top : top + 8, left : left + 8], rtol=1e-12, atol=1e-12)
        shifted = model(x[:, :, 2:50, 4:52])
        assert (shifted - whole[:, :, 2:10, 4:12]).abs().max() > 1e-3


def test_dropout_is_at_the_end_of_the_contraction():
    model = UNet(2, padding="same", widths=(4, 8, 16), dropout=1.0)
    seen = []
    model.up1.register_forward_pre_hook(lambda module, args: seen.append(args))
    with fastseg.reference():
        model(torch.randn(1, 3, 16, 16))
        model.eval()(torch.randn(1, 3, 16, 16))
    (train, skip), (evaluated, _) = seen
    assert not train.any() and evaluated.any() and skip.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "UNet: num_classes is 0"),
        ({"padding": "full"}, "UNet: padding is 'full'; use"),
        ({"up": "nearest"}, "UNet: up is 'nearest'; use"),
        ({"widths": (8,)}, r"UNet: widths are \(8,\); give two or more"),
        ({"widths": (8, 0)}, r"UNet: widths are \(8, 0\)"),
    ],
)
def test_bad_option(options, message):
    with pytest.raises(ValueError, match=message):
        create("unet", **{"num_classes": 2, **options})


@pytest.mark.parametrize(
    ("options", "sides", "message"),
    [
        ({}, (512, 512), r"\(1, 3, 512, 512\); without padding a side is 188 \+ a multiple of 16: pad to 524x524"),
        ({}, (172, 188), "pad to 188x188"),
        ({"padding": "same"}, (15, 64), r"\(1, 3, 15, 64\); a side of 16 pixels or more"),
    ],
)
def test_bad_size(options, sides, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        UNet(2, **options)(torch.empty(1, 3, *sides))
