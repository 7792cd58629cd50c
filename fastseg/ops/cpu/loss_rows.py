"""Sums over the pixels of upsampled logits on a CPU, a few output rows at a time, forward and backward.

``upsampled_rows.py`` has the walk, ``core/loss_columns.py`` the mathematics. Inside a block (rows, C, W) pixels are
neighbours and classes are lines, so that maxima and sums over classes are vector operations. Blocks are summed in the
logits' own precision, at least fp32, and added up in fp64.
"""

import torch
from torch import Tensor

from fastseg.ops.core.loss_columns import LABELS, SIGMOID, Sums, softmax_slope, softmax_term
from fastseg.ops.core.upsample import along_x
from fastseg.ops.cpu.loss_blocks import Block, activated, block_of, slope_of, sums_of
from fastseg.ops.cpu.threads import each
from fastseg.ops.cpu.upsampled_rows import BLOCK, Strip, along_x_backward, strips_of


class Walk:
    """Both passes over the strips of one map of logits.

    Args:
        x: (N, C, h, w), finite.
        target: class indices (N, H, W), or labels for each class (N, C, H, W).
        pixel_weight: (N, H, W), or None for 1.
        sums: what is summed; without an ``ignore_index`` where no label is ignored.
    """

    def __init__(self, x: Tensor, target: Tensor, pixel_weight: Tensor | None, sums: Sums):
        self.kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.x, self.target, self.pixel_weight, self.sums = x.detach(), target, pixel_weight, sums
        self.size = target.shape[-2:]
        self.hard = not target.is_floating_point() and sums.activation == SIGMOID  # labels are 0 and 1
        self.strips = strips_of(x.shape, *self.size, sums.align_corners, self.kind)

    def forward(self) -> Tensor:
        """-> sums (N, C, columns), fp64."""
        N, C = self.x.shape[:2]
        total = torch.zeros(N, C, len(self.sums.columns), dtype=torch.float64, device="cpu")
        for strip, part in zip(self.strips, each(self._sums_of, self.strips), strict=True):
            total[strip.image] += part
        return total

    def backward(self, slopes: Tensor) -> Tensor:
        """slopes (N, C, columns), the derivative by each sum -> gradient at x."""
        N, C, h, w = self.x.shape
        slopes = slopes.to(self.kind)
        parts = each(lambda strip: self._gradient_of(strip, slopes[strip.image]), self.strips)
        dx = torch.zeros(N, h, C, w, dtype=self.kind, device="cpu")
        for strip, part in zip(self.strips, parts, strict=True):
            dx[strip.image, strip.first : strip.last] += part
        return dx.permute(0, 2, 1, 3)

    def _wide(self, strip: Strip) -> Tensor:
        x = self.x[strip.image, :, strip.first : strip.last].to(self.kind)
        return along_x(x, self.size[1], self.sums.align_corners)

    def _sums_of(self, strip: Strip) -> Tensor:
        wide, C = self._wide(strip), self.x.shape[1]
        total = torch.zeros(C, len(self.sums.columns), dtype=torch.float64, device="cpu")
        for rows in self._blocks(strip):
            v = torch.mm(strip.matrix[rows], wide).view(-1, C, self.size[1])
            block = self._block(strip, rows)
            if self.sums.activation == SIGMOID or block.classes is None:
                total += sums_of(
                    activated(v, self.sums, named=False), block, self.sums, (0, 2), named=False, hard=self.hard
                )
            else:
                self._add_softmax(total, v, block)
        return total

    def _gradient_of(self, strip: Strip, slopes: Tensor) -> Tensor:
        wide, C = self._wide(strip), self.x.shape[1]
        dwide = torch.zeros_like(wide)
        for rows in self._blocks(strip):
            v = torch.mm(strip.matrix[rows], wide).view(-1, C, self.size[1])
            block = self._block(strip, rows)
            if self.sums.activation == SIGMOID or block.classes is None:
                a = activated(v, self.sums, named=False)
                dv = slope_of(slopes[None], a, block, self.sums, named=False, hard=self.hard)
            else:
                dv = self._slope_softmax(slopes, v, block)
            dwide.addmm_(strip.matrix[rows].t(), dv.view(dv.shape[0], -1))
        return along_x_backward(dwide, (C, strip.last - strip.first, self.x.shape[3]), self.sums.align_corners)

    def _blocks(self, strip: Strip) -> list[slice]:
        rows, step = strip.stop - strip.start, max(1, BLOCK // (self.x.shape[1] * self.size[1]))
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _block(self, strip: Strip, rows: slice) -> Block:
        within = slice(strip.start + rows.start, strip.start + rows.stop)
        factors = None if self.pixel_weight is None else self.pixel_weight[strip.image, within, None]
        if self.target.dim() == 4:
            labels = self.target[strip.image, :, within].transpose(0, 1)
            return block_of(labels, factors, self.sums, self.kind)
        classes = self.x.shape[1] if self.sums.activation == SIGMOID else -1
        return block_of(self.target[strip.image, within, None], factors, self.sums, self.kind, classes)

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
        if v.shape[1] == 1:  # one class is certain: exactly 0, without rounding
            v.zero_()
        return v
