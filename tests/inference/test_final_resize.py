"""Classes from small logits: the last resize of any model is found, and nothing but it is left out."""

import pytest
import torch
from nets_of_libraries import hf_segformer, hf_upernet, smp_net, torchvision_net
from torch import Tensor, nn
from torch.nn import functional as F

import fastseg
from fastseg import ops
from fastseg.inference.final_resize import final_logits, post_process_semantic_segmentation
from fastseg.ops.logits import logits_of


class Net(nn.Module):
    def __init__(self, last=lambda y: y, **resize):
        super().__init__()
        self.conv, self.resize, self.last = nn.Conv2d(3, 5, 3, 4, 1), resize, last

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.conv(x), scale_factor=2.0, mode="bilinear", align_corners=True)
        y = y + y.mean((2, 3), keepdim=True)  # the first resize is used
        return self.last(F.interpolate(y, **({"size": x.shape[2:], "mode": "bilinear"} | self.resize)))


X = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("resize", [{}, {"align_corners": True}, {"size": None, "scale_factor": 2}])
def test_the_resize_is_not_made(resize):
    model = Net(**resize)
    small, size, corners = final_logits(model, X)
    assert small.shape == (2, 5, 12, 20) and size == (24, 40) and corners == bool(resize.get("align_corners"))
    want = model(X)
    torch.testing.assert_close(F.interpolate(small, size, mode="bilinear", align_corners=corners), want)
    got = fastseg.predict(model, X)
    assert got.dtype == torch.uint8 and torch.equal(got.long(), want.argmax(1))


@pytest.mark.parametrize(
    "last",
    [
        lambda y: y.softmax(1), lambda y: y * -1, lambda y: y.clone(), lambda y: torch.cat([y, y], 1)[:, 3:8],
        lambda y: _in_place(y), lambda y: y.flip(1).contiguous(),
    ],
)  # fmt: skip
def test_what_uses_the_resized_logits_gets_them(last):
    model = Net(last)
    small, size, _ = final_logits(model, X)
    assert tuple(small.shape[2:]) == size == (24, 40)
    torch.testing.assert_close(small, model(X))
    assert torch.equal(fastseg.predict(model, X).long(), model(X).argmax(1))


def _in_place(y: Tensor) -> Tensor:
    y.mul_(-1)
    return y


def test_questions_for_size_and_kind_make_nothing():
    asked = []

    def last(y):
        asked.append((y.shape, y.dim(), y.dtype, y.device.type, y.size(1), y.size()[2:]))
        return y

    small, *_ = final_logits(Net(last), X)
    assert small.shape[2:] == (12, 20)
    assert asked == [((2, 5, 24, 40), 4, torch.float32, "cpu", 5, (24, 40))]


@pytest.mark.parametrize(
    "resize", [{"mode": "nearest"}, {"mode": "bicubic"}, {"antialias": True}, {"size": None, "scale_factor": 2.03}]
)
def test_other_resizes_are_made(resize):
    model = Net(**resize)
    small, size, _ = final_logits(model, X)
    assert tuple(small.shape[2:]) == size and torch.equal(small, model(X))


def test_a_loss_on_the_small_logits_has_the_models_gradients():
    model, target = Net(align_corners=True).double(), torch.randint(5, (2, 24, 40))
    x = X.double()
    F.cross_entropy(model(x), target).backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    small, _, corners = final_logits(model, x)
    ops.upsample_cross_entropy(small, target, align_corners=corners).backward()
    for p, q in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, q)


def test_a_model_that_resizes_to_another_size_than_the_images():
    model = Net(size=(30, 30))
    want = F.interpolate(model(X), X.shape[2:], mode="bilinear").argmax(1)
    assert torch.equal(fastseg.predict(model, X).long(), want)


def test_one_channel_and_no_logits():
    model = nn.Conv2d(3, 1, 1)
    assert torch.equal(fastseg.predict(model, X), (model(X)[:, 0] > 0).to(torch.uint8))
    with pytest.raises(TypeError, match="Flatten returns no logits"):
        fastseg.predict(nn.Flatten(), X)


def test_our_own_models_predict():
    model = fastseg.models.create("unet", 3, padding="same", widths=(4, 8)).eval()
    assert torch.equal(fastseg.predict(model, X), model.predict(X))


def test_hugging_faces_post_processing():
    logits = torch.randn(2, 300, 5, 7)
    logits[0, :, 0, 0] = float("nan")
    output = {"logits": logits}
    sizes = [(17, 20), (33, 9)]
    want = [
        F.interpolate(one[None], size, mode="bilinear", align_corners=False).argmax(1)[0]
        for one, size in zip(logits, sizes, strict=True)
    ]
    for given in (sizes, torch.tensor(sizes)):
        got = post_process_semantic_segmentation(output, given)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))
    got = post_process_semantic_segmentation(output)
    assert len(got) == 2 and torch.equal(torch.stack(got), logits.argmax(1))
    with pytest.raises(ValueError, match="2 images and 1 target_sizes"):
        post_process_semantic_segmentation(output, sizes[:1])
    with pytest.raises(TypeError, match="list has no logits"):
        post_process_semantic_segmentation([])


@pytest.mark.parametrize(
    ("make", "factor"),
    [
        (hf_upernet, 4), (hf_segformer, 4), (lambda: smp_net("fpn"), 4), (lambda: smp_net("deeplabv3plus"), 4),
        (lambda: torchvision_net("lraspp_mobilenet_v3_large"), 8), (lambda: smp_net("unet"), 1),
    ],
    ids=["hf_upernet", "hf_segformer", "fpn", "deeplabv3plus", "lraspp", "unet"],
)  # fmt: skip
def test_models_of_libraries(make, factor):
    model, x = make(), torch.randn(1, 3, 64, 96, dtype=torch.float64)
    fastseg.convert(model)
    with torch.no_grad():
        found = model(x)
        full = logits_of(found)
        full = F.interpolate(full, x.shape[2:], mode="bilinear")
        small, *_ = final_logits(model, x)
    assert small.shape[2:] == (64 // factor, 96 // factor)
    assert torch.equal(fastseg.predict(model, x).long(), full.argmax(1))
