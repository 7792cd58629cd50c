"""Cross entropy of upsampled logits on a CPU, a few output rows at a time: full-size logits and gradients never exist.

The output is cut into strips of rows, which run on threads. A strip interpolates its rows of logits along x once. Each
block of output rows is then the product of a small matrix with them; the gradient goes back through the transposes of
both. Blocks fit in the cache. Inside a block, pixels are neighbours and classes are lines, so that maxima and sums over
classes are vector operations. If the reduction is known, the forward computes the gradient too.

A small map of two classes is one block: one plane, their difference, takes 0.4 to 0.6 of torch's two steps.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core import volume
from fastseg.ops.core.autograd import derived, differentiable
from fastseg.ops.core.labels import check_targets
from fastseg.ops.core.layout import memory_format_of
from fastseg.ops.core.upsample import cross_entropy, is_finite
from fastseg.ops.cpu.loss_planes import maps_down, maps_up
from fastseg.ops.cpu.upsampled_rows import Rows
from fastseg.ops.cpu.upsampled_slabs import Slabs

# Upsampled logits from which strips are the fastest form (``benchmarks.studies.cpu_threads --ops loss``). With 3 or 4
# classes they take 1.0 to 1.4 of the time of torch's two steps, with others 0.2 to 0.9 from here on. On two threads,
# 21 classes at 128^2 (0.7e6 values) took 1.4, 150 at 128^2 (5e6) and 21 at 512^2 (11e6) 0.5.
_LEAST_OF_TWO, _LEAST_OF_FEW, _LEAST, _LEAST_OF_THREADS = 2**18, 2**19, 2**20, 2**22
_BLOCK_OF_TWO = 2**15  # below it two steps cost less than what a call asks
_MANY = 5  # classes from which strips pay
_SIDE_BY_SIDE = 12  # classes from which a softmax along memory does: 0.65 to 0.85 of the time


class Criterion(NamedTuple):
    """The options of a cross entropy."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    align_corners: bool


class Labels(NamedTuple):
    """What the loss of a block of pixels (rows, 1, W) reads from their targets."""

    target: Tensor  # int64, 0 if ignored
    counts: Tensor | None  # True where not ignored; None: all
    weight: Tensor | None  # of the targets, 0 if ignored; None: 1


def can_walk(logits: Tensor, target: Tensor) -> bool:
    """True if strips give torch's result: there is no NaN or infinity, which their products would spread."""
    return target.numel() > 0 and is_finite(logits)


def fastest(classes: int, pixels: int) -> str:
    """The fastest form: "rows" or "block" here, or torch's two steps with the classes of "pixels" side by side, or in
    "planes".
    """
    if classes == 2 and _BLOCK_OF_TWO <= 2 * pixels < _LEAST_OF_TWO:
        return "block"
    few = classes < _SIDE_BY_SIDE
    least = _LEAST_OF_TWO if classes == 2 else _LEAST_OF_FEW if few else _LEAST
    if torch.get_num_threads() > 1 and classes != 2:
        least = _LEAST_OF_THREADS
    if classes * pixels >= least and (classes == 2 or classes >= _MANY):
        return "rows"
    return "planes" if few else "pixels"


