"""Cross entropy on upsampled logits on a CPU, a few output rows at a time: no full-resolution logits or gradients.

Each image is interpolated along x once, by torch (h rows of W pixels); a block of output rows is then a product of a
small matrix with the rows it lies between, and the gradient goes back through the transposes of both. The blocks are
small enough to stay in the cache. Where the reduction is known, the gradient is made in the forward.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.ops._labels import check_targets
from fastseg.ops._register import derived, differentiable, memory_format_of
from fastseg.ops._upsample import along_x, cross_entropy, is_finite, neighbours

_BLOCK = 2**18  # values of a block: 1 MiB of fp32


class Criterion(NamedTuple):
    """The options of a cross entropy."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    align_corners: bool


def can_walk(logits: Tensor, target: Tensor) -> bool:
    """Whether the blocks of rows give torch's result: not with NaN or infinity, which their products would spread."""
    return target.numel() > 0 and is_finite(logits)


class _Walk:
    """One pass over all blocks of rows: losses, gradients, or both."""

    def __init__(self, x: Tensor, target: Tensor, weight: Tensor | None, criterion: Criterion):
        self.kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.x = x.detach().permute(0, 2, 3, 1).to(self.kind).contiguous()  # (N, h, w, C)
        self.target, self.criterion = target, criterion
        self.weight = None if weight is None else weight.detach().to(self.kind)
        C = x.shape[1]
        self.spread = criterion.label_smoothing / C * (self.x.new_ones(C) if weight is None else self.weight)
        self.total = self.x.new_zeros(())  # of the losses
        self.weights = self.x.new_zeros(())  # of the targets

    def run(self, *, wants_grad: bool, dy: Tensor | None = None, losses: Tensor | None = None) -> Tensor | None:
        """-> the gradient at x, (N, h, w, C), of the sum of the losses, each times its element of ``dy`` (N, H, W).

        ``losses``, (N, H, W), is filled where given; ``total`` and ``weights`` are summed up.
        """
        N, h, w, C = self.x.shape
        _, H, W = self.target.shape
        first, second, weight = neighbours(h, H, self.criterion.align_corners, self.kind)
        matrix = self.x.new_zeros(H, h).scatter_(1, first[:, None], (1 - weight)[:, None])
        matrix.scatter_add_(1, second[:, None], weight[:, None])
        rows = min(64, max(4, _BLOCK // (W * C)))
        dx = torch.zeros_like(self.x) if wants_grad else None
        for n in range(N):
            wide = along_x(self.x[n], W, self.criterion.align_corners)  # (h, W * C)
            dwide = torch.zeros_like(wide) if wants_grad else None
            for r in range(0, H, rows):
                end = min(r + rows, H)
                low = slice(int(first[r]), int(second[end - 1]) + 1)
                logits = torch.mm(matrix[r:end, low], wide[low]).view(-1, C)
                factor = None if dy is None else dy[n, r:end].reshape(-1, 1).to(self.kind)
                loss = self._pixels(logits, self.target[n, r:end].reshape(-1), factor, wants_grad)
                self.total += loss.sum()
                if losses is not None:
                    losses[n, r:end] = loss.view(-1, W)
                if wants_grad:  # in the logits' memory by now
                    dwide[low].addmm_(matrix[r:end, low].t(), logits.view(end - r, -1))
            if wants_grad:
                dx[n] = self._along_x_backward(dwide, w)
        return dx

    def _along_x_backward(self, dwide: Tensor, w: int) -> Tensor:
        h, C = dwide.shape[0], self.x.shape[-1]
        grad = dwide.view(h, 1, -1, C).permute(0, 3, 1, 2)
        back = torch.ops.aten.upsample_bilinear2d_backward
        dx = back(grad, grad.shape[2:], [h, C, 1, w], self.criterion.align_corners, None, None)
        return dx[:, :, 0].permute(0, 2, 1)

    def _pixels(self, logits: Tensor, target: Tensor, dy: Tensor | None, wants_grad: bool) -> Tensor:
        """Losses (P,) of logits (P, C), which become their gradient if it is wanted."""
        smoothing = self.criterion.label_smoothing
        target = target.long()
        counts = target != self.criterion.ignore_index
        every = bool(counts.all())
        target = (target if every else target.where(counts, 0))[:, None]
        log_p = torch.log_softmax(logits, 1)
        weight = torch.ones_like(target, dtype=self.kind) if self.weight is None else self.weight[target]
        weight = weight if every else weight.where(counts[:, None], 0)
        self.weights += weight.sum()
        named = (1 - smoothing) * weight
        loss = -named * log_p.gather(1, target)
        if smoothing > 0:
            loss -= (log_p @ self.spread)[:, None]
        loss = (loss if every else loss.where(counts[:, None], 0))[:, 0]
        if wants_grad:
            torch.exp(log_p, out=logits)
            if self.weight is not None or not every:
                logits *= named + self.spread.sum() * counts[:, None]
            logits.scatter_add_(1, target, -named)
            if smoothing > 0:
                logits -= self.spread * counts[:, None]
            if logits.shape[1] == 1:  # one class is certain: 0, and no rounding
                logits.zero_()
            if dy is not None:
                logits *= dy
        return loss


def walk(x: Tensor, target: Tensor, weight: Tensor | None, criterion: Criterion, out: torch.dtype) -> Tensor:
    """The loss, in dtype ``out``, with its gradient towards x."""
    check_targets(target, x.shape[1], criterion.ignore_index)
    return _CrossEntropyRows.apply(x, target, weight, criterion, out)


class _CrossEntropyRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, target: Tensor, weight: Tensor | None, criterion: Criterion, out: torch.dtype
    ) -> Tensor:
        ctx.criterion, ctx.like, ctx.out = criterion, (x.dtype, memory_format_of(x)), out
        with torch.autocast("cpu", enabled=False):
            pass_ = _Walk(x, target, weight, criterion)
            if criterion.reduction == "none":
                losses = pass_.x.new_empty(target.shape)
                pass_.run(wants_grad=False, losses=losses)
                ctx.save_for_backward(x, target, weight, None)
                return losses.to(out)
            dx = pass_.run(wants_grad=ctx.needs_input_grad[0])
            if criterion.reduction == "mean":
                if dx is not None and pass_.weights != 0:  # all ignored: the loss is NaN, the gradient 0
                    dx /= pass_.weights
                pass_.total /= pass_.weights
            ctx.save_for_backward(x, target, weight, dx)
            return pass_.total.to(out)

    @staticmethod
    def gradients(ctx, saved, dy: Tensor):
        x, target, weight, dx = saved
        with torch.autocast("cpu", enabled=False):
            if ctx.criterion.reduction == "none":
                dx = _Walk(x, target, weight, ctx.criterion).run(wants_grad=True, dy=dy)
            else:
                dx = dx * dy.to(dx.dtype)
        dtype, layout = ctx.like
        return dx.permute(0, 3, 1, 2).to(dtype).contiguous(memory_format=layout), None, None, None, None

    @staticmethod
    def again(ctx, saved, dy: Tensor):
        x, target, weight, _ = saved
        wide = torch.promote_types(x.dtype, torch.float32)
        forward = lambda x: cross_entropy(x.to(wide), target, weight, *ctx.criterion).to(ctx.out)
        with torch.autocast("cpu", enabled=False):
            return *derived(forward, (x,), ctx.needs_input_grad[:1], dy), None, None, None, None

    backward = staticmethod(differentiable(gradients, again))
