"""The losses of ``UpsampleLoss``, against torch's own lines on logits of full size."""

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg.losses import (
    OHEM,
    BinaryCrossEntropy,
    CrossEntropy,
    Dice,
    Focal,
    GeneralizedDice,
    Jaccard,
    Term,
    TopK,
    Tversky,
    parse_loss,
)
from fastseg.nn import UpsampleLoss
from fastseg.ops import upsample_loss
from fastseg.ops.core.loss_columns import Column

INF = float("inf")


def one_hot(target, classes, counts):
    return F.one_hot(target.where(counts, 0), classes).permute(0, 3, 1, 2) * counts[:, None]


def eager_overlap(v, target, alpha, beta, smooth, gamma=1.0, squared=False, batch=False, first=0, log=False):
    """1 - (I + s) / (I + a (P - I) + b (T - I) + s) by torch's own lines; targets of classes, 255 ignored."""
    counts = target != 255
    p, y = v.softmax(1) * counts[:, None], one_hot(target, v.shape[1], counts).to(v.dtype)
    dims = (0, 2, 3) if batch else (2, 3)
    inter = (p * y).sum(dims)
    P, T = ((p * p).sum(dims), (y * y).sum(dims)) if squared else (p.sum(dims), y.sum(dims))
    score = (inter + smooth) / (inter + alpha * (P - inter) + beta * (T - inter) + smooth)
    loss = (-score.log() if log else 1 - score) ** gamma
    return loss[..., first:].mean()


def eager_focal(v, target, gamma):
    counts = target != 255
    loss = F.cross_entropy(v, target, ignore_index=255, reduction="none")
    return ((1 - (-loss).exp()) ** gamma * loss)[counts].mean()


def eager_general(v, target, power):
    counts = target != 255
    p, y = v.softmax(1) * counts[:, None], one_hot(target, v.shape[1], counts).to(v.dtype)
    T = y.sum((2, 3))
    w = 1 / T**power
    return (1 - (2 * (w * (p * y).sum((2, 3))).sum(1) + 1e-5) / ((w * (p.sum((2, 3)) + T)).sum(1) + 1e-5)).mean()


def eager_topk(v, target, fraction):
    loss = F.cross_entropy(v, target, ignore_index=255, reduction="none")
    return loss.flatten().topk(int(fraction * int((target != 255).sum()))).values.mean()


def eager_ohem(v, target, threshold, kept):
    loss = F.cross_entropy(v, target, ignore_index=255, reduction="none")[target != 255]
    hard = loss[loss > -torch.tensor(threshold).log()]
    return (hard if len(hard) >= kept else loss.topk(kept).values).mean()


WEIGHT = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0, 1.5])
CASES = {
    "ce": (CrossEntropy(), lambda v, t: F.cross_entropy(v, t, ignore_index=255)),
    "ce weighted, smooth": (
        CrossEntropy(WEIGHT, label_smoothing=0.1),
        lambda v, t: F.cross_entropy(v, t, WEIGHT.to(v), ignore_index=255, label_smoothing=0.1),
    ),
    "ce sum": (CrossEntropy(reduction="sum"), lambda v, t: F.cross_entropy(v, t, ignore_index=255, reduction="sum")),
    "dice": (Dice(), functools.partial(eager_overlap, alpha=0.5, beta=0.5, smooth=0.5)),
    "dice squared, batch": (
        Dice(smooth=0.2, squared=True, batch=True, include_background=False),
        functools.partial(eager_overlap, alpha=0.5, beta=0.5, smooth=0.1, squared=True, batch=True, first=1),
    ),
    "jaccard, log": (Jaccard(log=True), functools.partial(eager_overlap, alpha=1, beta=1, smooth=1, log=True)),
    "tversky": (
        Tversky(0.3, 0.7, gamma=0.75),
        functools.partial(eager_overlap, alpha=0.3, beta=0.7, smooth=1, gamma=0.75),
    ),
    "focal": (Focal(2.0), functools.partial(eager_focal, gamma=2.0)),
    "focal 1.5": (Focal(1.5), functools.partial(eager_focal, gamma=1.5)),
    "generalised": (GeneralizedDice(), functools.partial(eager_general, power=2)),
    "generalised, simple": (GeneralizedDice("simple"), functools.partial(eager_general, power=1)),
    "topk": (TopK(0.3), functools.partial(eager_topk, fraction=0.3)),
    "ohem": (OHEM(0.3, 5), functools.partial(eager_ohem, threshold=0.3, kept=5)),
    "ohem, few": (OHEM(1e-9, 40), functools.partial(eager_ohem, threshold=1e-9, kept=40)),
}