class _Walk:
    """One pass over all strips: losses, gradients, or both."""

    def __init__(self, x: Tensor, target: Tensor, weight: Tensor | None, criterion: Criterion):
        self.kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.target, self.criterion, x = target, criterion, x.detach()
        C = self.classes = x.shape[1]
        if C == 2:  # their difference is enough
            x = x[:, 1:].to(self.kind) - x[:, :1].to(self.kind)
        self.x = x
        self.weight = None if weight is None else weight.detach().to(self.kind)
        share = criterion.label_smoothing / C  # of each class, for any target
        self.spread: Tensor = torch.empty(0, device="cpu")
        self.spread_sum = 0.0
        if share > 0:
            ones = torch.ones(C, dtype=self.kind, device="cpu") if weight is None else self.weight
            self.spread = (share * ones)[:, None]
            self.spread_sum = float(self.spread.sum())
        self.total = 0.0  # of the losses
        self.weights = 0.0  # of the targets

    @functools.cached_property
    def over(self) -> Rows | Slabs:
        """The strips."""
        cut: Any = Rows if self.x.dim() == 4 else Slabs
        return cut(self.x, self.target.shape[1:], self.criterion.align_corners, self.kind)

    def run(self, *, wants_grad: bool, dy: Tensor | None = None, losses: Tensor | None = None) -> Tensor | None:
        """Return the gradient at x, in its shape, of the sum of losses, each times its element of ``dy``.

        ``losses``, of the target's shape as ``dy``, is filled if given; ``total`` and ``weights`` are accumulated.
        """
        over = self.over
        dx = over.gradient() if wants_grad else None
        for strip, (total, weights, part) in over.results(lambda strip: self._strip(strip, wants_grad, dy, losses)):
            self.total += total
            self.weights += weights
            if wants_grad:
                over.add(dx, strip, part)
        if dx is None:
            return None
        dx = over.finished(dx)
        return torch.cat([-dx, dx], 1) if self.classes == 2 else dx

    def run_at_once(self, *, wants_grad: bool) -> Tensor | None:
        """As ``run``, of two classes and all pixels as one block; nothing of full size stays."""
        H, W = self.target.shape[1:]
        d = maps_up(self.x, H, W, self.criterion.align_corners)  # (N, 1, H * W)
        target = self.target.reshape(d.shape)
        if self.weight is not None or self.criterion.label_smoothing > 0:
            labels = self._labels(target)
            loss = self._two(d, labels, wants_grad)
            loss = loss if labels.counts is None else loss.where(labels.counts, 0)
            self.weights = loss.numel() if labels.weight is None else float(labels.weight.sum())
        else:  # log(1 + exp z) of the logit z of the other label, and its sigmoid
            some_ignored = self._check(target)
            sign, counts = target.to(self.kind).mul_(-2).add_(1), None
            if some_ignored:
                counts = (target != self.criterion.ignore_index).to(self.kind)
                sign *= counts
            d *= sign
            loss = F.softplus(d, 1, 80)  # from there on log(1 + exp z) is z
            loss = loss if counts is None else loss.mul_(counts)
            self.weights = loss.numel() if counts is None else float(counts.sum())
            d = d.sigmoid_().mul_(sign) if wants_grad else d
        self.total = float(loss.sum())
        if not wants_grad:
            return None
        dx = maps_down(d, self.x.shape, H, W, self.criterion.align_corners)
        return torch.cat([dx.neg(), dx], 1)

    def _check(self, target: Tensor) -> bool:
        """True if a label may be ignored. Raises torch's error for one that is no class."""
        least, most = (int(v) for v in target.aminmax())
        if least < 0 or most >= self.classes:
            check_targets(target, self.classes, self.criterion.ignore_index)
        return least <= self.criterion.ignore_index <= most

    def _strip(self, strip: Any, wants_grad: bool, dy: Tensor | None, losses: Tensor | None):
        """Return the sum of losses, the sum of target weights, and the gradient at the logits."""
        over = self.over
        wide, dwide = over.wide(strip), None
        total = weights = 0.0
        for rows in over.blocks(strip):
            labels = self._labels(over.of(self.target, strip, rows))
            v = over.up(wide, strip, rows)
            loss = (self._two if self.classes == 2 else self._several)(v, labels, wants_grad)
            loss = loss if labels.counts is None else loss.where(labels.counts, 0)
            total += float(loss.sum())
            weights += loss.numel() if labels.weight is None else float(labels.weight.sum())
            if losses is not None:
                over.put(losses, strip, rows, loss)
            if wants_grad:  # in the memory of the logits by now
                if dy is not None:
                    factor = over.of(dy, strip, rows)
                    v *= factor if labels.counts is None else factor.where(labels.counts, 0)
                dwide = over.down(dwide, v, strip, rows)
        return total, weights, None if dwide is None else over.narrow(dwide, strip)

    def _labels(self, target: Tensor) -> Labels:
        some_ignored = self._check(target)
        counts, target = None, target.long()
        if some_ignored:
            counts = target != self.criterion.ignore_index
            target = target.where(counts, 0)
        weight = counts.to(self.kind) if some_ignored else None
        if self.weight is not None:
            weight = self.weight[target] if weight is None else self.weight[target].where(counts, 0)
        return Labels(target, counts, weight)

    def _several(self, v: Tensor, labels: Labels, wants_grad: bool) -> Tensor:
        """Losses (rows, 1, W) of logits (rows, C, W), which are overwritten by their gradient if it is needed."""
        smoothing, counts = self.criterion.label_smoothing, labels.counts
        v -= v.amax(1, keepdim=True)
        loss = -v.gather(1, labels.target)
        smooth = (v * self.spread).sum(1, keepdim=True) if smoothing > 0 else None
        total = v.exp_().sum(1, keepdim=True)
        lse = total.log()
        loss += lse
        named = 1 - smoothing if labels.weight is None else (1 - smoothing) * labels.weight
        if smoothing > 0 or labels.weight is not None:
            loss *= named
        if smoothing > 0:
            loss += self.spread_sum * lse - smooth
        if wants_grad:
            factor = named + (self.spread_sum if counts is None else self.spread_sum * counts)
            v *= factor / total
            v.scatter_add_(1, labels.target, -torch.as_tensor(named, dtype=v.dtype, device="cpu").expand_as(loss))
            if smoothing > 0:
                v -= self.spread if counts is None else self.spread * counts
            if self.classes == 1:  # the loss of a certain class is exactly 0, without rounding, or NaN
                v *= 0
        return loss

    def _two(self, d: Tensor, labels: Labels, wants_grad: bool) -> Tensor:
        """The same for two classes with difference d (rows, 1, W): a softplus(d) - b d, with the gradient towards d."""
        smoothing, counts = self.criterion.label_smoothing, labels.counts
        a, b = labels.weight, labels.target.to(self.kind)
        if a is not None:
            b *= a
        if smoothing > 0:
            b *= 1 - smoothing
            b += self.spread[1] if counts is None else self.spread[1] * counts
            named = 1 - smoothing if a is None else (1 - smoothing) * a
            a = named + (self.spread_sum if counts is None else self.spread_sum * counts)
        softplus = d.abs().neg_().exp_().log1p_().add_(d.clamp_min(0))
        loss = (softplus if a is None else softplus.mul_(a)).sub_(b * d)
        if wants_grad:
            d.sigmoid_()
            d = (d if a is None else d.mul_(a)).sub_(b)
        return loss


