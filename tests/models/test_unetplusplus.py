"""UNet++: golden counts, the nets written with torch alone, deep supervision, pruning, errors."""

import copy
import math

import pytest
import torch
from nets import unsettle
from torch import Tensor, nn
from torch.nn import functional as F

import fastseg
from fastseg.measure.comparison import eager_form
from fastseg.models import UNetPlusPlus, create, fading_weights
from fastseg.models.unetplusplus import mean_of_sigmoids

WIDTHS = (4, 6, 8, 10)
FORMS = {
    "authors": {},
    "bilinear": {"up": "bilinear"},
    "norm": {"norm": True},
    "norm, bilinear": {"norm": True, "up": "bilinear"},
}
EACH = pytest.mark.parametrize("form", FORMS)


def narrow(form: str, **options) -> UNetPlusPlus:
    """fp64, deep supervision; norms that are not the identity, biases that are not 0, no dropout."""
    options = {"widths": WIDTHS, "deep_supervision": True, "dropout": 0.0, **FORMS[form], **options}
    return unsettle(UNetPlusPlus(3, **options))


def image(sides: tuple[int, int] = (22, 13)) -> Tensor:
    """Sides that are odd on the way down: 22x13, 11x6, 5x3, 2x1 of three levels."""
    return torch.randn(2, 3, *sides, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "levels", "all_heads"),
    [
        ({"in_channels": 1}, (100_961, 511_105, 2_204_961, 9_041_601), 9_041_700),
        ({"norm": True, "up": "bilinear"}, (103_041, 519_105, 2_236_161, 9_163_329), 9_163_428),
    ],
    ids=["authors", "norm, bilinear"],
)
def test_golden_counts(options, levels, all_heads):
    count = lambda model: sum(p.numel() for p in model.parameters())
    with torch.device("meta"):
        model = UNetPlusPlus(1, **options, deep_supervision=True)
        assert count(model) == all_heads
        assert tuple(count(model.prune(level)) for level in (1, 2, 3, 4)) == levels
        assert count(UNetPlusPlus(1, **options)) == levels[-1]


def test_names():
    """Those of 4uiiurz1's pytorch-nested-unet; the transposed convolutions, which it has not, are up{i}_{j}."""
    with torch.device("meta"):
        state = UNetPlusPlus(2, norm=True, up="bilinear").state_dict()
        authors = UNetPlusPlus(2, deep_supervision=True).state_dict()
    nodes = [f"{i}_{j}" for i in range(5) for j in range(5 - i)]
    convs = {f"conv{node}.conv{k}.{part}" for node in nodes for k in (1, 2) for part in ("weight", "bias")}
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    norms = {f"conv{node}.bn{k}.{part}" for node in nodes for k in (1, 2) for part in parts}
    assert state.keys() == convs | norms | {"final.weight", "final.bias"}
    extra = [*(f"up{node}" for node in nodes if not node.endswith("_0")), *(f"final{k}" for k in (1, 2, 3, 4))]
    assert authors.keys() == convs | {f"{name}.{part}" for name in extra for part in ("weight", "bias")}
    assert tuple(state["conv0_4.conv1.weight"].shape) == (32, 4 * 32 + 64, 3, 3)
    assert tuple(authors["conv0_4.conv1.weight"].shape) == (32, 5 * 32, 3, 3)


def plain(model: UNetPlusPlus, x: Tensor, form: str, training: bool) -> list[Tensor]:
    """All heads from the tensors of ``model``, with torch.nn.functional alone; running statistics stay as they are."""
    options, state = FORMS[form], dict(model.named_parameters()) | dict(model.named_buffers())

    def node(name: str, x: Tensor) -> Tensor:
        for k in (1, 2):
            x = F.conv2d(x, state[f"{name}.conv{k}.weight"], state[f"{name}.conv{k}.bias"], padding=1)
            if options.get("norm"):
                key = f"{name}.bn{k}"
                stats = (None, None) if training else (state[f"{key}.running_mean"], state[f"{key}.running_var"])
                x = F.batch_norm(x, *stats, state[f"{key}.weight"], state[f"{key}.bias"], training)
            x = F.relu(x)
        return x

    X: dict[tuple[int, int], Tensor] = {}
    for i in range(len(WIDTHS)):
        X[i, 0] = node(f"conv{i}_0", x if i == 0 else F.max_pool2d(X[i - 1, 0], 2))
    for j in range(1, len(WIDTHS)):
        for i in range(len(WIDTHS) - j):
            below, earlier = X[i + 1, j - 1], [X[i, k] for k in range(j)]
            if options.get("up") == "bilinear":
                up = F.interpolate(below, scale_factor=2, mode="bilinear", align_corners=True)
            else:
                up = F.conv_transpose2d(below, state[f"up{i}_{j}.weight"], state[f"up{i}_{j}.bias"], stride=2)
            size = earlier[0].shape[2:]
            up = F.pad(up, (0, size[1] - up.shape[3], 0, size[0] - up.shape[2]))
            X[i, j] = node(
                f"conv{i}_{j}", torch.cat([*earlier, up] if options.get("up") == "bilinear" else [up, *earlier], 1)
            )
    return [F.conv2d(X[0, j], state[f"final{j}.weight"], state[f"final{j}.bias"]) for j in range(1, len(WIDTHS))]


