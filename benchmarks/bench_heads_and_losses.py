"""What else is made of low-resolution logits, against torch's steps at full resolution, eager and compiled.

    confidence       softmax(interpolate(x)).max(1)                    least traffic  lo + 5 pixels
    topk             the same, topk(3)                                                lo + 36 pixels
    threshold        sigmoid(interpolate(x)) > 0.5                                    lo + pixels
    confusion        pairs of argmax(interpolate(x)) and labels, counted              lo + 8 pixels
    loss             cross entropy + 0.5 Dice of interpolate(x)                       lo + 8 pixels
    loss-backward    their gradient at x                                              2 lo + 8 pixels
    volume           argmax of trilinear logits                                       lo + pixels
    volume-loss      cross entropy + Dice of trilinear logits                         lo + 8 pixels
    classes          argmax over k of sum over q of p[q, k] sigmoid(up(m[q]))         lo + pixels
    queries          argmax over q of s[q] sigmoid(up(m[q])), and areas               lo + 2 pixels

in bytes: lo is the logits, of 16 bits (32 on a CPU); labels are int64. "Least" means each tensor once. Floors count
also one exponential for each full-size logit that a softmax or a sigmoid needs, 7 lane operations (of volumes 14) to
interpolate it, and the products over queries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness, problem
from benchmarks.roofline.floors import ITEM, Cost
from fastseg.losses import CrossEntropy, Dice
from fastseg.ops import (
    masks_to_classes,
    masks_to_queries,
    upsample_argmax,
    upsample_confidence,
    upsample_confusion,
    upsample_loss,
    upsample_threshold,
    upsample_topk,
)

OP = "heads_and_losses"
IGNORED = 255
K = 3  # classes of `topk`


@dataclass(frozen=True)
class Shape:
    """Logits of ``C`` classes, or masks of ``Q`` queries, at ``small``, upsampled by ``scale``.

    ``small``: height and width; of volumes depth, height and width.
    """

    C: int
    small: tuple[int, ...]
    scale: int
    N: int
    Q: int = 0
    origin: str = ""

    @property
    def name(self) -> str:
        queries = f"_q{self.Q}" if self.Q else ""
        return f"{self.C}x{'x'.join(map(str, self.small))}_x{self.scale}{queries}_n{self.N}"

    @property
    def channels(self) -> int:
        return self.Q or self.C

    @property
    def low(self) -> int:
        """Pixels of a small map."""
        return math.prod(self.small)

    @property
    def full(self) -> int:
        """Pixels of a map at full size."""
        return self.low * self.scale ** len(self.small)


HEADS = (
    Shape(21, (128, 128), 4, 16, origin="VOC"),
    Shape(150, (128, 128), 4, 1, origin="ADE20K"),
    Shape(19, (256, 512), 4, 1, origin="Cityscapes"),
)
ONE_CHANNEL = (Shape(1, (128, 128), 4, 16, origin="two classes as one"),)
VOLUMES = (
    Shape(14, (64, 64, 64), 2, 1, origin="organs of the abdomen"),
    Shape(4, (80, 96, 80), 2, 1, origin="brain tumours"),
)
MASKS = (
    Shape(150, (128, 128), 4, 1, 100, "a mask classifier on ADE20K"),
    Shape(19, (256, 512), 4, 1, 100, "on Cityscapes"),
)
SHAPES = {
    "confidence": HEADS, "topk": HEADS, "threshold": ONE_CHANNEL, "confusion": HEADS, "loss": HEADS,
    "loss-backward": HEADS, "volume": VOLUMES, "volume-loss": VOLUMES, "classes": MASKS, "queries": MASKS,
}  # fmt: skip
MODES = tuple(SHAPES)
LEAST = {"confidence": 5, "topk": 12 * K, "threshold": 1, "volume": 1, "classes": 1, "queries": 2}  # bytes; labels: 8


class Problem(problem.Problem):
    """One shape on one device: logits, labels or scores, and what each provider calls.

    Args:
        shape: of ``workloads``.
        mode: of ``MODES``.
        device: where.
    """

    inputs = ("x", "scores")

    def __init__(self, shape: Shape, mode: str, device: torch.device):
        super().__init__(mode, device, grad=mode == "loss-backward")
        self.shape, self.size = shape, tuple(n * shape.scale for n in shape.small)
        self.x = self.draw(shape.N, shape.channels, *shape.small).mul_(4).requires_grad_(self.grad)
        self.scores = self.target = None
        if mode in ("classes", "queries"):
            self.scores = self.draw(shape.N, shape.channels, shape.C + 1).mul_(4)
        elif mode == "confusion" or "loss" in mode:
            self.target = torch.randint(shape.C, (shape.N, *self.size), generator=self.generator, device=device)
            self.target[:, :: max(2, self.size[0] // 8)] = IGNORED

    @property
    def bytes_moved(self) -> float:
        """The least traffic of this file's header."""
        return least(self.shape, self.mode, self.dtype.itemsize)

    def upsampled(self) -> Tensor:
        mode = "trilinear" if self.x.dim() == 5 else "bilinear"
        return F.interpolate(self.x, self.size, mode=mode).float()

    def forms(self) -> dict[str, Callable[[], object]]:
        """provider -> function of the problem's tensors."""
        terms = [(1.0, CrossEntropy()), (0.5, Dice(ignore_index=IGNORED))]
        query_scores = lambda: self.scores.softmax(-1)[..., :-1].amax(-1)
        loss = lambda: upsample_loss(self.x, self.target, terms, ignore_index=IGNORED)
        ours: dict[str, Callable[[], object]] = {
            "confidence": lambda: upsample_confidence(self.x, self.size),
            "topk": lambda: upsample_topk(self.x, K, self.size),
            "threshold": lambda: upsample_threshold(self.x, self.size),
            "confusion": lambda: upsample_confusion(self.x, self.target, self.shape.C, ignore_index=IGNORED),
            "volume": lambda: upsample_argmax(self.x, self.size),
            "classes": lambda: masks_to_classes(self.scores, self.x, self.size),
            "queries": lambda: masks_to_queries(query_scores(), self.x, self.size),
        }
        torchs: dict[str, Callable[[], object]] = {
            "confidence": lambda: self.upsampled().softmax(1).max(1),
            "topk": lambda: self.upsampled().softmax(1).topk(K, 1),
            "threshold": lambda: self.upsampled()[:, 0].sigmoid() > 0.5,
            "confusion": self._confusion,
            "volume": lambda: self.upsampled().argmax(1),
            "classes": lambda: self._sums().argmax(1),
            "queries": lambda: self._owners(query_scores()),
        }
        return {"fastseg": ours.get(self.mode, loss), "eager": torchs.get(self.mode, self._loss)}

    def function(self, provider: Callable[[], object]) -> Callable[[], object]:
        """What is timed. A backward contains no forward: its forward runs here, once."""
        if not self.backward:
            return provider
        loss = provider()
        return lambda: torch.autograd.grad(loss, self.x, retain_graph=True)

    def comparable(self, result: object) -> list[Tensor]:
        """Numbers. Of indices those that they chose, from logits in fp32: near ties may go either way."""
        if self.mode in ("volume", "classes"):
            values = self.upsampled() if self.mode == "volume" else self._sums()
            return [values.gather(1, result.long()[:, None])]
        if self.mode == "confidence":
            return [next(t for t in result if t.is_floating_point())]
        if self.mode == "topk":
            return [next(t for t in result if t.is_floating_point())]
        if self.mode == "queries":
            return [result[2].double()]
        if self.mode == "threshold":
            return [self.upsampled()[:, 0] * result]  # of those above it
        return [t.double() for t in harness.floats(result)]

    # --- torch's steps

    def _confusion(self) -> Tensor:
        classes, C = self.upsampled().argmax(1), self.shape.C
        bins = torch.where(self.target == IGNORED, C * C, self.target * C + classes).flatten()
        counts = torch.zeros(C * C + 1, dtype=torch.int64, device=bins.device)
        return counts.scatter_add_(0, bins, torch.ones_like(bins))[:-1].view(C, C)

    def _loss(self) -> Tensor:
        """The Dice loss of each image and class, whose mean is taken."""
        full, valid = self.upsampled(), (self.target != IGNORED)[:, None]
        p, axes = full.softmax(1) * valid, tuple(range(2, full.dim()))
        classes = torch.arange(self.shape.C, device=full.device).view(-1, *[1] * len(axes))
        true = (self.target[:, None] == classes) & valid
        inter, total = (p * true).sum(axes), p.sum(axes) + true.sum(axes)
        dice = 1 - (2 * inter + 1) / (total + 1)
        return F.cross_entropy(full, self.target, ignore_index=IGNORED) + 0.5 * dice.mean()

    def _sums(self) -> Tensor:
        p = self.scores.float().softmax(-1)[..., :-1]
        return torch.einsum("nqk,nqhw->nkhw", p, self.upsampled().sigmoid())

    def _owners(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = self.upsampled().sigmoid() * scores.float()[:, :, None, None]
        within, owner = weights >= 0.5, weights.argmax(1, keepdim=True)
        return owner[:, 0], within.gather(1, owner)[:, 0], within.sum((2, 3))


def least(shape: Shape, mode: str, item: int) -> float:
    """Bytes that a mode moves at least."""
    lo, pixels = item * shape.N * shape.channels * shape.low, shape.N * shape.full
    return (2 if mode == "loss-backward" else 1) * lo + LEAST.get(mode, 8) * pixels


def floor_of(shape: Shape, mode: str) -> Cost:
    values = shape.N * shape.channels * shape.full
    exps = 0 if mode in ("threshold", "confusion", "volume") else values
    products = 2.0 * values * shape.C if mode == "classes" else 0.0
    blend = 14 if mode.startswith("volume") else 7
    return Cost(bytes=least(shape, mode, ITEM), fma=blend * values, tensor=products, mufu=exps)


def cut(shape: Shape, size: str) -> Shape:
    """One image for a CPU; 3 x 3 pixels of few classes and queries in a smoke test."""
    if size == "tiny":
        return replace(shape, C=min(shape.C, 4), small=(3,) * len(shape.small), N=1, Q=min(shape.Q, 6))
    return replace(shape, N=1) if size == "small" else shape


def cases(size: str) -> list[problem.Case]:
    """Every shape of each mode."""
    out = []
    for mode in MODES:
        for full in SHAPES[mode]:
            shape, floors = cut(full, size), {"fastseg": [floor_of(full, mode)]}
            macs = shape.N * shape.channels * shape.full * (shape.C if mode == "classes" else 1)
            out.append(problem.Case(OP, full.name, shape.N, mode, partial(Problem, shape, mode), floors, float(macs)))
    return out


@pytest.mark.parametrize("provider", ["fastseg", "eager", "compile"])
@problem.every(cases)
def bench_heads_and_losses(number, provider, run, device, size, benchmark):
    problem.bench(cases(size)[number], provider, run, device, size, benchmark)
