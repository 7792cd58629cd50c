"""UNet++: a U-Net with nested skip connections and an output at every depth."""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.models.base import SegmentationNet, init_kaiming_
from fastseg.models.unet import Up, check_form, innermost, up_module
from fastseg.nn.fuse.conv_norm_act import convolve, run_conv_norm_act
from fastseg.nn.fuse.upsample_concat import upsample_concat
from fastseg.nn.leaf import leaf
from fastseg.nn.pooling import MaxPool2d

WIDTHS = (32, 64, 128, 256, 512)

Mode = Literal["accurate", "fast"]
Average = Literal["probabilities", "logits"]


class UNetPlusPlus(SegmentationNet):
    """UNet++ (Zhou et al., arXiv:1807.10165).

    Node ``conv{i}_{j}``, at depth i and position j of its skip path, is two 3x3 convolutions of width ``widths[i]``
    over all earlier nodes of its depth and the upsampled node below:

        X(i, j) = H([X(i, 0), ..., X(i, j - 1), up(X(i + 1, j - 1))]),    X(i, 0) = H(pool(X(i - 1, 0)))

    ``norm=False, up="transpose"`` is the authors' form (https://github.com/MrGiovanni/UNetPlusPlus): dropout after each
    ReLU, and the upsampled map first. ``norm=True, up="bilinear"`` is that of
    https://github.com/4uiiurz1/pytorch-nested-unet, the upsampled map last, whose names all forms have.

    Images whose sides have ``stride`` pixels or more work; where an odd side was halved, zeros pad the upsampled map.

    Args:
        num_classes: classes, background included.
        in_channels: channels of the image.
        norm: True for a batch norm after each 3x3 convolution.
        up: "transpose", a 2x2 transposed convolution to the width of its node, or "bilinear", an interpolation
            (``align_corners=True``) that keeps the channels.
        widths: channels at each depth; the highest level is their number minus one.
        deep_supervision: True to give each of X(0, 1), X(0, 2) ... a 1x1 head, not only the last. In training
            ``forward`` then returns the list of their logits, the shallowest first, and ``loss`` is a sum over them.
        mode: what ``logits`` returns for several heads: "accurate", their mean, or "fast", the last; ``prune`` makes
            another one the last.
        average: what "accurate" averages: "probabilities", as the authors do, whose heads end in sigmoids (the sigmoid
            of ``logits`` is then the mean of the heads' sigmoids), or "logits".
        dropout: probability of dropout after each ReLU, in training; None means 0.5 without norm, 0 with.

    Raises:
        ValueError: the value of an option is out of range.

    Example:
        >>> model = UNetPlusPlus(num_classes=2, deep_supervision=True).eval()
        >>> model(torch.randn(1, 3, 65, 47)).shape
        torch.Size([1, 2, 65, 47])
        >>> model.prune(2)(torch.randn(1, 3, 65, 47)).shape
        torch.Size([1, 2, 65, 47])
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        norm: bool = False,
        up: Up = "transpose",
        widths: Sequence[int] = WIDTHS,
        deep_supervision: bool = False,
        mode: Mode = "accurate",
        *,
        dropout: float | None = None,
        average: Average = "probabilities",
    ):
        super().__init__(num_classes, align_corners=None)
        check_form("UNetPlusPlus", up, widths)
        if mode not in ("accurate", "fast"):
            raise ValueError(f'UNetPlusPlus: mode is {mode!r}; use "accurate" or "fast"')
        if average not in ("probabilities", "logits"):
            raise ValueError(f'UNetPlusPlus: average is {average!r}; use "probabilities" or "logits"')
        self.levels = len(widths) - 1
        self.deep_supervision, self.mode, self.average = deep_supervision, mode, average
        rate = (0.0 if norm else 0.5) if dropout is None else dropout
        # ``prune`` builds the smaller net with it.
        self._form = {"num_classes": num_classes, "in_channels": in_channels, "norm": norm, "up": up, "dropout": rate}
        self.widths, self.up_first = tuple(widths), up == "transpose"
        self.pool = MaxPool2d(2)
        for i, width in enumerate(widths):
            self.add_module(f"conv{i}_0", _Node(widths[i - 1] if i else in_channels, width, norm, rate))
        for j in range(1, self.levels + 1):
            for i in range(self.levels + 1 - j):
                below = widths[i] if up == "transpose" else widths[i + 1]
                self.add_module(f"up{i}_{j}", up_module(widths[i + 1], widths[i], up == "bilinear"))
                self.add_module(f"conv{i}_{j}", _Node(j * widths[i] + below, widths[i], norm, rate))
        for name in self._heads():
            self.add_module(name, nn.Conv2d(widths[0], num_classes, 1))
        init_kaiming_(self)

    @property
    def stride(self) -> int:
        """Image pixels per pixel of the deepest map."""
        return 2**self.levels

    @property
    def supervised(self) -> int:
        """Number of heads, each of which has a loss in training."""
        return len(self._heads())

    @leaf
    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(N, in_channels, H, W) -> logits (N, num_classes, H, W); in training with deep supervision a list of them."""
        if self.training and self.deep_supervision:
            return self._branches(x, self._heads())
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes, H, W): the mean of the heads; in mode "fast" the last."""
        names = self._heads() if self.mode == "accurate" else self._heads()[-1:]
        branches = self._branches(x, names)
        if len(branches) == 1:
            return branches[0]
        return sum(branches) / len(branches) if self.average == "logits" else mean_of_sigmoids(branches)

    def loss(self, x: Tensor, target: Tensor, weights: Sequence[float] | None = None, **options: Any) -> Tensor:
        """Cross entropy of ``forward(x)`` and the class indices ``target`` (N, H, W).

        Args:
            x: (N, in_channels, H, W).
            target: class indices (N, H, W).
            weights: a factor per head, the shallowest first, for training with deep supervision; the weighted sum is
                the loss. None means the mean. ``fading_weights`` computes weights that fade out.
            options: those of ``SegmentationNet.loss``, such as ``ignore_index=255`` or ``terms``.

        Raises:
            ValueError: ``target`` has another size than ``x``, or there is not one weight for each of several heads.
        """
        names = self._heads()
        if weights is not None and (not self.deep_supervision or len(weights) != len(names)):
            raise ValueError(
                f"UNetPlusPlus.loss: weights are {tuple(weights)}; "
                + (f"give {len(names)}, one for each head" if self.deep_supervision else "deep_supervision is off")
            )
        if not (self.training and self.deep_supervision):
            return super().loss(x, target, **options)
        if weights is None:
            weights = [1 / len(names)] * len(names)
        if options.get("terms") is not None:
            return self._cross_entropy(self._branches(x, names), target, **options, head_weights=weights)
        losses = [self._cross_entropy(logits, target, **options) for logits in self._branches(x, names)]
        return sum(weight * loss for weight, loss in zip(weights, losses, strict=True))

    def prune(self, level: int) -> "UNetPlusPlus":
        """Return a net with the ``level``-th head alone, and only the nodes that it needs: X(i, j), i + j <= level.

        Its logits are those of that head. It is a ``UNetPlusPlus(..., widths=widths[: level + 1])``.

        Args:
            level: 1 to ``levels``; below ``levels`` the model must have been built with ``deep_supervision=True``.

        Raises:
            ValueError: there is no such level, or no head at it.

        Reference: "UNet++ L1" to "L4" of the article.
        """
        if not 1 <= level <= self.levels:
            raise ValueError(f"UNetPlusPlus.prune: level is {level}; use 1 to {self.levels}")
        if level < self.levels and not self.deep_supervision:
            raise ValueError(f"UNetPlusPlus.prune: level {level} has no head; build with deep_supervision=True")
        heads = self._heads()
        with torch.device("meta"):  # no memory, and no random numbers, for what is replaced
            pruned = type(self)(**self._form, widths=self.widths[: level + 1], mode=self.mode, average=self.average)
        for name in dict(pruned.named_children()):
            source = heads[level - 1 if self.deep_supervision else 0] if name == "final" else name
            setattr(pruned, name, copy.deepcopy(getattr(self, source)))
        return pruned.train(self.training)

    def _heads(self) -> list[str]:
        return [f"final{level}" for level in range(1, self.levels + 1)] if self.deep_supervision else ["final"]

    def _branches(self, x: Tensor, heads: Sequence[str]) -> list[Tensor]:
        """Logits of the heads; all nodes are computed."""
        if any(side < self.stride for side in x.shape[-2:]):
            raise ValueError(
                f"UNetPlusPlus: x is {tuple(map(int, x.shape))}; a side of {self.stride} pixels or more is needed"
            )
        x = innermost(x)
        rows: list[list[Tensor]] = []  # row i holds X(i, 0), X(i, 1) ...
        for depth in range(self.levels + 1):
            rows.append([getattr(self, f"conv{depth}_0")(self.pool(rows[-1][0]) if depth else x)])
            for j in range(1, depth + 1):
                i = depth - j
                joined = upsample_concat(rows[i + 1][-1], rows[i], getattr(self, f"up{i}_{j}"), up_first=self.up_first)
                rows[i].append(getattr(self, f"conv{i}_{j}")(joined))
        maps = rows[0][1:] if self.deep_supervision else rows[0][-1:]
        return [convolve(getattr(self, name), y) for name, y in zip(heads, maps[-len(heads) :], strict=True)]


class _Node(nn.Module):
    """Two 3x3 convolutions with bias, each with an optional batch norm, ReLU and dropout."""

    def __init__(self, in_channels: int, channels: int, norm: bool, dropout: float):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels) if norm else None
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels) if norm else None
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(run_conv_norm_act(x, self.conv1, self.bn1, self.relu))
        return self.dropout(run_conv_norm_act(x, self.conv2, self.bn2, self.relu))


def mean_of_sigmoids(each: Sequence[Tensor]) -> Tensor:
    """The logits whose sigmoid is the mean of the sigmoids of ``each``; finite wherever they are."""
    wide = torch.stack(tuple(each))
    if wide.dtype in (torch.float16, torch.bfloat16):
        wide = wide.float()
    # log p / (1 - p), where p and 1 - p are both sums of sigmoids over their number.
    y = F.logsigmoid(wide).logsumexp(0) - F.logsigmoid(-wide).logsumexp(0)
    return y.to(each[0].dtype)


def fading_weights(heads: int, progress: float, auxiliary: float = 1.0) -> list[float]:
    """Loss weights of deep supervision: 1 for the last head, ``auxiliary * (1 - progress)`` for the others.

    Args:
        heads: number of heads.
        progress: fraction of the training that is done, in [0, 1].
        auxiliary: initial weight of the others.

    Raises:
        ValueError: ``progress`` is outside [0, 1].

    Reference: Lee et al., Deeply-supervised nets, arXiv:1409.5185.

    Example:
        >>> fading_weights(4, progress=0.75)
        [0.25, 0.25, 0.25, 1.0]
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"fading_weights: progress is {progress}; it must lie in [0, 1]")
    return [auxiliary * (1 - progress)] * (heads - 1) + [1.0]