@pytest.mark.parametrize(
    ("form", "kernels"), [*((form, False) for form in FORMS), ("authors", True), ("norm, bilinear", True)], ids=str
)
def test_training_equals_plain_pytorch(form, kernels, device):
    """Every head, and the gradients of their weighted losses."""
    sides = (11, 9) if kernels else (22, 13)
    model, x = narrow(form).to(device), image(sides).to(device)
    target, weights = torch.randint(3, (2, *sides), device=device), (0.5, 0.0, 2.0)
    want = plain(model, x, form, True)
    learnt = list(model.parameters())
    with torch.enable_grad() if kernels else fastseg.reference():
        for got, head in zip(model(x), want, strict=True):
            torch.testing.assert_close(got, head, rtol=1e-9, atol=1e-10)
        loss = model.loss(x, target, weights)
        ours = torch.autograd.grad(loss, learnt)
    theirs = sum(w * F.cross_entropy(head, target) for w, head in zip(weights, want, strict=True))
    torch.testing.assert_close(loss, theirs, rtol=1e-9, atol=1e-10)
    for (name, _), a, b in zip(model.named_parameters(), ours, torch.autograd.grad(theirs, learnt), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10, msg=name)
    without = [name for (name, _), g in zip(model.named_parameters(), ours, strict=True) if not g.any()]
    assert all(name.startswith("final2") or name.endswith("bias") for name in without)  # before norm: only rounding