@pytest.fixture(params=[False, True], ids=["full", "rows"])
def by_rows(request, monkeypatch):
    """On a CPU: torch's own steps, or strips of rows, which large maps take."""
    for name in ("_LEAST", "_PLANE"):
        monkeypatch.setattr(upsample_loss_sums_module(), name, 0 if request.param else 2**62)
    monkeypatch.setattr(upsample_loss_sums_module(), "_MANY", 0)
    return request.param


def upsample_loss_sums_module():
    return sys.modules["fastseg.ops.cpu.loss_sums"]


def inputs(classes=6, size=(37, 9), dtype=torch.float64, low=(4, 5), device="cpu"):
    logits = 2 * torch.randn(2, classes, *low, dtype=dtype, device=device)
    target = torch.randint(classes, (2, *size), device=device)
    return logits.requires_grad_(), target.masked_fill(torch.rand(2, *size, device=device) < 0.2, 255)


def same(ours, eager, logits, target, align_corners=False, tight=True):
    full = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=align_corners)
    want = eager(full, target)
    got = upsample_loss(logits, target, [(1.0, ours)], ignore_index=255, align_corners=align_corners)
    value, slope = (1e-10, 1e-9) if tight else (2e-6, 2e-6)
    torch.testing.assert_close(got, want, rtol=value, atol=value)
    grads = (torch.autograd.grad(loss, logits)[0] for loss in (got, want))
    torch.testing.assert_close(*grads, rtol=slope, atol=slope)


@pytest.mark.usefixtures("by_rows")
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    with fastseg.reference():
        same(*CASES[name], *inputs(), align_corners=name == "dice")


@pytest.mark.usefixtures("by_rows")
@pytest.mark.parametrize("classes", [1, 2, 21])
def test_classes(classes):
    with fastseg.reference():
        for name in ("ce", "dice", "focal"):
            same(*CASES[name], *inputs(classes))


def eager_binary(v, target, counts, **options):
    return F.binary_cross_entropy_with_logits(v, target.clamp(0, 1), reduction="none", **options)[counts].mean()


@pytest.mark.usefixtures("by_rows")
@pytest.mark.parametrize("channels", [1, 3])
def test_binary(channels):
    """One channel and several, labels of 0 and 1 of which some do not count, (N, H, W) for one channel too."""
    logits, _ = inputs(channels)
    target = torch.randint(2, (2, channels, 37, 9)).masked_fill(torch.rand(2, channels, 37, 9) < 0.2, 255)
    counts, y = target != 255, target.double()
    pos = torch.linspace(0.5, 2, channels, dtype=torch.float64)
    p = lambda v: v.sigmoid() * counts
    dice = lambda v: (1 - (2 * (p(v) * y * counts).sum((2, 3)) + 1) / (p(v) + y * counts + 0).sum((2, 3)).add(1)).mean()
    for ours, eager in (
        (BinaryCrossEntropy(), lambda v, t: eager_binary(v, y, counts)),
        (BinaryCrossEntropy(pos_weight=pos), lambda v, t: eager_binary(v, y, counts, pos_weight=pos[:, None, None])),
        (BinaryCrossEntropy(label_smoothing=0.2), lambda v, t: eager_binary(v, 0.8 * y.clamp(0, 1) + 0.1, counts)),
        (Dice(activation="sigmoid"), lambda v, t: dice(v)),
        (
            Focal(2.0, 0.25, activation="sigmoid"),
            lambda v, t: (
                torch.where(y == 1, 0.25 * v.sigmoid().neg().add(1) ** 2, 0.75 * v.sigmoid() ** 2)
                * F.binary_cross_entropy_with_logits(v, y.clamp(0, 1), reduction="none")
            )[counts].mean(),
        ),
    ):
        with fastseg.reference():
            same(ours, eager, logits, target[:, 0] if channels == 1 else target)