def walk(
    x: Tensor, target: Tensor, weight: Tensor | None, criterion: Criterion, out: torch.dtype, *, at_once: bool = False
) -> Tensor:
    """The loss, in dtype ``out``, with its gradient at x; ``at_once``: of two classes, reduced, in one block."""
    return _CrossEntropyRows.apply(x, target, weight, criterion, out, at_once)


class _CrossEntropyRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, target: Tensor, weight: Tensor | None, criterion: Criterion, out: torch.dtype, at_once: bool
    ) -> Tensor:
        ctx.criterion, ctx.like, ctx.out = criterion, (x.dtype, memory_format_of(x)), out
        with torch.autocast("cpu", enabled=False):
            pass_ = _Walk(x, target, weight, criterion)
            if criterion.reduction == "none":
                losses = torch.empty(target.shape, dtype=pass_.kind, device="cpu")
                pass_.run(wants_grad=False, losses=losses)
                ctx.save_for_backward(x, target, weight, None)
                return losses.to(out)
            dx = (pass_.run_at_once if at_once else pass_.run)(wants_grad=ctx.needs_input_grad[0])
            total = torch.tensor(pass_.total, dtype=torch.float64, device="cpu")
            if criterion.reduction == "mean":
                if dx is not None and pass_.weights != 0:  # all ignored: the loss is NaN, the gradient 0
                    dx /= pass_.weights
                total /= pass_.weights
            ctx.save_for_backward(x, target, weight, dx)
            return total.to(out)

    @staticmethod
    def gradients(ctx, saved, dy: Tensor):
        x, target, weight, dx = saved
        with torch.autocast("cpu", enabled=False):
            if ctx.criterion.reduction == "none":
                dx = _Walk(x, target, weight, ctx.criterion).run(wants_grad=True, dy=dy)
            else:
                dx = dx * dy.to(dx.dtype)
        dtype, layout = ctx.like
        return dx.to(dtype).contiguous(memory_format=layout), None, None, None, None, None

    @staticmethod
    def again(ctx, saved, dy: Tensor):
        x, target, weight, _ = saved
        wide = torch.promote_types(x.dtype, torch.float32)
        steps = cross_entropy if x.dim() == 4 else volume.cross_entropy
        forward = lambda x: steps(x.to(wide), target, weight, *ctx.criterion).to(ctx.out)
        with torch.autocast("cpu", enabled=False):
            return *derived(forward, (x,), ctx.needs_input_grad[:1], dy), None, None, None, None, None

    backward = staticmethod(differentiable(gradients, again))