@EACH
def test_modes(form):
    """In evaluation "accurate" is the mean of the heads' sigmoids, or of their logits; "fast" the last head."""
    model, x = narrow(form).eval(), image()
    others = [narrow(form, mode="fast").eval(), narrow(form, average="logits").eval()]
    for other in others:
        other.load_state_dict(model.state_dict())
    fast, logits = others
    with torch.no_grad(), fastseg.reference():
        heads = plain(model, x, form, False)
        probabilities = torch.stack(heads).sigmoid().mean(0)
        mean = (probabilities / (1 - probabilities)).log()
        torch.testing.assert_close(eager_form(model)(x), mean, rtol=1e-9, atol=1e-10)
        for net, want in ((model, mean), (fast, heads[-1]), (logits, torch.stack(heads).mean(0))):
            torch.testing.assert_close(net(x), want, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(net.logits(x), want, rtol=1e-9, atol=1e-10)
            assert torch.equal(net.predict(x).long(), want.argmax(1))
            target = torch.randint(3, (2, 22, 13))
            torch.testing.assert_close(net.loss(x, target), F.cross_entropy(want, target))
        torch.testing.assert_close(model(x).sigmoid(), probabilities, rtol=1e-9, atol=1e-10)
        assert not torch.equal(model.predict(x), logits.predict(x))  # they are not the same
        assert model.prune(3).average == "probabilities" and logits.prune(3).average == "logits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mean_of_sigmoids_of_large_logits(dtype):
    """Where a sigmoid rounds to 0 or 1 the logits go on: the sigmoid of -z is e^-z there."""
    first, second = torch.tensor([-60.0, 60.0, -1000.0, 1000.0, 2.0]), torch.tensor([-60.0, 62.0, -1001.0, 3.0, -2.0])
    rare = 1 / (1 + math.exp(3)) / 2
    want = [-60, 60 - math.log((1 + math.exp(-2)) / 2), -1000 + math.log((1 + math.exp(-1)) / 2),
            math.log((1 - rare) / rare), 0.0]  # fmt: skip
    got = mean_of_sigmoids([first.to(dtype), second.to(dtype)])
    assert got.dtype == dtype
    assert got.tolist() == pytest.approx(want, rel=1e-5 if dtype == torch.float32 else 1e-2, abs=1e-5)


def test_the_losss_weights():
    model, x = narrow("norm"), image()
    target = torch.randint(3, (2, 22, 13))
    with fastseg.reference():
        each = torch.stack([F.cross_entropy(logits, target) for logits in model(x)])
        torch.testing.assert_close(model.loss(x, target), each.mean())
        assert model.loss(x, target) > F.cross_entropy(torch.stack(model(x)).mean(0), target)  # not of the mean
        fading = fading_weights(3, progress=0.75, auxiliary=0.4)
        assert fading == pytest.approx([0.1, 0.1, 1.0])
        torch.testing.assert_close(model.loss(x, target, fading), 0.1 * each[0] + 0.1 * each[1] + each[2])
        torch.testing.assert_close(model.loss(x, target, fading_weights(3, 1.0)), each[2])
        with pytest.raises(ValueError, match=r"weights are \(1, 2\); give 3, one for each head"):
            model.loss(x, target, (1, 2))
        with pytest.raises(ValueError, match="deep_supervision is off"):
            model.prune(2).loss(x, target, (1,))
    with pytest.raises(ValueError, match=r"progress is 1.5; it must lie in \[0, 1\]"):
        fading_weights(4, 1.5)


@EACH
@pytest.mark.parametrize("level", [1, 2, 3])
def test_pruned_net_is_the_head(form, level):
    model, x = narrow(form).eval(), image()
    random = torch.get_rng_state()
    pruned = model.prune(level)
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad(), fastseg.reference():
        head = model._branches(x, model._heads())[level - 1]
        assert torch.equal(pruned(x), head)
        torch.testing.assert_close(head, plain(model, x, form, False)[level - 1], rtol=1e-9, atol=1e-10)
    # Only what it needs, as a net that can be built without the large one; and nothing shared with that.
    twin = create("unetplusplus", 3, **FORMS[form], widths=WIDTHS[: level + 1]).double().eval()
    twin.load_state_dict(pruned.state_dict())
    assert not pruned.training and not any(p.is_meta for p in pruned.parameters())
    with torch.no_grad(), fastseg.reference():
        assert torch.equal(twin(x), head)
        for parameter in pruned.parameters():
            parameter.zero_()
        assert torch.equal(model._branches(x, model._heads())[level - 1], head)


def test_pruned_net_trains_and_prunes_further():
    model = narrow("norm").train()
    pruned = model.prune(3)
    assert pruned.training
    with fastseg.reference():
        pruned.loss(image(), torch.randint(3, (2, 22, 13))).backward()
    assert all(p.grad is not None for p in pruned.parameters())
    assert all(p.grad is None for p in model.parameters())
    copied = copy.deepcopy(pruned).prune(3)
    assert copied.state_dict().keys() == pruned.state_dict().keys()


@pytest.mark.parametrize(
    ("level", "options", "message"),
    [
        (0, {}, "prune: level is 0; use 1 to 3"),
        (4, {}, "prune: level is 4; use 1 to 3"),
        (2, {"deep_supervision": False}, "level 2 has no head; build with deep_supervision=True"),
    ],
)
def test_bad_level(level, options, message):
    with pytest.raises(ValueError, match=message):
        narrow("norm", **options).prune(level)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "UNetPlusPlus: num_classes is 0"),
        ({"mode": "slow"}, "UNetPlusPlus: mode is 'slow'; use"),
        ({"average": "votes"}, "UNetPlusPlus: average is 'votes'; use"),
        ({"up": "nearest"}, "UNetPlusPlus: up is 'nearest'; use"),
        ({"widths": ()}, r"UNetPlusPlus: widths are \(\); give two or more"),
    ],
)
def test_bad_option(options, message):
    with pytest.raises(ValueError, match=message):
        create("unetplusplus", **{"num_classes": 2, **options})


def test_bad_size():
    with torch.device("meta"), pytest.raises(ValueError, match=r"x is \(1, 3, 15, 64\); a side of 16 pixels or more"):
        UNetPlusPlus(2)(torch.empty(1, 3, 15, 64))


def test_authors_dropout_follows_each_relu():
    model = UNetPlusPlus(2, widths=(8, 8))
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.5] * 3
    assert {m.p for m in UNetPlusPlus(2, norm=True).modules() if isinstance(m, nn.Dropout)} == {0.0}
    zeros = []
    for conv in (model.conv0_0.conv2, model.conv0_1.conv1, model.conv0_1.conv2):
        conv.register_forward_pre_hook(lambda module, args: zeros.append(float((args[0] == 0).double().mean())))
    with fastseg.reference():
        model(torch.randn(1, 3, 64, 64))
    # ReLU zeroes about half, dropout half of the rest; half of what conv0_1 sees comes out of a convolution instead.
    assert zeros == pytest.approx([0.75, 0.375, 0.75], abs=0.1)