@pytest.mark.usefixtures("by_rows")
def test_probabilities():
    """Targets between 0 and 1, as torch's cross entropies take them."""
    logits, _ = inputs(5)
    target = torch.rand(2, 5, 37, 9, dtype=torch.float64).softmax(1)
    with fastseg.reference():
        for smooth in (0.0, 0.1):
            same(CrossEntropy(label_smoothing=smooth), functools.partial(F.cross_entropy, label_smoothing=smooth),
                 logits, target)  # fmt: skip
        same(BinaryCrossEntropy(), F.binary_cross_entropy_with_logits, logits, target)


@pytest.mark.usefixtures("by_rows")
def test_weighted_sum_and_pixel_weights():
    logits, target = inputs()
    weight = torch.rand(2, 37, 9, dtype=torch.float64)
    full = F.interpolate(logits, (37, 9), mode="bilinear")
    losses = F.cross_entropy(full, target, ignore_index=255, reduction="none") * weight
    counts = (target != 255) * weight
    p, y = full.softmax(1) * counts[:, None], one_hot(target, 6, target != 255) * counts[:, None]
    dice = (1 - (2 * (full.softmax(1) * y).sum((2, 3)) + 1) / ((p + y).sum((2, 3)) + 1)).mean()
    want = 0.5 * losses.sum() / counts.sum() + 2 * dice
    with fastseg.reference():
        got = UpsampleLoss([(0.5, CrossEntropy(ignore_index=255)), (2, Dice())])(logits, target, weight)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (got, want)), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("by_rows")
def test_heads():
    """Logits of several resolutions and one target: the weighted sum of each head's loss."""
    terms, target = [(1.0, CrossEntropy()), (1.0, Dice())], inputs()[1]
    heads = [torch.randn(2, 6, *low, dtype=torch.float64, requires_grad=True) for low in ((4, 5), (8, 9), (37, 9))]
    with fastseg.reference():
        got = UpsampleLoss(terms, ignore_index=255, head_weights=[0.5, 0.25, 1.0])(heads, target)
        each = [upsample_loss(head, target, terms, ignore_index=255) for head in heads]
    torch.testing.assert_close(got, 0.5 * each[0] + 0.25 * each[1] + each[2])
    got.backward()
    torch.testing.assert_close(heads[1].grad, 0.25 * torch.autograd.grad(each[1], heads[1])[0])


def test_all_ignored():
    """Cross entropy as torch: NaN with a gradient of 0; overlap 0 with smoothing, and so is its gradient."""
    logits, target = inputs()
    target.fill_(255)
    for term, value in ((CrossEntropy(), None), (Focal(), None), (Dice(), 0.0), (TopK(), 0.0), (OHEM(), 0.0)):
        loss = upsample_loss(logits, target, [(1.0, term)], ignore_index=255)
        assert loss.isnan() if value is None else loss == value
        assert not torch.autograd.grad(loss, logits)[0].any()


