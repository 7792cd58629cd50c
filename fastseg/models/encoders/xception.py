"""Xception-65 (Chollet, arXiv:1610.02357; the aligned form of DeepLabV3+, arXiv:1802.02611) without its classifier."""

from torch import Tensor, nn

from fastseg.models.encoders.widths import scaled
from fastseg.nn.fuse.conv_norm_act import run_conv_norm_act
from fastseg.nn.fuse.separable import run_separable
from fastseg.nn.fuse.sequential import noting
from fastseg.nn.fuse.watch import watched

MIDDLE_BLOCKS = 16
MOMENTUM = 3e-4  # momentum of the running statistics, in the two codes


class Xception65(nn.Module):
    """Xception-65 as an encoder, named as in the code of the DeepLabV3+ article.

    The stem is ``conv1`` and ``conv2``. The blocks have three separable convolutions and a skip: ``block1`` to
    ``block3`` in the entry flow, 16 in the middle flow, then ``block20``. ``conv3`` to ``conv5`` are separable, without
    a skip. The order in a block is ReLU, depthwise, norm, pointwise, norm; in ``conv3`` to ``conv5`` it is depthwise,
    norm, ReLU, pointwise, norm, ReLU.

    The weights of two codes fit, but give different outputs:

    - "bubbliiiing", https://github.com/bubbliiiing/deeplabv3-plus-pytorch: the ReLU that begins a block works in place,
      and so a skip without a convolution carries ``relu(x)``: y = f(relu(x)) + relu(x). All blocks past the output
      stride have one dilation, 16 / output stride, and ``conv3`` to ``conv5`` as well.
    - "google", https://github.com/tensorflow/models/tree/master/research/deeplab: the skip carries x; the epsilon of
      all norms is 1e-3; ``conv3`` to ``conv5`` have twice the dilation.

    Args:
        in_channels: channels of the image.
        output_stride: input size / size of the deepest features: 8, 16 or 32.
        width: multiplier of every width; the results are rounded to multiples of 8.
        preset: "bubbliiiing" or "google".
        middle_blocks: blocks of the middle flow, at most 16.

    Attributes:
        out_channels: the widths of what ``forward`` returns.

    Raises:
        ValueError: the value of an option is out of range.

    Example:
        >>> [tuple(f.shape[1:]) for f in Xception65(output_stride=16)(torch.randn(1, 3, 64, 96))]
        [(3, 64, 96), (64, 32, 48), (256, 16, 24), (728, 8, 12), (1024, 4, 6), (2048, 4, 6)]
    """

    def __init__(
        self,
        in_channels: int = 3,
        output_stride: int = 32,
        width: float = 1.0,
        *,
        preset: str = "bubbliiiing",
        middle_blocks: int = MIDDLE_BLOCKS,
    ):
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f"Xception65: output_stride is {output_stride}; use 8, 16 or 32")
        if preset not in ("bubbliiiing", "google"):
            raise ValueError(f'Xception65: preset is {preset!r}; use "bubbliiiing" or "google"')
        if not 0 <= middle_blocks <= MIDDLE_BLOCKS:
            raise ValueError(f"Xception65: middle_blocks is {middle_blocks}; use 0 to {MIDDLE_BLOCKS}")
        google = preset == "google"
        stem, stem2, *widths = (scaled(n, width, "Xception65") for n in (32, 64, 128, 256, 728, 1024, 1536, 2048))
        self.conv1 = nn.Conv2d(in_channels, stem, 3, stride=2, padding=1, bias=False)
        self.bn1 = _norm(stem, google)
        self.relu = nn.ReLU()  # of the stem; the blocks' are no modules
        self.conv2 = nn.Conv2d(stem, stem2, 3, padding=1, bias=False)
        self.bn2 = _norm(stem2, google)

        entry, middle, wide, exit_ = widths[:3], widths[2], widths[3], widths[4:]
        dilation = max(1, 16 // output_stride)
        strides = (2, 2, 2 if output_stride >= 16 else 1, 2 if output_stride == 32 else 1)
        options = {"google": google}
        channels = stem2
        for i, (out_channels, stride) in enumerate(zip(entry, strides[:3], strict=True), 1):
            self.add_module(f"block{i}", Block(channels, out_channels, out_channels, stride, 1, **options))
            channels = out_channels
        self.leaks = not google
        self.middle = [f"block{4 + i}" for i in range(middle_blocks)]
        for name in self.middle:
            self.add_module(name, Block(middle, middle, middle, 1, dilation, **options))
        self.block20 = Block(middle, middle, wide, strides[3], dilation, **options)
        last = 2 * dilation if google and output_stride < 32 else dilation
        self.conv3 = _Separable(wide, exit_[0], 1, last, google, act_first=False)
        self.conv4 = _Separable(exit_[0], exit_[0], 1, last, google, act_first=False)
        self.conv5 = _Separable(exit_[0], exit_[1], 1, last, google, act_first=False)
        self.out_channels = [in_channels, stem2, entry[1], entry[2], wide, exit_[1]]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, in_channels, H, W) -> six maps; entry i has stride 2^i, capped at the output stride; entry 0 is ``x``.

        Entries 2 to 4 are the inputs of the strided convolutions of ``block2``, ``block3`` and ``block20``, without a
        ReLU.
        """
        y = run_conv_norm_act(x, self.conv1, self.bn1, self.relu)
        y = run_conv_norm_act(y, self.conv2, self.bn2, self.relu)
        features = [x, y]
        y = self.block1(y)
        rectified = False
        names = ("block2", "block3", *self.middle, "block20")
        for name, following in zip(names, (*names[1:], None), strict=True):
            block, inner = getattr(self, name), []
            rectify = self.leaks and following in self.middle  # all that takes y then takes relu(y)
            rectify = rectify and not (watched(block, Block) or watched(getattr(self, following), Block))
            if type(block) is Block and "forward" not in vars(block):
                y = block(y, rectified=rectified, rectify=rectify, inner=inner)
            elif name in self.middle:
                y = block(y)
            else:
                with noting(block, "sepconv2", inner.append):
                    y = block(y)
            rectified = rectify
            if name not in self.middle:
                features.append(inner[0])
        for layer in (self.conv3, self.conv4, self.conv5):
            y = layer(y)
        return [*features, y]


class _Separable(nn.Module):
    """Depthwise, norm, pointwise, norm; a ReLU in front, or one after each norm."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, dilation: int, google: bool, *, act_first: bool = True
    ):
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, stride, dilation, dilation, groups=in_channels, bias=False
        )
        self.bn1 = _norm(in_channels, google)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = _norm(out_channels, google)
        self.act_first = act_first

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, rectified: bool = False, rectify: bool = False
    ) -> Tensor:
        """``rectified``: ``x`` is the output of the ReLU in front; ``rectify``: apply a ReLU after the residual."""
        act = None if self.act_first else "relu"
        return run_separable(
            x, self.depthwise, self.bn1, act, self.pointwise, self.bn2, act,
            pre_act="relu" if self.act_first and not rectified else None, residual=residual,
            out_act="relu" if rectify else None,
        )  # fmt: skip


