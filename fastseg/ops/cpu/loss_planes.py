"""Sums over the pixels of upsampled logits on a CPU, of few classes or of maps that stay in its caches.

All pixels are one block, ``loss_blocks.py``; what its gradient needs is kept, as autograd would, but no step is
recorded. Interpolating is two products with small matrices where they are small: of torch's time these take 0.3 to 0.8
forward and 0.1 to 0.3 backward (128^2, strides 4 and 16, one thread).
"""

import torch
from torch import Tensor

from fastseg.ops.core.loss_columns import SOFTMAX, Sums
from fastseg.ops.core.upsample import matrix_along
from fastseg.ops.cpu.loss_blocks import Activated, Block, activated, block_of, slope_of, sums_of
from fastseg.ops.cpu.threads import each
from fastseg.ops.cpu.upsampled_rows import BLOCK
from fastseg.ops.cpu.upsampled_slabs import upsampled, upsampled_backward

_FORWARD, _BACKWARD = 40, 200  # rows of logits up to which products are faster than torch's op


def forward(x: Tensor, target: Tensor, pixel_weight: Tensor | None, sums: Sums) -> tuple[Tensor, Activated, Block]:
    """The sums (N, C, columns), fp64, and what ``backward`` takes.

    Args:
        x: (N, C, h, w), finite; or small volumes (N, C, d, h, w), and then targets and factors have a depth too.
        target: class indices (N, H, W), or labels of each class (N, C, H, W).
        pixel_weight: (N, H, W), or None for 1.
        sums: what is summed; without an ``ignore_index`` where no label is ignored.
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    named = target.dim() == x.dim() - 1
    if x.dim() == 5:
        v = upsampled(x.to(kind), target.shape[-3:], sums.align_corners).flatten(2)
    else:
        v = maps_up(x.to(kind), target.shape[-2], target.shape[-1], sums.align_corners)
    a = activated(v, sums, named=named)
    factors = None if pixel_weight is None else pixel_weight.flatten(1)[:, None]
    labels = target.flatten(1)[:, None] if named else target.flatten(2)
    block = block_of(labels, factors, sums, kind, x.shape[1] if named else 0)
    return sums_of(a, block, sums, 2, **_labels(target, sums, named)), a, block


def backward(slopes: Tensor, a: Activated, block: Block, shape: torch.Size, target: Tensor, sums: Sums) -> Tensor:
    """slopes (N, C, columns), the derivative by each sum -> gradient at the logits of ``shape``."""
    kept = a.p if a.other is None else a.other
    if kept is None:  # labels alone are summed
        return torch.zeros(shape, device="cpu")
    named = target.dim() == len(shape) - 1
    dv = slope_of(slopes.to(kept.dtype), a, block, sums, **_labels(target, sums, named))
    if len(shape) == 5:
        return upsampled_backward(dv, shape, target.shape[-3:], sums.align_corners)
    return maps_down(dv, shape, target.shape[-2], target.shape[-1], sums.align_corners)


class Planes:
    """Both passes over sigmoids with labels of each class, a few planes (an image's class each) at a time.

    Nothing of full size is kept; classes are separate, and labels are read where they lie.

    Args:
        x: (N, C, h, w), finite.
        target: (N, C, H, W).
        sums: what is summed; without an ``ignore_index`` where no label is ignored.
    """

    def __init__(self, x: Tensor, target: Tensor, sums: Sums):
        self.shape, self.sums = x.shape, sums
        self.x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, 1, *x.shape[2:])
        self.target = target.reshape(-1, 1, *target.shape[2:])
        step = max(1, BLOCK // (target.shape[2] * target.shape[3]))
        self.parts = [slice(i, i + step) for i in range(0, self.x.shape[0], step)]

    def forward(self) -> Tensor:
        """-> sums (N, C, columns), fp64."""
        found = each(lambda part: forward(self.x[part], self.target[part], None, self.sums)[0], self.parts)
        return torch.cat(found).view(*self.shape[:2], -1)

    def backward(self, slopes: Tensor) -> Tensor:
        """slopes (N, C, columns), the derivative by each sum -> gradient at x."""
        slopes = slopes.flatten(0, 1)[:, None]

        def of(part: slice) -> Tensor:
            x, target = self.x[part], self.target[part]
            H, W = target.shape[2:]
            a = activated(maps_up(x, H, W, self.sums.align_corners), self.sums, named=False)
            block = block_of(target.flatten(2), None, self.sums, x.dtype)
            return backward(slopes[part], a, block, x.shape, target, self.sums)

        return torch.cat(each(of, self.parts)).view(self.shape)


def _labels(target: Tensor, sums: Sums, named: bool) -> dict[str, bool]:
    return {"named": named and sums.activation == SOFTMAX, "hard": not target.is_floating_point()}


def maps_up(x: Tensor, H: int, W: int, align_corners: bool) -> Tensor:
    """(N, C, h, w) -> (N, C, H * W)."""
    N, C, h, w = x.shape
    x = x.contiguous()
    if max(h, w) > _FORWARD:
        return torch.ops.aten.upsample_bilinear2d(x, [H, W], align_corners, None, None).flatten(2)
    wide = torch.mm(x.view(N * C * h, w), matrix_along(w, W, align_corners, x.dtype).t())
    return torch.matmul(matrix_along(h, H, align_corners, x.dtype), wide.view(N * C, h, W)).view(N, C, H * W)


def maps_down(dv: Tensor, shape: torch.Size, H: int, W: int, align_corners: bool) -> Tensor:
    """The transpose of ``maps_up``: (N, C, H * W) -> (N, C, h, w)."""
    N, C, h, w = shape
    if max(h, w) > _BACKWARD:
        back = torch.ops.aten.upsample_bilinear2d_backward
        return back(dv.view(N, C, H, W), [H, W], [N, C, h, w], align_corners, None, None)
    low = torch.matmul(matrix_along(h, H, align_corners, dv.dtype).t(), dv.view(N * C, H, W))
    return torch.mm(low.view(N * C * h, W), matrix_along(w, W, align_corners, dv.dtype)).view(N, C, h, w)