def test_absent_classes():
    logits, target = inputs()
    target[0] = target[0].masked_fill(target[0] == 3, 0)
    everything = upsample_loss(logits, target, [(1.0, Dice(smooth=0.0))], ignore_index=255)
    present = upsample_loss(logits, target, [(1.0, Dice(smooth=0.0, skip_absent=True))], ignore_index=255)
    torch.testing.assert_close(everything * 12, present * 11 + 1)  # the absent class of one image loses 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(dtype):
    logits, target = inputs(dtype=torch.float32)
    half = logits.detach().to(dtype).requires_grad_()
    loss = UpsampleLoss([(1.0, CrossEntropy()), (1.0, Dice())], ignore_index=255)
    value, want = loss(half, target), loss(half.detach().double().requires_grad_(), target)
    assert value.dtype == torch.float32 and want.dtype == torch.float64
    torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad(value, half)[0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_labels_of_every_dtype(dtype):
    logits, target = inputs()
    loss = UpsampleLoss([(1.0, CrossEntropy()), (1.0, Dice())], ignore_index=255)
    torch.testing.assert_close(loss(logits, target.to(dtype)), loss(logits, target))


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
def test_what_is_not_finite(value):
    """As torch: a large map too, which else is walked in strips."""
    logits = torch.randn(1, 6, 30, 30, dtype=torch.float64)
    logits[0, 2, 7, 7] = value
    target = torch.randint(6, (1, 300, 300))
    full = F.interpolate(logits, (300, 300), mode="bilinear")
    want = F.cross_entropy(full, target)
    got = upsample_loss(logits, target, [(1.0, CrossEntropy())])
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.usefixtures("by_rows")
def test_second_derivative():
    logits, target = inputs()
    with fastseg.reference():
        loss = upsample_loss(logits, target, [(1.0, Dice())], ignore_index=255)
    full = F.interpolate(logits, target.shape[1:], mode="bilinear")
    want = eager_overlap(full, target, 0.5, 0.5, 0.5)
    seconds = []
    for value in (loss, want):
        (grad,) = torch.autograd.grad(value, logits, create_graph=True)
        seconds.append(torch.autograd.grad((grad**2).sum(), logits)[0])
    torch.testing.assert_close(*seconds)


def test_compiled_and_functorch():
    logits, target = inputs(dtype=torch.float32)
    loss = UpsampleLoss([(1.0, CrossEntropy()), (1.0, Dice())], ignore_index=255)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, target), loss(logits, target))
    grads = (torch.func.grad(lambda x: loss(x, target))(logits), torch.autograd.grad(loss(logits, target), logits)[0])
    torch.testing.assert_close(*grads)


def test_a_loss_of_ones_own():
    """``columns`` and ``value`` are all: here the mean probability of class 1, and its gradient."""

    class Quiet(Term):
        def columns(self):
            return [Column("prob")]

        def value(self, table):
            return table("prob")[:, 1].sum() / (table.images * table.pixels)

    logits, target = inputs()
    got = upsample_loss(logits, target.clamp(max=5), [(1.0, Quiet())])
    full = F.interpolate(logits, target.shape[1:], mode="bilinear")
    torch.testing.assert_close(got, full.softmax(1)[:, 1].mean())


