"""Losses, and what comes after the logits: fastseg's call of small logits beside torch's steps as people write them.

``loss_memory`` and ``losses_cpu`` run these. Torch's steps are ``interpolate``, then the loss of logits of full size.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg import losses, ops

Logits = Tensor | list[Tensor]
HEADS = (1.0, 0.5, 0.25)  # weights of deep supervision; each head has half the resolution of the one before


class Case(NamedTuple):
    """What is compared: fastseg's call of small logits, torch's of logits of full size."""

    ours: Callable[[Logits, Tensor], object]
    theirs: Callable[[Tensor, Tensor], object]
    each: bool = False  # labels for each class
    trains: bool = True
    volume: bool = False
    heads: tuple[float, ...] = (1.0,)
    one: bool = False  # of one channel only
    several: bool = False  # of two classes and more


def _term(*terms: losses.Term, **options) -> Callable[[Logits, Tensor], Tensor]:
    return lambda x, y: ops.upsample_loss(x, y, [(1.0, term) for term in terms], **options)


def _overlap(v: Tensor, y: Tensor, alpha: float = 0.5, *, each: bool = False) -> Tensor:
    """Dice (alpha = 1/2) or Jaccard (1) of an image and class."""
    p = v.sigmoid() if each else v.softmax(1)
    y = y if each else F.one_hot(y.long(), v.shape[1]).movedim(-1, 1)
    dims = tuple(range(2, v.dim()))
    inter, both = (p * y).sum(dims), (p + y).sum(dims)
    return (1 - (inter + 1) / (inter + alpha * (both - 2 * inter) + 1)).mean()


def _tversky(v: Tensor, y: Tensor, gamma: float = 1.0) -> Tensor:
    """alpha 0.3 of false positives, beta 0.7 of false negatives."""
    p, y = v.softmax(1), F.one_hot(y.long(), v.shape[1]).movedim(-1, 1)
    inter = (p * y).sum((2, 3))
    wrong = 0.3 * (p * (1 - y)).sum((2, 3)) + 0.7 * ((1 - p) * y).sum((2, 3))
    return ((1 - (inter + 1) / (inter + wrong + 1)) ** gamma).mean()


def _general(v: Tensor, y: Tensor) -> Tensor:
    p, y = v.softmax(1), F.one_hot(y.long(), v.shape[1]).movedim(-1, 1)
    w = 1 / (y.sum((2, 3)).double() ** 2 + 1e-9)
    return (1 - 2 * (w * (p * y).sum((2, 3))).sum(1) / (w * (p + y).sum((2, 3))).sum(1)).mean()


def _entropies(v: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(v, y.long(), reduction="none")


def _focal(v: Tensor, y: Tensor) -> Tensor:
    loss = _entropies(v, y)
    return ((1 - (-loss).exp()) ** 2 * loss).mean()


def _binary_focal(v: Tensor, y: Tensor) -> Tensor:
    y = y.to(v.dtype)
    loss = F.binary_cross_entropy_with_logits(v, y, reduction="none")
    return ((0.25 * y + 0.75 * (1 - y)) * (1 - (-loss).exp()) ** 2 * loss).mean()


def _topk(v: Tensor, y: Tensor) -> Tensor:
    loss = _entropies(v, y).flatten()
    return loss.topk(len(loss) // 10).values.mean()


def _ohem(v: Tensor, y: Tensor) -> Tensor:
    loss = _entropies(v, y).flatten()
    return loss[(loss > 0.3567) | (loss >= loss.detach().topk(min(1000, len(loss))).values[-1])].mean()


def _binary(v: Tensor, y: Tensor, **options) -> Tensor:
    return F.binary_cross_entropy_with_logits(v, y.to(v.dtype), **options)


def _ce(v: Tensor, y: Tensor, **options) -> Tensor:
    return F.cross_entropy(v, y.long(), **options)


def _weights(classes: int) -> Tensor:
    return torch.linspace(0.5, 1.5, classes)


def _confusion(v: Tensor, y: Tensor) -> Tensor:
    return torch.bincount((y.long() * v.shape[1] + v.argmax(1)).flatten(), minlength=v.shape[1] ** 2)


def _margin(v: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    values, classes = v.softmax(1).topk(2, 1)
    return classes[:, 0], values[:, 0] - values[:, 1]


def _entropy(v: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    log_p = v.log_softmax(1)
    return v.argmax(1), -(log_p.exp() * log_p).sum(1)


def _same(y: Tensor) -> tuple[int, ...]:
    return tuple(y.shape[-3:] if y.dim() == 5 else y.shape[1:])


def _loss(*terms: losses.Term, **options) -> dict:
    return {"ours": _term(*terms), **options}


_measured = lambda measure: lambda x, y: ops.upsample_confidence(x, _same(y), measure=measure)
_most = lambda x, y: ops.upsample_topk(x, min(3, x.shape[1]), _same(y))

CASES: dict[str, Case] = {
    "ce": Case(lambda x, y: ops.upsample_cross_entropy(x, y), _ce),
    "ce, ignored": Case(
        lambda x, y: ops.upsample_cross_entropy(x, y, None, 0), lambda v, y: _ce(v, y, ignore_index=0)
    ),
    "ce, weights and smoothing": Case(
        lambda x, y: ops.upsample_cross_entropy(x, y, _weights(x.shape[1]), label_smoothing=0.1),
        lambda v, y: _ce(v, y, weight=_weights(v.shape[1]), label_smoothing=0.1),
    ),
    "ce + dice": Case(_term(losses.CrossEntropy(), losses.Dice()), lambda v, y: _ce(v, y) + _overlap(v, y)),
    "dice": Case(_term(losses.Dice()), _overlap),
    "jaccard": Case(_term(losses.Jaccard()), lambda v, y: _overlap(v, y, 1.0)),
    "tversky": Case(_term(losses.Tversky(0.3, 0.7)), _tversky),
    "tversky, focal": Case(_term(losses.Tversky(0.3, 0.7, 0.75)), lambda v, y: _tversky(v, y, 0.75)),
    "generalised dice": Case(_term(losses.GeneralizedDice()), _general),
    "focal": Case(_term(losses.Focal()), _focal),
    "topk": Case(_term(losses.TopK(0.1)), _topk),
    "ohem": Case(_term(losses.OHEM(0.7, 1000)), _ohem),
    "ce, three heads": Case(_term(losses.CrossEntropy(), head_weights=HEADS), _ce, heads=HEADS),
    "ce + dice, three heads": Case(
        _term(losses.CrossEntropy(), losses.Dice(), head_weights=HEADS),
        lambda v, y: _ce(v, y) + _overlap(v, y),
        heads=HEADS,
    ),
    "bce, each class": Case(_term(losses.BinaryCrossEntropy()), _binary, each=True),
    "focal, each class": Case(_term(losses.Focal(alpha=0.25, activation="sigmoid")), _binary_focal, each=True),
    "dice, each class": Case(
        _term(losses.Dice(activation="sigmoid")), lambda v, y: _overlap(v, y, each=True), each=True
    ),
    "bce + dice, each class": Case(
        _term(losses.BinaryCrossEntropy(), losses.Dice(activation="sigmoid")),
        lambda v, y: _binary(v, y) + _overlap(v, y, each=True),
        each=True,
    ),
    "argmax": Case(lambda x, y: ops.upsample_argmax(x, _same(y)), lambda v, y: v.argmax(1), trains=False),
    "argmax, confidence": Case(
        lambda x, y: ops.upsample_argmax(x, _same(y), confidence=True), lambda v, y: v.softmax(1).max(1), trains=False
    ),
    "confidence": Case(_measured("probability"), lambda v, y: v.softmax(1).max(1), trains=False),
    "margin": Case(_measured("margin"), _margin, trains=False, several=True),
    "entropy": Case(_measured("entropy"), _entropy, trains=False),
    "topk classes": Case(_most, lambda v, y: v.softmax(1).topk(min(3, v.shape[1]), 1), trains=False),
    "threshold": Case(
        lambda x, y: ops.upsample_threshold(x, _same(y)), lambda v, y: v.sigmoid() > 0.5, trains=False, one=True
    ),
    "confusion": Case(lambda x, y: ops.upsample_confusion(x, y, x.shape[1]), _confusion, trains=False),
    "ce, volume": Case(lambda x, y: ops.upsample_cross_entropy(x, y), _ce, volume=True),
    "ce + dice, volume": Case(
        _term(losses.CrossEntropy(), losses.Dice()), lambda v, y: _ce(v, y) + _overlap(v, y), volume=True
    ),
    "topk, volume": Case(_term(losses.TopK(0.1)), _topk, volume=True),
    "argmax, volume": Case(
        lambda x, y: ops.upsample_argmax(x, _same(y)), lambda v, y: v.argmax(1), trains=False, volume=True
    ),
    "confidence, volume": Case(
        _measured("probability"), lambda v, y: v.softmax(1).max(1), trains=False, volume=True
    ),
}  # fmt: skip


def inputs(case: Case, N: int, C: int, side: int, stride: int) -> tuple[list[Tensor], Tensor]:
    """Logits of each head, and labels of ``side`` pixels an axis."""
    generator, axes = torch.Generator().manual_seed(0), 3 if case.volume else 2
    logits = [
        torch.randn(N, C, *[max(1, side // (stride << k))] * axes, generator=generator).requires_grad_(case.trains)
        for k in range(len(case.heads))
    ]
    size, most = ((N, C) if case.each else (N,)) + (side,) * axes, 2 if case.each else C
    return logits, torch.randint(most, size, generator=generator, dtype=torch.uint8)


def call(case: Case, which: str, logits: Sequence[Tensor], target: Tensor) -> object:
    """What fastseg or torch gives; of a loss, the gradients."""
    if which == "fastseg":
        result = case.ours(logits[0] if len(logits) == 1 else list(logits), target)
    else:
        size = tuple(target.shape[-3:] if case.volume else target.shape[-2:])
        mode = "trilinear" if case.volume else "bilinear"
        found = [case.theirs(F.interpolate(x, size, mode=mode), target) for x in logits]
        result = found[0]
        if len(logits) > 1:
            result = torch.stack([w * loss for w, loss in zip(case.heads, found, strict=True)]).sum()  # type: ignore[arg-type]
    if not case.trains:
        return result
    assert isinstance(result, Tensor)
    return torch.autograd.grad(result, list(logits))
