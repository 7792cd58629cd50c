"""A binary cross entropy or a focal loss that stands alone, on a CPU: the loss and its gradient in one walk.

    binary     z = (1 - 2 y) v, the logit of the other label; l = log(1 + exp z), q = sigmoid(z)
               loss = sum of a q^gamma l,  dv = a (1 - 2 y) q^gamma (gamma (1 - q) l + q)
    softmax    l = -log p of the pixel's own class y, q = 1 - p
               loss = sum of a q^gamma l,  dv_c = a (p_c - [c = y]) q^(gamma - 1) (gamma p l + q)

a is the factor of the label. Binary losses are of planes, an image's class each; two classes of softmax are one plane,
their difference. Sums of each class (``loss_sums.py``) and the steps of autograd that combine them cost more than such
a loss itself. Planes that fit are one block, of several; larger ones are cut into strips (``upsampled_rows.py``).
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.autograd import derived, differentiable
from fastseg.ops.core.layout import memory_format_of
from fastseg.ops.core.loss_columns import softplus
from fastseg.ops.core.loss_full import is_ignored
from fastseg.ops.core.upsample import along_x, interpolate
from fastseg.ops.cpu.loss_planes import maps_down, maps_up
from fastseg.ops.cpu.threads import each
from fastseg.ops.cpu.upsampled_rows import BLOCK, Strip, along_x_backward, strips_of


class Alone(NamedTuple):
    """A loss: of softmax and class indices, or of sigmoid and labels 0 and 1."""

    softmax: bool
    gamma: float  # 0: a cross entropy
    pos: Tensor | None  # factors (C,) of label 1, of softmax of each class; None: 1
    neg: Tensor | None  # of label 0
    ignore_index: int | None  # None: no label is ignored
    mean: bool  # over the labels that count
    align_corners: bool


def loss_alone(x: Tensor, target: Tensor, loss: Alone) -> Tensor:
    """x (N, C, h, w), finite; target (N, H, W) of softmax or (N, C, H, W), checked -> a scalar, at least fp32."""
    return _Alone.apply(x, target, loss)


class _Walk:
    """One pass over images or planes x (M, C, h, w) with labels (M, 1, H, W)."""

    def __init__(self, x: Tensor, target: Tensor, loss: Alone):
        kind = torch.promote_types(x.dtype, torch.float32)
        x, N, C = x.detach().to(kind), x.shape[0], x.shape[1]
        pos, neg = loss.pos, loss.neg
        self.several = loss.softmax and C > 2
        if loss.softmax and C == 2:
            x = x[:, 1:] - x[:, :1]
            pos, neg = (None, None) if pos is None else (pos[1:], pos[:1])
        if not self.several:
            x = x.reshape(-1, 1, *x.shape[2:])
        self.x, self.target, self.loss, self.kind = x, target.reshape(-1, 1, *target.shape[-2:]), loss, kind
        self.weight = None if pos is None or not self.several else pos.detach().to(kind)
        self.middle: Tensor | None = None
        self.half: Tensor | None = None  # the factor of a label is middle + (1 - 2 y) half, (M, 1, 1)
        if not self.several and (pos is not None or neg is not None):
            one = torch.ones(1, dtype=kind, device="cpu")
            first, second = (one if f is None else f.detach().to(kind) for f in (pos, neg))
            planes = lambda f: f.expand(C if not loss.softmax else 1).repeat(N)[:, None, None]
            self.middle, self.half = planes((first + second) / 2), planes((second - first) / 2)

    def run(self) -> tuple[float, float, Tensor]:
        """-> the sum of the losses, the number of labels that count, the gradient at x (M, C, h, w) of the sum."""
        M, C, h, w = self.x.shape
        H, W = self.target.shape[-2:]
        found: list[tuple[float, float, Tensor]]
        if C * H * W <= 2 * BLOCK:
            step = max(1, BLOCK // (C * H * W))
            found = each(self._images, [slice(i, i + step) for i in range(0, M, step)])
            dx = found[0][2] if len(found) == 1 else torch.cat([part for *_, part in found])
        else:
            strips = strips_of(self.x.shape, H, W, self.loss.align_corners, self.kind)
            found = each(self._strip, strips)
            rows = torch.zeros(M, h, C, w, dtype=self.kind, device="cpu")
            for strip, (_, _, part) in zip(strips, found, strict=True):
                rows[strip.image, strip.first : strip.last] += part
            dx = rows.permute(0, 2, 1, 3)
        return sum(total for total, _, _ in found), sum(count for _, count, _ in found), dx

    def _images(self, images: slice) -> tuple[float, float, Tensor]:
        x, (H, W) = self.x[images], self.target.shape[-2:]
        v, labels = maps_up(x, H, W, self.loss.align_corners), self.target[images].flatten(2)
        total, count, dv = self._several(v, labels) if self.several else self._binary(v, labels, images)
        return total, count, maps_down(dv, x.shape, H, W, self.loss.align_corners)

    def _strip(self, strip: Strip) -> tuple[float, float, Tensor]:
        n, begin, end, low, high, matrix = strip
        x, W = self.x[n, :, low:high], self.target.shape[-1]
        wide = along_x(x, W, self.loss.align_corners)
        dwide, total, count = torch.zeros_like(wide), 0.0, 0.0
        rows = max(1, BLOCK // wide.shape[1])
        for start in range(0, end - begin, rows):
            stop = min(start + rows, end - begin)
            v = torch.mm(matrix[start:stop], wide).view(stop - start, -1, W)
            labels = self.target[n, 0, begin + start : begin + stop, None]
            more, counted, dv = self._several(v, labels) if self.several else self._binary(v, labels, slice(n, n + 1))
            total, count = total + more, count + counted
            dwide.addmm_(matrix[start:stop].t(), dv.view(stop - start, -1))
        return total, count, along_x_backward(dwide, x.shape, self.loss.align_corners)

    def _counts(self, labels: Tensor) -> Tensor | None:
        """1 where a label counts, 0 where not; None: all count."""
        ignored = self.loss.ignore_index
        return None if ignored is None else (~is_ignored(labels, ignored)).to(self.kind)

    def _binary(self, v: Tensor, labels: Tensor, planes: slice) -> tuple[float, float, Tensor]:
        """Of logits (rows, 1, pixels), which are overwritten by their gradient."""
        gamma, counts = self.loss.gamma, self._counts(labels)
        sign = labels.to(self.kind).mul_(-2).add_(1)
        if counts is not None:
            sign *= counts
        v *= sign
        loss = F.softplus(v, 1, 80)  # from there on log(1 + exp z) is z
        q = v.sigmoid_()
        if gamma == 0:
            dv = q.mul_(sign)
        else:
            power = q.square() if gamma == 2 else q**gamma
            dv = torch.addcmul(loss, loss, q, value=-1).mul_(gamma).add_(q).mul_(power).mul_(sign)
            loss *= power
        if self.middle is not None and self.half is not None:
            factor = torch.addcmul(self.middle[planes], sign, self.half[planes])
            loss *= factor
            dv *= factor
        if counts is not None:
            loss *= counts
        return float(loss.sum()), loss.numel() if counts is None else float(counts.sum()), dv

    def _several(self, v: Tensor, labels: Tensor) -> tuple[float, float, Tensor]:
        """Of logits (rows, C, pixels) and class indices (rows, 1, pixels)."""
        gamma, counts, classes = self.loss.gamma, self._counts(labels), labels.long()
        factor = counts
        if counts is not None:
            classes = classes.where(counts != 0, 0)
        if self.weight is not None:
            factor = self.weight[classes] if counts is None else self.weight[classes] * counts
        log_p = v.log_softmax(1)
        own = log_p.gather(1, classes)
        loss, q = own.neg(), torch.expm1(own).neg_()
        slope = torch.ones_like(q)
        if gamma > 0:
            ratio = torch.where(q > 0, loss / q, 1)  # of small q the power of gamma - 1 is large, or infinite
            power = q.square() if gamma == 2 else q**gamma
            slope = own.exp().mul_(ratio).mul_(gamma).add_(1).mul_(power)
            loss *= power
        if factor is not None:
            loss *= factor
            slope *= factor
        dv = log_p.exp_().mul_(slope).scatter_add_(1, classes, slope.neg_())
        return float(loss.sum()), loss.numel() if counts is None else float(counts.sum()), dv


class _Alone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, target: Tensor, loss: Alone) -> Tensor:
        autocast = torch.is_autocast_enabled("cpu")  # to enter its context takes 7 us
        with torch.autocast("cpu", enabled=False) if autocast else nullcontext():
            walk = _Walk(x, target, loss)
            total, count, dx = walk.run()
        if loss.mean:
            total = total / count if count else float("nan")
            dx /= max(count, 1.0)
        ctx.loss = loss
        ctx.save_for_backward(x, target, dx)
        return torch.tensor(total, dtype=walk.kind, device="cpu")

    @staticmethod
    def gradients(ctx, saved, dy: Tensor):
        x, _, dx = saved
        dx = dx * dy
        if ctx.loss.softmax and x.shape[1] == 2:
            dx = torch.cat([dx.neg(), dx], 1)
        return dx.reshape(x.shape).to(x.dtype).contiguous(memory_format=memory_format_of(x)), None, None

    @staticmethod
    def again(ctx, saved, dy: Tensor):
        x, target, _ = saved
        with torch.autocast("cpu", enabled=False):
            forward = lambda x: _composed(x, target, ctx.loss)
            return *derived(forward, (x,), ctx.needs_input_grad[:1], dy), None, None

    backward = staticmethod(differentiable(gradients, again))


def _composed(x: Tensor, target: Tensor, loss: Alone) -> Tensor:
    """The loss in torch's own lines."""
    kind = torch.promote_types(x.dtype, torch.float32)
    H, W = target.shape[-2:]
    v = interpolate(x.to(kind), H, W, (0.0, 0.0), loss.align_corners)
    target = target[:, None] if loss.softmax else target
    counts = torch.ones_like(target, dtype=kind)
    if loss.ignore_index is not None:
        counts = counts.masked_fill(is_ignored(target, loss.ignore_index), 0)
    if loss.softmax:
        classes = target.long().where(counts != 0, 0)
        own = v.log_softmax(1).gather(1, classes)
        losses = (1 - own.exp()) ** loss.gamma * -own
        factor = counts if loss.pos is None else counts * loss.pos.to(kind)[classes]
    else:
        y = target.to(kind)
        z = v * (1 - 2 * y)
        losses = z.sigmoid() ** loss.gamma * softplus(z)
        pos, neg = (1.0 if f is None else f.to(kind)[:, None, None] for f in (loss.pos, loss.neg))
        factor = counts * (y * pos + (1 - y) * neg)
    total = torch.where(counts == 0, 0, losses * factor).sum()
    return total / counts.sum() if loss.mean else total