def test_class_weights_learn_too():
    logits, target = inputs()
    term = CrossEntropy(torch.ones(6, dtype=torch.float64, requires_grad=True))
    upsample_loss(logits, target, [(1.0, term)], ignore_index=255).backward()
    assert term.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("message", "error", "call"), [
    ("Target 6 is out of bounds", IndexError, lambda x, t: upsample_loss(x, t + 1, [(1.0, Dice(ignore_index=256))])),
    ("Target 2 is out of bounds", IndexError,
     lambda x, t: upsample_loss(x[:, :1], 0 * t + 2, [(1.0, BinaryCrossEntropy())])),
    ("weight is .5,.; give a factor for each of 6", ValueError,
     lambda x, t: upsample_loss(x, t, [(1.0, CrossEntropy(torch.ones(5)))], ignore_index=255)),
    ("give class indices .N, H, W., or labels for each of 6", ValueError,
     lambda x, t: upsample_loss(x, t[:, None].expand(-1, 5, -1, -1), [(1.0, Dice())])),
    ("logits are .2, 6, 4, 5. and target is .1, 37, 9.", ValueError,
     lambda x, t: upsample_loss(x, t[:1], [(1, Dice())])),
    ("there is no pixel", ValueError, lambda x, t: upsample_loss(x, t[:, :0], [(1, Dice())])),
    ("logits are torch.int64", TypeError, lambda x, t: upsample_loss(x.long(), t, [(1, Dice())])),
    ("target is torch.float32; give class indices", TypeError, lambda x, t: upsample_loss(x, t.float(), [(1, Dice())])),
    ("pixel_weight is .2, 37.", ValueError,
     lambda x, t: upsample_loss(x, t, [(1, Dice())], pixel_weight=torch.ones(2, 37))),
    ("there are 0 terms", ValueError, lambda x, t: upsample_loss(x, t, [])),
    ("give 2, one for each head", ValueError,
     lambda x, t: upsample_loss([x, x], t, [(1, Dice())], head_weights=[1.0])),
    ("terms are", ValueError, lambda x, t: UpsampleLoss([Dice()])),
    ("label_smoothing is 2", ValueError, lambda x, t: CrossEntropy(label_smoothing=2)),
    ("reduction is 'none'", ValueError, lambda x, t: CrossEntropy(reduction="none")),
    ("activation is 'tanh'", ValueError, lambda x, t: Dice(activation="tanh")),
    ("fraction is 0", ValueError, lambda x, t: TopK(0)),
    ("'mse' is no loss; join ce, dice", ValueError, lambda x, t: parse_loss("ce+mse")),
    ("'-1.dice' is no loss", ValueError, lambda x, t: parse_loss("-1*dice")),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_bad_arguments(message, error, call):
    logits, target = inputs()
    target = target.clamp(max=5) if "out of bounds" in message else target
    with pytest.raises(error, match=message):
        call(logits, target)


def test_names():
    terms = parse_loss("ce+0.5*dice", weight=torch.ones(6))
    assert [(weight, type(term)) for weight, term in terms] == [(1.0, CrossEntropy), (0.5, Dice)]
    assert terms[0][1].weight is not None and terms[1][1].weight is None


def test_moves_with_its_module():
    loss = UpsampleLoss([(1.0, CrossEntropy(torch.ones(6)))])
    assert loss.to(torch.float64).losses[0].weight.dtype == torch.float64
    assert loss.to("meta").losses[0].weight.is_meta


_PEAK = """
import resource, torch, torch.nn.functional as F
torch.set_num_threads(1)
from fastseg.losses import CrossEntropy, Dice
from fastseg.ops import upsample_loss

def ours(x, t):
    return upsample_loss(x, t, [(1.0, CrossEntropy()), (1.0, Dice())])

def eager(x, t):
    v = F.interpolate(x, t.shape[1:], mode="bilinear")
    p, y = v.softmax(1), F.one_hot(t.long(), 150).permute(0, 3, 1, 2)
    dice = (1 - (2 * (p * y).sum((2, 3)) + 1) / ((p + y).sum((2, 3)) + 1)).mean()
    return F.cross_entropy(v, t.long()) + dice

logits = torch.randn(1, 150, 48, 48, requires_grad=True)
target = torch.randint(150, (1, 192, 192), dtype=torch.uint8)
for loss in (ours, eager):
    loss(torch.randn(1, 150, 16, 16, requires_grad=True), target[:, :64, :64]).backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for loss in (ours, eager):
    before = peak()
    loss(logits, target).backward()
    print(peak() - before)
"""


def test_peak_memory_is_a_quarter_of_eagers():
    """In a process of its own, of 150 classes; eager comes last, as a peak never falls."""
    plain = {**os.environ, "TRITON_INTERPRET": "0"}  # the CPU's own form
    done = subprocess.run([sys.executable, "-P", "-c", _PEAK], capture_output=True, text=True, timeout=300, env=plain)
    assert done.returncode == 0, done.stderr
    ours, eager = map(int, done.stdout.split())
    assert ours <= (ours + eager) / 4
