"""DeconvNet: the golden count layer by layer, the net written with torch alone, small images, torchvision's files."""

import copy
import itertools

import pytest
import torch
from nets import unsettle
from torch import Tensor
from torch.nn import functional as F

import fastseg
from fastseg.measure.comparison import eager_form
from fastseg.models import FCN, DeconvNet, create, load_encoder_weights

pytestmark = pytest.mark.filterwarnings("ignore:max_unpool")  # torch's own is the reference, and not deterministic
PARTS = {
    "encoder": 14_723_136,  # 14,714,688 of VGG16's convolutions, 8,448 of its norms
    "fc6": 512 * 4096 * 49 + 4096,
    "bnfc6": 2 * 4096,
    "fc7": 4096 * 4096 + 4096,
    "bnfc7": 2 * 4096,
    "fc6_deconv": 4096 * 512 * 49 + 512,
    "fc6_deconv_bn": 2 * 512,
    "seg_score_voc": 64 * 21 + 21,
}
DECONVS = {
    5: (512, 512, 512, 512),
    4: (512, 512, 512, 256),
    3: (256, 256, 256, 128),
    2: (128, 128, 64),
    1: (64, 64, 64),
}


def test_golden_count():
    """Derived from the layers of the reference's stage_2_train.prototxt; the paper says "about 252M"."""
    count = lambda module: sum(p.numel() for p in module.parameters())
    with torch.device("meta"):
        model = DeconvNet(21)
    want = dict(PARTS)
    for i, widths in DECONVS.items():
        for k, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
            want |= {f"deconv{i}_{k}": 9 * inputs * outputs + outputs, f"debn{i}_{k}": 2 * outputs}
    got = {name: count(module) for name, module in model.named_children() if count(module)}
    assert got == want
    assert count(model) == sum(want.values()) == 251_805_653


def plain(model: DeconvNet, x: Tensor, training: bool) -> Tensor:
    """From the parameters of ``model``, with torch.nn.functional alone."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())

    def norm_relu(x: Tensor, name: str) -> Tensor:
        stats = (None, None) if training else (state[f"{name}.running_mean"], state[f"{name}.running_var"])
        return F.relu(F.batch_norm(x, *stats, state[f"{name}.weight"], state[f"{name}.bias"], training))

    tensors = lambda name: (state[f"{name}.weight"], state[f"{name}.bias"])
    memory, index = [], 0
    for convs in (2, 2, 3, 3, 3):
        for _ in range(convs):
            conv = F.conv2d(x, *tensors(f"encoder.features.{index}"), padding=1)
            x, index = norm_relu(conv, f"encoder.features.{index + 1}"), index + 3
        size = x.shape[2:]
        x, indices = F.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)
        memory.append((indices, size))
        index += 1
    height, width = x.shape[2:]
    K = model.bottleneck
    canvas = x.new_zeros(*x.shape[:2], max(K, height), max(K, width))
    canvas[:, :, :height, :width] = x
    x = norm_relu(F.conv2d(canvas, *tensors("fc6")), "bnfc6")
    x = norm_relu(F.conv2d(x, *tensors("fc7")), "bnfc7")
    x = norm_relu(F.conv_transpose2d(x, *tensors("fc6_deconv")), "fc6_deconv_bn")[:, :, :height, :width]
    for i, widths in DECONVS.items():
        indices, size = memory.pop()
        x = F.max_unpool2d(x, indices, 2, 2, output_size=size)
        for k in range(1, len(widths)):
            x = norm_relu(F.conv_transpose2d(x, *tensors(f"deconv{i}_{k}"), padding=1), f"debn{i}_{k}")
    return F.conv2d(x, *tensors("seg_score_voc"))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bottleneck", [2, 3], ids=["inside", "filled up"])
def test_equals_plain_pytorch(bottleneck, training, device):
    """Logits and gradients in fp64; 70x37 pools to 3x2, which a 2x2 bottleneck fits and a 3x3 one does not."""
    model = unsettle(DeconvNet(3, width=0.02, bottleneck=bottleneck)).to(device).train(training)
    x = torch.randn(2, 3, 70, 37, dtype=torch.float64, device=device)
    want = plain(model, x, training)
    upstream, learnt = torch.randn_like(want), list(model.parameters())
    with fastseg.reference():
        got = model(x)
        ours = torch.autograd.grad(got, learnt, upstream)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    for (name, _), a, b in zip(
        model.named_parameters(), ours, torch.autograd.grad(want, learnt, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8 * float(upstream.norm()), msg=name)
    if not training:
        with torch.no_grad(), fastseg.reference():
            torch.testing.assert_close(model(x), want, rtol=1e-9, atol=1e-10)  # folded
            torch.testing.assert_close(eager_form(model)(x), want, rtol=1e-9, atol=1e-10)


def test_the_papers_bottleneck_makes_one_vector():
    """224x224 pools to 7x7; of any smaller image the map is filled up, of a larger one there are several vectors."""
    model, sizes = DeconvNet(2, width=0.02).eval(), []
    model.fc7.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[2:])))
    with torch.no_grad(), fastseg.reference():
        for side in ((224, 224), (1, 9), (256, 300)):
            assert model(torch.zeros(1, 3, *side)).shape == (1, 2, *side)
    assert sizes == [(1, 1), (1, 1), (2, 4)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
def test_loads_torchvisions_file(tmp_path, layout):
    """A file laid out as torchvision's vgg16_bn: features, fc6 and fc7, not its last layer."""
    model, source = DeconvNet(3, width=0.02), unsettle(DeconvNet(3, width=0.02)).float()
    hidden, pixels = source.fc7.out_channels, source.fc6.weight[0].numel()
    file = source.encoder.state_dict() | {
        "classifier.0.weight": source.fc6.weight.detach().reshape(hidden, pixels),
        "classifier.0.bias": source.fc6.bias.detach(),
        "classifier.3.weight": source.fc7.weight.detach().reshape(hidden, hidden),
        "classifier.3.bias": source.fc7.bias.detach(),
        "classifier.6.weight": torch.zeros(5, hidden),
        "classifier.6.bias": torch.zeros(5),
    }
    torch.save(file, tmp_path / "vgg16_bn.pth")
    model = model.to(memory_format=layout)
    before = copy.deepcopy(model.state_dict())
    load_encoder_weights(model, tmp_path / "vgg16_bn.pth")
    want = source.state_dict()
    for key, value in model.state_dict().items():
        taken = key.startswith(("encoder.", "fc6.", "fc7."))
        assert torch.equal(value, want[key] if taken else before[key]), key


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bottleneck": 0}, "bottleneck is 0"), ({"num_classes": 0}, "DeconvNet: num_classes"), ({"width": 0}, "width")],
)
def test_bad_option(options, message):
    with pytest.raises(ValueError, match=message):
        create("deconvnet", **{"num_classes": 2, **options})


def test_fcn_in_channels_last_takes_fc6_and_fc7(tmp_path):
    """The same two layers of the file, through the same view of a 7x7 weight."""
    source, model = FCN(2, width=0.02), FCN(2, width=0.02).to(memory_format=torch.channels_last)
    torch.save({key: value.clone() for key, value in source.encoder_state().items()}, tmp_path / "vgg16.pth")
    load_encoder_weights(model, tmp_path / "vgg16.pth")
    assert torch.equal(model.fc6.weight, source.fc6.weight) and torch.equal(model.fc7.weight, source.fc7.weight)
