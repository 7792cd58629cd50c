"""Sums over the pixels of upsampled logits on a CPU, a few output rows at a time, forward and backward.

``upsampled_rows.py`` cuts maps into strips, ``upsampled_slabs.py`` volumes; ``core/loss_columns.py`` has the
mathematics. Inside a block (rows, C, W) pixels are neighbours and classes are lines, so that maxima and sums over
classes are vector operations. Blocks are summed in the logits' own precision, at least fp32, and added up in fp64.
"""

from typing import Any

import torch
from torch import Tensor

from fastseg.ops.core.loss_columns import LABELS, SIGMOID, Sums, softmax_slope, softmax_term
from fastseg.ops.cpu.loss_blocks import FEW, Block, activated, block_of, slope_of, sums_of
from fastseg.ops.cpu.upsampled_rows import Rows
from fastseg.ops.cpu.upsampled_slabs import Slabs


class Walk:
    """Both passes over the strips of one map or volume of logits.

    Args:
        x: (N, C, h, w) or (N, C, d, h, w), finite.
        target: class indices (N, H, W) or (N, D, H, W), or with classes labels for each class.
        pixel_weight: (N, H, W) or (N, D, H, W), or None for 1.
        sums: what is summed; without an ``ignore_index`` where no label is ignored.
    """

    def __init__(self, x: Tensor, target: Tensor, pixel_weight: Tensor | None, sums: Sums):
        self.kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.target, self.pixel_weight, self.sums = target, pixel_weight, sums
        self.named, self.classes = target.dim() == x.dim() - 1, x.shape[1]
        softmax = self.named and sums.activation != SIGMOID
        self.labelled = softmax and x.dim() == 5 and self.classes <= FEW  # classes become labels of each class
        self.hard = not target.is_floating_point() and sums.activation == SIGMOID  # labels are 0 and 1
        cut = Rows if x.dim() == 4 else Slabs
        self.over = cut(x, target.shape[2 - x.dim() :], sums.align_corners, self.kind)

    def forward(self) -> Tensor:
        """-> sums (N, C, columns), fp64."""
        shape = (self.over.x.shape[0], self.classes, len(self.sums.columns))
        total = torch.zeros(shape, dtype=torch.float64, device="cpu")
        for strip, part in self.over.results(self._sums_of):
            total[strip.image] += part
        return total

    def backward(self, slopes: Tensor) -> Tensor:
        """slopes (N, C, columns), the derivative by each sum -> gradient at x, in the shape of x."""
        slopes = slopes.to(self.kind)
        dx = self.over.gradient()
        for strip, part in self.over.results(lambda strip: self._gradient_of(strip, slopes[strip.image])):
            self.over.add(dx, strip, part)
        return self.over.finished(dx)

    def _sums_of(self, strip: Any) -> Tensor:
        wide = self.over.wide(strip)
        total = torch.zeros(self.classes, len(self.sums.columns), dtype=torch.float64, device="cpu")
        for rows in self.over.blocks(strip):
            v = self.over.up(wide, strip, rows)
            block = self._block(strip, rows)
            if self.sums.activation == SIGMOID or block.classes is None:
                total += sums_of(
                    activated(v, self.sums, named=self.labelled),
                    block,
                    self.sums,
                    (0, 2),
                    named=self.labelled,
                    hard=self.hard,
                )
            else:
                self._add_softmax(total, v, block)
        return total

    def _gradient_of(self, strip: Any, slopes: Tensor) -> Tensor:
        wide = self.over.wide(strip)
        dwide = None
        for rows in self.over.blocks(strip):
            v = self.over.up(wide, strip, rows)
            block = self._block(strip, rows)
            if self.sums.activation == SIGMOID or block.classes is None:
                a = activated(v, self.sums, named=self.labelled)
                dv = slope_of(slopes[None], a, block, self.sums, named=self.labelled, hard=self.hard)
            else:
                dv = self._slope_softmax(slopes, v, block)
            dwide = self.over.down(dwide, dv, strip, rows)
        return self.over.narrow(dwide, strip)

    def _block(self, strip: Any, rows: slice) -> Block:
        factors = None if self.pixel_weight is None else self.over.of(self.pixel_weight, strip, rows)
        labels = self.over.of(self.target, strip, rows)
        one_hot = self.sums.activation == SIGMOID or self.labelled
        classes = 0 if not self.named else self.classes if one_hot else -1
        return block_of(labels, factors, self.sums, self.kind, classes)

    # --- softmax of class indices: what a class has of its own pixels is gathered

    def _add_softmax(self, total: Tensor, v: Tensor, block: Block) -> None:
        """Add the sums of logits v (rows, C, W), which are overwritten."""
        kinds = {column.kind for column in self.sums.columns}
        classes, counts, C = block.classes, block.counts, v.shape[1]
        v -= v.amax(1, keepdim=True)
        of_class = v.gather(1, classes)
        plain = (v if counts is None else v * counts).sum((0, 2)) if "all" in kinds else None
        s = v.exp_().sum(1, keepdim=True)
        lse = s.log()
        log_p = of_class - lse
        factor = 1 / s if counts is None else counts / s
        weights = torch.ones_like(s) if counts is None else counts
        per_class = lambda values: torch.bincount(classes.flatten(), values.flatten().double(), minlength=C)
        for k, column in enumerate(self.sums.columns):
            if column.kind == "prob":
                total[:, k] += torch.matmul(v, factor.transpose(1, 2)).sum((0, 2))
            elif column.kind == "square":
                total[:, k] += torch.matmul(v * v, (factor / s).transpose(1, 2)).sum((0, 2))
            elif column.kind == "all":
                total[:, k] += (weights * lse).sum(dtype=torch.float64) - plain
            elif column.kind == "count":
                total[:, k] += weights.sum(dtype=torch.float64)
            else:  # of the pixel's own class, whose label is 1
                one = torch.ones_like(log_p)
                total[:, k] += per_class(weights * softmax_term(column, log_p.exp(), log_p, one))

    def _slope_softmax(self, slopes: Tensor, v: Tensor, block: Block) -> Tensor:
        """Gradient at logits v (rows, C, W), in their memory, of slopes (C, columns)."""
        classes, counts = block.classes, block.counts
        v -= v.amax(1, keepdim=True)
        of_class = v.gather(1, classes)
        s = v.exp_().sum(1, keepdim=True)
        log_p, inverse = of_class - s.log(), 1 / s
        p, one = log_p.exp(), torch.ones_like(log_p)
        own = torch.zeros_like(log_p)  # h of the pixel's class, as far as other classes have none
        linear = square = every = None
        for slope, column in zip(slopes.unbind(1), self.sums.columns, strict=True):
            if column.kind == "prob":
                linear = slope
            elif column.kind == "square":
                square = slope
            elif column.kind == "all":
                every = slope
            elif column.kind not in LABELS:
                own += slope[classes] * softmax_slope(column, p, log_p, one)
        inner = own.clone()  # the sum of h over all classes
        if every is not None:
            inner -= every.sum()
        if square is not None:
            slope = (2 * square[:, None]) * (v * inverse)
            slope = slope if linear is None else slope + linear[:, None]
            inner += (v * slope).sum(1, keepdim=True) * inverse
            v *= slope - inner
        elif linear is not None:
            inner += torch.matmul(linear[None], v) * inverse
            v *= linear[:, None] - inner
        else:
            v *= -inner
        v *= inverse if counts is None else inverse * counts
        if every is not None:
            v -= every[:, None] if counts is None else every[:, None] * counts
        v.scatter_add_(1, classes, own if counts is None else own * counts)
        if v.shape[1] == 1:  # one class is certain: exactly 0, without rounding, or NaN
            v *= 0
        return v