class Block(nn.Module):
    """Three separable convolutions and a skip, a strided 1x1 convolution where width or size change."""

    def __init__(
        self, in_channels: int, mid_channels: int, out_channels: int, stride: int, dilation: int, *, google: bool
    ):
        super().__init__()
        if out_channels != in_channels or stride != 1:
            self.skip = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.skipbn = _norm(out_channels, google)
        else:
            self.skip = None
        self.sepconv1 = _Separable(in_channels, mid_channels, 1, dilation, google)
        self.sepconv2 = _Separable(mid_channels, out_channels, 1, dilation, google)
        self.sepconv3 = _Separable(out_channels, out_channels, stride, dilation, google)
        self.leaks = not google

    def forward(
        self, x: Tensor, *, rectified: bool = False, rectify: bool = False, inner: list[Tensor] | None = None
    ) -> Tensor:
        """``rectified``: ``x`` is relu(x), all that a leaking block reads; ``rectify``: return the output after a ReLU.

        ``inner`` gets the input of the last separable convolution.
        """
        if self.skip is not None:
            skip = run_conv_norm_act(x, self.skip, self.skipbn, None)
        else:
            skip = x.relu() if self.leaks and not rectified else x
        rectified = rectified and not watched(self.sepconv1, _Separable)
        y = self.sepconv1(x, rectified=True) if rectified else self.sepconv1(x)
        y = self.sepconv2(y)
        if inner is not None:
            inner.append(y)
        if not watched(self.sepconv3, _Separable):
            return self.sepconv3(y, skip, rectify=rectify)
        y = self.sepconv3(y) + skip
        return y.relu() if rectify else y


def _norm(channels: int, google: bool) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3 if google else 1e-5, momentum=MOMENTUM)
